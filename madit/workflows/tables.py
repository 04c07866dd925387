"""Tables of the page: metrics by condition, and settings."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import xarray as xr

from madit import figures
from madit.workflows import words

_PACKAGES = ("madit", "torch", "diffusers", "nnsight", "xarray", "zarr", "numpy", "scipy", "matplotlib", "seaborn")
_MOST_TEXT = 400
_WIDE = 4  # metrics side by side: more would not fit a printed page


def metric_table(table: xr.Dataset, controls: Sequence[str]) -> dict[str, Any]:
    """Caption and parts (columns and rows) of what `compare` returned; paired differences under the values."""
    base = table.attrs.get("baseline", "")
    metrics = words.metric_names(table)
    columns = []
    for metric in metrics:
        columns.append((words.short(metric), table[metric.partition(":")[0]].attrs.get("units", "")))
    rows = []
    for condition in [str(c) for c in table["condition"].values]:
        role = "baseline" if condition == base else "control" if condition in controls else ""
        role = "" if role in condition else role
        cells = [_cell(table, metric, condition, condition == base) for metric in metrics]
        rows.append({"name": condition, "role": role, "control": condition in controls, "cells": cells})
    caption = (
        f"{table.attrs.get('n', '?')} pictures in each condition. Mean, with its 95 % interval below; Δ is the paired "
        f"difference from {base}, in bold where its interval leaves out 0. Detail is a distance: smaller is closer to "
        "the reference. High-band power is not detail: a wrecked picture has much of it."
    )
    if "accuracy_p" in table:
        caption += f" p: {table['accuracy_p'].attrs.get('long_name', '')}; not corrected for the number of comparisons."
    parts = [
        {"columns": columns[i : i + _WIDE], "rows": [row | {"cells": row["cells"][i : i + _WIDE]} for row in rows]}
        for i in range(0, len(columns), _WIDE)
    ]
    return {"caption": caption, "parts": parts}


def markdown(table: xr.Dataset, controls: Sequence[str], metrics: Sequence[str]) -> str:
    """What `compare` returned as a Markdown table: mean (95 % interval), and * where it differs from the baseline.

    Args:
        table: over `condition`.
        controls: conditions that are controls; they stand in italics.
        metrics: names of `METRICS`; one factor of the accuracies as `accuracy:texture`.
    """
    base = table.attrs.get("baseline", "")
    heads = [words.short(metric) for metric in metrics]
    lines = ["| condition | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for condition in [str(c) for c in table["condition"].values]:
        cells = [_cell(table, metric, condition, condition == base) for metric in metrics]
        texts = [f"{c['value']}{'*' if c.get('differs') else ''} ({c['interval']})" for c in cells]
        name = f"*{condition}*" if condition in controls else condition
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _cell(table: xr.Dataset, metric: str, condition: str, is_base: bool) -> dict[str, Any]:
    value, low, high, _ = figures.pick(table, metric)
    mean, bottom, top = (float(v.sel(condition=condition)) for v in (value, low, high))
    cell = {
        "value": words.number(mean),
        "interval": f"{words.number(bottom)} to {words.number(top)}",
        "p": "",
        "bounds": "",
    }
    change = None if is_base else words.difference(table, metric, condition)
    if change is None:
        return cell | {"change": "", "differs": False}
    moved, least, most = (words.number(number, 2) for number in change)
    name, _, factor = metric.partition(":")
    if f"{name}_p" in table:
        p = float(table[f"{name}_p"].sel(condition=condition, factor=factor))
        cell["p"] = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    return cell | {"change": f"Δ {moved}", "bounds": f"({least} to {most})", "differs": change[1] * change[2] > 0}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    here = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            here[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            here[package] = "not installed"
    return here


def flat(data: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings, JSON texts among them, as dotted names and short texts."""
    rows = []
    for key, value in data.items():
        if value is None or (isinstance(value, str | list | tuple | dict) and not value):
            continue
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, str) and value[:1] == "{":
            try:
                value = json.loads(value)
            except ValueError:
                value = str(value)
        if isinstance(value, Mapping):
            rows += flat(value, name)
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if len(text) > _MOST_TEXT:
            count = f" ({len(value)} in all)" if isinstance(value, list | tuple) else ""
            text = text[:_MOST_TEXT] + f" …{count}"
        rows.append((name, text))
    return rows
