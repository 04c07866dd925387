"""Results in plain words: sentences about channels, attribution and metrics, each number with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from madit.channels import ChannelEntry, ChannelSet
from madit.figures import explained, pick

MOST = 5
"""How many channels, or (block, channel) pairs, are put in words; the figures and files have the others."""

_COLUMNS = (
    "accuracy", "detail_distance", "log2_power_ratio", "excess_noise", "noise_sigma", "layout_correlation",
    "layout_ssim", "high_band_power",
)  # fmt: skip
_HEADS = {
    "accuracy": "accuracy", "detail_distance": "detail distance", "log2_power_ratio": "log₂ power ratio",
    "excess_noise": "excess noise", "noise_sigma": "noise", "layout_correlation": "layout correlation",
    "layout_ssim": "layout SSIM", "high_band_power": "high-band power",
}  # fmt: skip

CONSTRUCTED = (
    "This model was built so that its massive channels carry local detail. It shows that the instruments can find, "
    "edit and use such channels when they exist. It is never evidence that trained models work this way."
)


def is_constructed(name: str, notes: str) -> bool:
    """Whether a model calls itself a constructed positive control, by its embedded name or in its notes."""
    text = notes.lower()
    return name == "shapes-detail" or "positive control" in text or "constructed model" in text


def number(value: float, digits: int = 3) -> str:
    """Significant digits without an exponent where it is short; an en dash for what is missing.

    >>> number(0.7), number(1234.5), number(-0.0421, 2), number(900.0, 2), number(float("nan"))
    ('0.700', '1234', '−0.042', '900', '–')
    """
    if value is None or not np.isfinite(value):
        return "–"
    size = abs(value)
    if size and not 1e-4 <= size < 1e6:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:.{max(0, digits - 1 - math.floor(math.log10(size))) if size else 0}f}"
    return text.replace("-", "−")


def interval(low: float, high: float) -> str:
    r"""A 95 % interval in words.

    >>> interval(0.25, 0.5)
    '95\xa0%: 0.25 to 0.50'
    """
    return f"95\u00a0%: {number(low, 2)} to {number(high, 2)}"


def spans(values: Iterable[int]) -> str:
    """Whole numbers as runs.

    >>> spans([1, 2, 3, 5])
    '1 to 3, 5'
    """
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def channels_in_words(channels: ChannelSet) -> list[str]:
    """What `locate` found: a sentence for each channel, the largest first; or that nothing is massive."""
    by_channel: dict[tuple[str, int], list[ChannelEntry]] = {}
    for entry in channels.entries:
        by_channel.setdefault((entry.stream, entry.channel), []).append(entry)
    ranked = sorted(by_channel.items(), key=lambda item: -max(e.ratio or 0 for e in item[1]))
    rules, evidence = channels.criterion, channels.evidence
    verdict = "massive" if tested(channels) else "the largest, not tested for being massive,"
    lines = [_channel_in_words(channel, stream, entries, verdict) for (stream, channel), entries in ranked[:MOST]]
    if len(ranked) > MOST:
        lines.append(f"{len(ranked) - MOST} more channels are {verdict.strip(',')}; the channel set lists them.")
    if not lines:
        lines.append(f"No channel is massive{_criterion(rules)}.{_largest(evidence)}")
    if rules.get("note"):
        lines.append(str(rules["note"]))
    positional = {p["channel"] for p in evidence.get("positional", ())}
    if positional:
        lines.append(
            f"Large but positional (deviation over tokens above the mean), so not massive: channel {spans(positional)}."
        )
    return lines


def tested(channels: ChannelSet) -> bool:
    """Whether the set's channels passed the criterion; those that `top_k` asks for did not have to."""
    return channels.criterion.get("top_k") is None


def _channel_in_words(channel: int, stream: str, entries: Sequence[ChannelEntry], verdict: str) -> str:
    top = max(entries, key=lambda e: e.ratio or 0)
    text = f"Channel {channel} is {verdict} at the output of {_blocks(entries)}"
    text += "" if stream == "img" else f" of the {stream} stream"
    if top.ratio is not None:
        text += f": {number(top.ratio)} times the median activation at block {top.block}"
        if top.ratio_low is not None and top.ratio_high is not None:
            text += f" ({interval(top.ratio_low, top.ratio_high)})"
    if top.persistence is not None and verdict == "massive":
        text += f", in {100 * top.persistence:.0f} % of the samples"
    if top.sigma_min is not None and top.sigma_max is not None and verdict == "massive":
        text += f", for σ from {top.sigma_max:.2f} down to {top.sigma_min:.2f}"
    if top.constancy is not None:
        text += f"; over tokens its mean is {number(top.constancy)} times its deviation"
    return text + "."


def _blocks(entries: Sequence[ChannelEntry]) -> str:
    found = {e.block for e in entries}
    return f"block{'s' if len(found) > 1 else ''} {spans(found)}"


def _criterion(rules: dict[str, Any]) -> str:
    return f" at the ratio asked for ({number(rules['ratio'])})" if "ratio" in rules else ""


def _largest(evidence: dict[str, Any]) -> str:
    largest = evidence.get("largest_at_coverage") or evidence.get("largest_ratio")
    if not largest:
        return ""
    return (
        f" The largest seen is channel {largest['channel']} at block {largest['block']}, {number(largest['ratio'])} "
        f"times the median, at σ = {largest['sigma']:.2f}."
    )


def effects_in_words(effects: xr.Dataset) -> list[str]:
    """What `attribute` found: the leading factors of each (block, channel), and which are constant."""
    lines = []
    places = explained(effects)
    for block, channel in places[:MOST]:
        cell = effects.sel(block=block, channel=channel)
        order = [str(f) for f in cell["factor"].values[np.argsort(-cell["total"].fillna(0).values)]]
        shares = []
        for factor in order[:2]:
            one = cell.sel(factor=factor)
            first = f"{number(float(one.first_order), 2)} alone"
            total = f"{number(float(one.total), 2)} in total ({_bounds(one, 'total')})"
            shares.append(f"{factor.replace('_', ' ')} {first}, {total}")
        lines.append(f"Channel {channel} at block {block}, share of its variance: {'; '.join(shares)}.")
    if len(places) > MOST:
        lines.append(f"{len(places) - MOST} more (block, channel) pairs are in the Dataset.")
    if "constant" in effects:
        flat = (effects["constant"] == 1).transpose("block", "channel").values
        pairs = [f"{int(effects.channel[j])} at block {int(effects.block[i])}" for i, j in np.argwhere(flat)]
        if pairs:
            shown = ", ".join(pairs[:MOST]) + (" and others" if len(pairs) > MOST else "")
            lines.append(f"Constant, whatever the inputs: channel {shown}.")
    design = effects.attrs.get("design")
    if design == "label":
        lines.append("Only the timestep argument varied while the latent kept its noise level (off-manifold).")
    elif design == "matched":
        lines.append(
            "The latent had the noise level of its timestep, so the timestep's share includes the noise level's."
        )
    return lines


def _bounds(cell: xr.Dataset, name: str) -> str:
    return interval(float(cell[f"{name}_low"]), float(cell[f"{name}_high"]))


def metric_names(table: xr.Dataset) -> list[str]:
    """The metrics of a table in the order of the page; of classifiers of several factors, the row for all of them."""
    names = []
    for name in _COLUMNS:
        if name not in table:
            continue
        if "factor" in table[name].dims:
            factors = [str(f) for f in table["factor"].values]
            chosen = [f for f in factors if f in ("texture", "semantics")] or factors
            names += [f"{name}:{factor}" for factor in sorted(chosen, key=factors.index, reverse=True)]
        elif not (name == "noise_sigma" and "excess_noise" in table):
            names.append(name)
    return names


def headline(table: xr.Dataset) -> list[str]:
    """The metrics of the summary: accuracies, detail and layout."""
    first = ("accuracy", "detail_distance", "layout_correlation")
    return [m for m in metric_names(table) if m.partition(":")[0] in first]


def short(metric: str) -> str:
    """A metric's name in a few words.

    >>> short("accuracy:texture")
    'texture accuracy'
    """
    name, _, factor = metric.partition(":")
    return f"{factor} {_HEADS.get(name, name)}".strip()


def metrics_in_words(table: xr.Dataset, metrics: Sequence[str], controls: Sequence[str] = ()) -> list[str]:
    """For each condition, the metrics that differ from the baseline visibly and with an interval without 0."""
    base = table.attrs.get("baseline")
    names = [str(c) for c in table["condition"].values]
    if base not in names:
        return []
    lines = []
    for name in names:
        if name == base:
            continue
        parts = []
        for metric in metrics:
            value = pick(table, metric)[0]
            change = difference(table, metric, name)
            if change is None or not change[1] * change[2] > 0:
                continue
            before, after = (float(value.sel(condition=c)) for c in (base, name))
            if number(before, 2) == number(after, 2):
                continue  # certain but too small to see
            moved = f"{number(before, 2)} → {number(after, 2)}"
            parts.append(f"{short(metric)} {moved} (change {number(change[0], 2)}, {interval(*change[1:])})")
        role = " (control)" if name in controls and "control" not in name else ""
        nothing = f"no difference from {base} that is both visible and certain"
        lines.append(f"{name}{role}: {'; '.join(parts) or nothing}.")
    return lines


def difference(table: xr.Dataset, metric: str, condition: str) -> tuple[float, float, float] | None:
    """The paired difference of a condition from the baseline with its bounds; None where the table has none."""
    name, _, factor = metric.partition(":")
    if f"{name}_difference" not in table:
        return None
    where = {"condition": condition} | ({"factor": factor} if factor else {})
    cell = table.sel(where)
    value, low, high = (float(cell[f"{name}_difference{side}"]) for side in ("", "_low", "_high"))
    return value, low, high
