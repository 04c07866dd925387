"""`report`: one self-contained HTML page about runs, channels, effects, pictures and metrics. It needs no model."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from madit import evaluation, figures, location, views
from madit.axes import BLOCK, CHANNEL, SAMPLE, STEP
from madit.channels import ChannelSet
from madit.errors import ConfigError
from madit.workflows import words
from madit.workflows.tables import flat, metric_table, versions

_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class ModelResults:
    """What is known of one model; all but the name may be missing, and the page then shows less.

    Args:
        name: of the model.
        notes: what a reader must know of it, in plain words; a blank line parts paragraphs.
        constructed: whether it is a constructed positive control; None: as its name and notes say.
        run: a run's tree, for magnitudes, token maps and provenance.
        channels: what `locate` found.
        effects: what `attribute` found.
        images: condition -> pictures of the same samples, for the grid and the spectra.
        captions: prompt of each sample.
        metrics: what `compare` returned.
        controls: conditions that are controls.
        curves: what the curve shows -> (table over a dose, metric, name of the dose's dimension).
        findings: verdicts in plain words; they come before the sentences that the data give.
        provenance: what else to record of how this was made.
    """

    name: str
    notes: str = ""
    constructed: bool | None = None
    run: xr.DataTree | None = None
    channels: ChannelSet | None = None
    effects: xr.Dataset | None = None
    images: Mapping[str, Any] = field(default_factory=dict)
    captions: Sequence[str] | None = None
    metrics: xr.Dataset | None = None
    controls: Sequence[str] = ()
    curves: Mapping[str, tuple[xr.Dataset, str, str]] = field(default_factory=dict)
    findings: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def report(
    store: xr.DataTree | str | Path,
    out: str | Path = "report.html",
    channels: ChannelSet | None = None,
    factorial: xr.DataTree | str | Path | None = None,
    notes: str = "",
) -> Path:
    """Write the page of one run, with what its store allows.

    Args:
        store: a run, or the path of its store.
        out: the HTML file.
        channels: massive channels; None: located with the default criterion.
        factorial: a factorial store of the same model, for the attribution.
        notes: what a reader must know of the model.

    Returns:
        The path of the page.

    Raises:
        StoreError: if this is no run.

    >>> report("run.zarr", out="report.html")  # doctest: +SKIP
    """
    tree = views.as_tree(store)
    views.expect_kind(tree, "run", "give the run's store, and a factorial one as factorial=")
    if channels is None and _has_magnitudes(tree):
        channels = location.locate(tree)
    model = views.fingerprint(tree)
    effects = None
    if factorial is not None and channels is not None:
        from madit.attribution import attribute

        effects = attribute(factorial, channels)
    images, captions = {}, None
    if views.has(tree, "/outputs") and "image" in tree["/outputs"].data_vars:
        outputs = tree["/outputs"].to_dataset().isel({SAMPLE: slice(16)})
        images = {"generated": outputs["image"].compute()}
        captions = [str(p) for p in outputs["prompt"].values] if "prompt" in outputs.coords else None
    name = (model.name if model is not None else "") or "unnamed model"
    results = ModelResults(
        name, notes=notes, run=tree, channels=channels, effects=effects, images=images, captions=captions
    )
    shown = store if isinstance(store, str | Path) else "STORE"
    return write_report(out, results, title=f"madit: {name}", command=f"madit report {shown}")


def write_report(
    out: str | Path,
    *models: ModelResults,
    title: str = "madit report",
    summary: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
    command: str = "",
) -> Path:
    """Write one HTML file without external references: summary, figures, metrics, attribution, provenance.

    Args:
        out: the file; its folder is made.
        *models: what to show, in this order.
        title: of the page.
        summary: paragraphs before those of the models.
        provenance: settings of the whole page.
        command: how to make it again.

    Returns:
        The path of the file.

    Raises:
        ConfigError: without a model.
    """
    if not models:
        raise ConfigError("expected at least one ModelResults, got none")
    gallery = _Gallery()
    shown = [_head(model) for model in models]
    for view, model in zip(shown, models, strict=True):
        view["figures"] = [*_run_figures(gallery, model), *_picture_figures(gallery, model)]
    for view, model in zip(shown, models, strict=True):
        view |= {"table": None, "metric_figures": []}
        if model.metrics is not None:
            view |= {
                "metric_figures": _metric_figures(gallery, model),
                "table": metric_table(model.metrics, model.controls),
            }
    for view, model in zip(shown, models, strict=True):
        view["attribution"] = None if model.effects is None else _attribution(gallery, model.effects)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        version=metadata.version("madit"),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        summary=list(summary),
        models=shown,
        has_metrics=any(view["table"] for view in shown),
        has_attribution=any(view["attribution"] for view in shown),
        provenance=_provenance(models, provenance or {}),
        command=command,
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


class _Gallery:
    """Numbers figures in the order of the page and turns them into data URIs."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, drawn: Figure | Axes, title: str, caption: str, kind: str = "svg") -> dict[str, Any]:
        figure: Any = drawn if isinstance(drawn, Figure) else drawn.figure
        buffer = io.BytesIO()
        nothing = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[kind]  # same data, same bytes
        with figures.style():
            figure.savefig(buffer, format=kind, dpi=200, metadata=nothing)
        mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
        source = f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        self.count += 1
        width = round(6.6 * figure.get_size_inches()[0], 1)
        return {"number": self.count, "title": title, "caption": caption, "source": source, "width": width}


def _head(model: ModelResults) -> dict[str, Any]:
    constructed = model.constructed
    if constructed is None:
        constructed = words.is_constructed(model.name, model.notes)
    findings = list(model.findings)
    if model.channels is not None:
        findings += words.channels_in_words(model.channels)
    if model.effects is not None:
        findings += words.effects_in_words(model.effects)
    if model.metrics is not None:
        findings += words.metrics_in_words(model.metrics, words.headline(model.metrics), model.controls)
    notes = [" ".join(part.split()) for part in model.notes.split("\n\n") if part.strip()]
    return {
        "name": model.name,
        "constructed": words.CONSTRUCTED if constructed else "",
        "notes": notes,
        "findings": findings or ["Nothing was computed for this model."],
    }


def _has_magnitudes(tree: xr.DataTree) -> bool:
    return views.has(tree, "/statistics/img") or views.has(tree, "/activations/img")


def _places(tree: xr.DataTree, channels: ChannelSet | None) -> list[tuple[int, int]]:
    """The (block, channel) pairs to show: three massive channels at most, each at its largest; else the largest."""
    best: dict[int, tuple[float, int]] = {}
    for entry in channels.entries if channels is not None else ():
        if entry.stream == "img":
            best[entry.channel] = max(best.get(entry.channel, (-1.0, 0)), (entry.ratio or 0.0, entry.block))
    if best:
        ranked = sorted(best, key=lambda c: -best[c][0])[:3]
        return [(best[c][1], c) for c in ranked]
    data = _levels(tree)
    i, j = np.unravel_index(int(np.nanargmax(data.values)), data.shape)
    return [(int(data[BLOCK][i]), int(data[CHANNEL][j]))]


def _levels(tree: xr.DataTree) -> xr.DataArray:
    """mean|h| / median|h| by block and channel, median over samples, largest step."""
    data, _ = views.token_statistics(tree, "img", "cond", 0.95)
    ratio = (data["mean_abs"] / data["median_abs"]).where(data["recorded"])
    return ratio.median(SAMPLE).max(STEP).transpose(BLOCK, CHANNEL).compute()


def _run_figures(gallery: _Gallery, model: ModelResults) -> list[dict[str, Any]]:
    tree, channels = model.run, model.channels
    if tree is None or not _has_magnitudes(tree):
        return []
    ratio = float((channels.criterion if channels is not None else {}).get("ratio", figures.RATIO))
    massive = channels is not None and len(channels) > 0 and words.tested(channels)
    named = "; those found are named in orange. " if massive else "; none was found here. "
    if channels is not None and len(channels) > 0 and not massive:
        named = "; none was tested for here, the largest are named in orange. "
    shown = [
        gallery.add(
            figures.magnitude_heatmap(tree, ratio=ratio),
            "How far the largest channel stands out",
            "Each cell: mean |h| of the largest channel over the median |h| of all, at one block's output and one "
            f"noise level; median over samples. The white line is the border of {ratio:g}, the cut for massive.",
        ),
        gallery.add(
            figures.channel_profile(tree, channels, ratio=ratio),
            "Every channel of every block",
            "A massive channel is a spike far above an even floor" + named + f"Dashed: a ratio of {ratio:g}.",
        ),
    ]
    places = _places(tree, channels)
    apology = "" if massive else " No channel is massive; this is the largest."
    for block, channel in places[:2]:
        shown.append(
            gallery.add(
                figures.magnitude_against_sigma(tree, block, channel),
                f"Channel {channel} along generation",
                "A thin line for each prompt. A slope means that the magnitude follows the noise level; lines on top "
                f"of each other, that it does not follow the prompt.{apology}",
            )
        )
    if views.has(tree, "/activations/img"):
        block = places[0][0]
        levels = _levels(tree).sel({BLOCK: block})
        ordinary = int(levels[CHANNEL][int(np.argsort(levels.values)[levels.size // 2])])
        shown.append(
            gallery.add(
                figures.token_maps(tree, [*places[:2], (block, ordinary)]),
                "Where in the picture",
                "Signed activation of each image token, first sample, last step; the last panel is an ordinary channel "
                f"({ordinary}). One even colour: the same value at every token.{apology}",
                "png",
            )
        )
    return shown


def _picture_figures(gallery: _Gallery, model: ModelResults) -> list[dict[str, Any]]:
    shown = []
    if model.images:
        many = len(model.images) > 1
        shown.append(
            gallery.add(
                figures.image_grid(model.images, model.captions),
                "Pictures of each condition" if many else "Pictures",
                ("Columns share prompt and seed; compare down a column. " if many else "")
                + "The first samples, unselected.",
                "png",
            )
        )
        spectra = {name: evaluation.radial_spectrum(pictures) for name, pictures in model.images.items()}
        shown.append(
            gallery.add(
                figures.radial_spectra(spectra),
                "Power by spatial frequency",
                "Mean over pictures, band: 95 % interval. Less power at the right is blur; more is detail or damage, "
                "which power alone can't tell apart.",
            )
        )
    for title, (table, metric, over) in model.curves.items():
        caption = "Points: mean over pictures; band: 95 % interval."
        shown.append(gallery.add(figures.dose_curve(table, metric, over), title, caption))
    return shown


def _metric_figures(gallery: _Gallery, model: ModelResults) -> list[dict[str, Any]]:
    assert model.metrics is not None
    names = [
        m
        for m in words.metric_names(model.metrics)
        if m.split(":")[0] not in ("log2_power_ratio", "layout_correlation")
    ]
    drawn = figures.forest(model.metrics, names[:6], model.controls)
    controls = " Hollow squares are controls." if model.controls else ""
    caption = (
        f"Dot and bar: mean and 95 % interval. Dashed line and band: {model.metrics.attrs.get('baseline', 'baseline')}."
        f"{controls} An effect counts where the controls do not show it too."
    )
    return [gallery.add(drawn, "Each condition against the baseline", caption)]


def _attribution(gallery: _Gallery, effects: xr.Dataset) -> dict[str, Any]:
    lines = words.effects_in_words(effects)
    places = figures.explained(effects)
    if not places:
        return {"lines": lines, "figures": []}
    caption = "Bars: share of the variance of the token mean; lines: 95 % interval over latents and texts."
    drawn = figures.attribution_grid(effects, places[:6])
    return {"lines": lines, "figures": [gallery.add(drawn, "What drives each channel", caption)]}


def _provenance(models: Sequence[ModelResults], extra: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    sections = [(model.name, rows) for model in models if (rows := _model_rows(model))]
    return [*sections, ("This page", [*flat(extra), *flat(versions())])]


def _model_rows(model: ModelResults) -> list[tuple[str, str]]:
    rows = flat(model.provenance)
    if model.channels is not None:
        rows += flat(model.channels.criterion, "criterion")
    if model.effects is not None:
        rows += flat(model.effects.attrs, "attribution")
    if model.metrics is not None:
        rows += flat(model.metrics.attrs, "metrics")
    return rows + (flat(model.run.attrs, "run") if model.run is not None else [])
