"""Figures of results: attribution, pictures, spectra, dose curves and metrics with controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from madit.axes import BLOCK, CHANNEL
from madit.errors import ConfigError
from madit.figures.style import DASHES, GREY, MARKERS, PALETTE, new_axes, panels, styled, wrap
from madit.pictures import HIGH_BAND, as_images


@styled
def attribution_bars(effects: xr.Dataset, block: int, channel: int, ax: Axes | None = None) -> Axes:
    """First-order and total Sobol index of each factor, with intervals, of one channel at one block's output.

    Where the two bars differ, the factor acts together with others.

    Args:
        effects: what `attribute` returns.
        block: whose output.
        channel: which channel.
        ax: where to draw; None: a new figure.

    Raises:
        ConfigError: if `effects` has nothing of this block and channel.
    """
    held = [(int(b), int(c)) for b, c in explained(effects)]
    ax = new_axes(ax, 4.2, 2.8)
    factors = [str(f) for f in effects["factor"].values]
    cell = effects.sel({BLOCK: block, CHANNEL: channel})
    constant = "constant" in cell and bool(cell["constant"] == 1)
    if not constant and (block, channel) not in held:
        raise ConfigError(f"expected a (block, channel) with effects: {held}; got {(block, channel)}")
    for k, (name, label) in enumerate((("first_order", "first-order"), ("total", "total"))):
        value = cell[name].transpose("factor").values
        low, high = (cell[f"{name}_{side}"].transpose("factor").values for side in ("low", "high"))
        places = np.arange(len(factors)) + (k - 0.5) * 0.38
        ax.bar(places, value, 0.36, color=PALETTE[(0, 1)[k]], hatch=("", "///")[k], ec="white", label=label)
        if not constant:
            spread = np.clip([value - low, high - value], 0, None)
            ax.errorbar(places, value, spread, fmt="none", ecolor="black", capsize=3, lw=1.2)
    if constant:
        ax.text(0.5, 0.5, "constant:\nnothing to attribute", transform=ax.transAxes, ha="center", va="center")
    ax.set_xticks(range(len(factors)), [f.replace("_", "\n") for f in factors])
    ax.set(ylabel="share of variance", xlim=(-0.6, len(factors) - 0.4), title=f"channel {channel}, block {block}")
    lowest = 0.0 if constant else float(np.nanmin([0.0, *cell["first_order_low"].values, *cell["total_low"].values]))
    ax.set_ylim(lowest - 0.02 * (lowest < 0), 1.08)
    ax.grid(visible=False, axis="x")
    ax.legend(loc="upper right")
    return ax


def explained(effects: xr.Dataset) -> list[tuple[int, int]]:
    """The (block, channel) pairs that have indices, ascending; the others are NaN in `effects`."""
    some = effects["total"].notnull().any("factor").transpose(BLOCK, CHANNEL)
    blocks, channels = effects[BLOCK].values, effects[CHANNEL].values
    return [(int(blocks[i]), int(channels[j])) for i, j in np.argwhere(some.values)]


@styled
def attribution_grid(effects: xr.Dataset, places: Sequence[tuple[int, int]]) -> Figure:
    """`attribution_bars` of several (block, channel) side by side, on one scale."""
    figure, axes = panels(len(places), 2, 3.6, 2.5, sharey=True)
    for k, (ax, (block, channel)) in enumerate(zip(axes, places, strict=True)):
        attribution_bars(effects, block, channel, ax=ax)
        if k:
            ax.set_ylabel("")
            ax.legend_ = None
    return figure


@styled
def image_grid(images: Mapping[str, Any], captions: Sequence[str] | None = None, columns: int = 8) -> Figure:
    """Pictures of several conditions, a row for each condition and a column for each sample, pixels kept square.

    Args:
        images: condition -> pictures, as for `evaluate`; picture i is the same prompt and seed in every row.
        captions: prompt of each sample, above the columns.
        columns: how many samples at most.
    """
    rows = {name: as_images(pictures)[:columns] for name, pictures in images.items()}
    n = max(len(pictures) for pictures in rows.values())
    side = 5.2 / n
    above = [wrap(str(caption), max(10, int(side * 14))) for caption in (captions if captions is not None else ())][:n]
    lines = max((text.count("\n") + 1 for text in above), default=0)
    figure = Figure(figsize=(6.5, (side + 0.06) * len(rows) + 0.15 + 0.155 * lines))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.05, wspace=0.02, hspace=0.0)
    grid = figure.subplots(len(rows), n, squeeze=False)
    for ax in grid.ravel():
        ax.set(xticks=[], yticks=[], anchor="S")  # slack above, where captions are
        ax.grid(visible=False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    for i, (name, pictures) in enumerate(rows.items()):
        grid[i, 0].set_ylabel(wrap(name, 16), rotation=0, ha="right", va="center", size=9)
        for ax, picture in zip(grid[i], pictures, strict=False):
            ax.imshow(picture, interpolation="nearest", vmin=0, vmax=255 if picture.dtype == np.uint8 else 1)
    for ax, text in zip(grid[0], above, strict=False):
        ax.set_title(text, size=8, loc="center")
    return figure


@styled
def radial_spectra(spectra: Mapping[str, xr.Dataset], ax: Axes | None = None) -> Axes:
    """Power spectral density by spatial frequency with intervals, a line for each condition; the high band is shaded.

    Args:
        spectra: condition -> what `radial_spectrum` returns.
        ax: where to draw; None: a new figure.
    """
    ax = new_axes(ax, 6.5, 3.6)
    looks = cycle(zip(cycle(PALETTE), cycle(DASHES), cycle(MARKERS), strict=False))
    for (name, data), (colour, dash, marker) in zip(spectra.items(), looks, strict=False):
        f = data["frequency"].values
        every = max(1, len(f) // 8)
        ax.plot(f, data["power"], color=colour, ls=dash, marker=marker, ms=4, markevery=every, lw=1.5, label=name)
        ax.fill_between(f, data["power_low"], data["power_high"], color=colour, alpha=0.18, lw=0)
    ax.axvspan(HIGH_BAND, 0.5, color="#f1f1f1", zorder=0)
    ax.text(0.492, 0.97, "high band", transform=ax.get_xaxis_transform(), color=GREY, size=9, ha="right", va="top")
    ax.set(
        yscale="log", xlim=(0, 0.5), xlabel="spatial frequency (cycles/pixel)", ylabel="power of luma (grey levels²)"
    )
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def pick(table: xr.Dataset, metric: str) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray, str]:
    """Value, bounds and label of a metric; `"accuracy:texture"` is the accuracy of factor `texture`.

    Raises:
        ConfigError: for a metric or factor that the table lacks, naming those it has.
    """
    name, _, factor = metric.partition(":")
    held = [str(k) for k in table if f"{k}_low" in table]
    if name not in held:
        raise ConfigError(f"expected a metric of {', '.join(held)}; got {metric!r}")
    if "factor" in table[name].dims:
        factors = [str(f) for f in table["factor"].values]
        if factor not in factors:
            raise ConfigError(f"expected {name}:FACTOR with a factor of {', '.join(factors)}; got {metric!r}")
        table = table.sel(factor=factor)
    values = [table[name + side] for side in ("", "_low", "_high")]
    what, unit = values[0].attrs.get("long_name", name), values[0].attrs.get("units", "")
    return values[0], values[1], values[2], f"{what}{f': {factor}' if factor else ''}{f' ({unit})' if unit else ''}"


@styled
def dose_curve(
    table: xr.Dataset, metric: str, over: str = "scale", references: Mapping[str, float] | None = None,
    label: str | None = None, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """A metric with its interval against a dose, as the guidance scale w; a line for each row of a second dimension.

    Args:
        table: metrics over `over`, and at most one other dimension.
        metric: which one, as for `pick`.
        over: the dimension of the dose.
        references: name -> value, drawn as horizontal lines.
        label: of the dose axis; None: the coordinate's own, or its name.
        ax: where to draw; None: a new figure.
    """
    value, low, high, what = pick(table, metric)
    ax = new_axes(ax, 4.4, 3.2)
    series = [d for d in value.dims if d != over]
    names = [None] if not series else list(value[series[0]].values)
    for name, colour, marker, dash in zip(names, cycle(PALETTE), cycle(MARKERS), cycle(DASHES), strict=False):
        y, bottom, top = (v if name is None else v.sel({series[0]: name}) for v in (value, low, high))
        ax.plot(y[over], y, color=colour, marker=marker, ls=dash, ms=5, label=None if name is None else str(name))
        ax.fill_between(y[over], bottom, top, color=colour, alpha=0.2, lw=0)
    for (name, level), dash in zip((references or {}).items(), cycle((":", "--", "-.")), strict=False):
        ax.axhline(level, color="black", ls=dash, lw=1.1, label=name)
    ax.set(xlabel=label or table[over].attrs.get("long_name", over.replace("_", " ")), ylabel=wrap(what, 36))
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="best")
    return ax


@styled
def forest(table: xr.Dataset, metrics: Sequence[str], controls: Sequence[str] = ()) -> Figure:
    """Metrics with their intervals, a row for each condition; the baseline's interval is shaded, controls are hollow.

    Args:
        table: what `compare` returns.
        metrics: one panel each, as for `pick`.
        controls: conditions that are controls.
    """
    names = [str(c) for c in table["condition"].values]
    base = table.attrs.get("baseline")
    figure, axes = panels(len(metrics), 2, 3.3, 1.0 + 0.28 * len(names), sharey=True)
    places = np.arange(len(names))[::-1]
    for ax, metric in zip(axes, metrics, strict=True):
        value, low, high, what = pick(table, metric)
        if base in names:
            i = names.index(base)
            ax.axvspan(float(low[i]), float(high[i]), color="#ececec", zorder=0, lw=0)
            ax.axvline(float(value[i]), color=GREY, ls="--", lw=1)
        for i, (name, place) in enumerate(zip(names, places, strict=True)):
            colour = GREY if name in controls else PALETTE[0]
            fill = "white" if name in controls else colour
            ax.plot([float(low[i]), float(high[i])], [place, place], color=colour, lw=1.6)
            ax.plot(float(value[i]), place, "s" if name in controls else "o", color=colour, mfc=fill, ms=6)
        ax.set_yticks(places, [wrap(name, 26) for name in names])
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel(wrap(what, 32), size=9)
        ax.grid(visible=False, axis="y")
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    return figure
