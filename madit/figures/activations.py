"""Figures of a run: magnitudes by block, channel, token and noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from madit import views
from madit.axes import BLOCK, CHANNEL, SAMPLE, STEP, TOKEN
from madit.channels import ChannelSet
from madit.figures.style import GREY, MARKERS, PALETTE, RATIO, new_axes, panels, styled

_RATIO_LABEL = "mean |h| / median |h|"
_SIGMA_LABEL = "noise level σ (generation runs left to right)"


def _cells(tree: xr.DataTree, stream: str, branch: str) -> xr.Dataset:
    """`mean_abs` and `median_abs` of the cells that were recorded; lazy, a large run is reduced before it is read."""
    data, _ = views.token_statistics(tree, stream, branch, 0.95)
    return data[["mean_abs", "median_abs"]].where(data["recorded"])


@styled
def magnitude_heatmap(
    tree: xr.DataTree, stream: str = "img", branch: str = "cond", ratio: float = RATIO, ax: Axes | None = None
) -> Axes:
    """The largest channel over the ordinary ones, max_c mean|h_c| / median|h|, by block and noise level.

    Each cell is the median over samples; those at or above `ratio` are outlined.

    Args:
        tree: a run (`open_run`).
        stream: `"img"` or `"txt"`.
        branch: which forward passes.
        ratio: the cut of `locate` to outline.
        ax: where to draw; None: a new figure.
    """
    data = _cells(tree, stream, branch)
    value = (data.mean_abs.max(CHANNEL) / data.median_abs).median(SAMPLE).transpose(BLOCK, STEP).compute()
    blocks, steps = value.sizes[BLOCK], value.sizes[STEP]
    ax = new_axes(ax, 6.5, float(np.clip(1.4 + 0.32 * blocks, 2.6, 8)))
    top = float(np.nanmax(value))
    bottom = max(1.0, float(np.nanmin(value)))
    norm = LogNorm(vmin=bottom, vmax=max(top, 1.01 * bottom))
    image = ax.pcolormesh(np.arange(steps), np.arange(blocks), value, norm=norm, cmap="viridis", rasterized=True)
    bar = ax.figure.colorbar(image, ax=ax, label=f"largest channel\n{_RATIO_LABEL}", pad=0.02)
    if bottom < ratio <= top:
        bar.ax.axhline(ratio, color="white", lw=2.5)
    _outline(ax, value.values >= ratio)
    if blocks * steps <= 120:
        for (row, column), number in np.ndenumerate(value.values):
            dark = norm(number) < 0.6
            text = f"{number:.1f}" if number < 10 else f"{number:.0f}"
            ax.text(column, row, text, ha="center", va="center", size=8, color="white" if dark else "black")
    ax.grid(visible=False)
    ax.set_yticks(*_thinned(np.arange(blocks), [str(int(b)) for b in value[BLOCK]], 20))
    labels = [f"{float(s):.2f}\n{float(t):.4g}" for s, t in zip(value.sigma, value.timestep, strict=True)]
    ax.set_xticks(*_thinned(np.arange(steps), labels, 10))
    ax.set(xlabel="noise level σ, below it the timestep (generation runs left to right)", ylabel="output of block")
    return ax


def _outline(ax: Axes, inside: np.ndarray) -> None:
    """Draw the border between cells that are inside and cells that are not."""
    for row, column in np.argwhere(inside[:, 1:] != inside[:, :-1]):
        ax.plot([column + 0.5] * 2, [row - 0.5, row + 0.5], color="white", lw=2.5)
    for row, column in np.argwhere(inside[1:] != inside[:-1]):
        ax.plot([column - 0.5, column + 0.5], [row + 0.5] * 2, color="white", lw=2.5)


def _thinned(places: np.ndarray, labels: Sequence[str], most: int) -> tuple[np.ndarray, list[str]]:
    keep = np.unique(np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int))
    return places[keep], [str(labels[int(i)]) for i in keep]


@styled
def channel_profile(
    tree: xr.DataTree,
    channels: ChannelSet | None = None,
    blocks: Sequence[int] | None = None,
    stream: str = "img",
    branch: str = "cond",
    ratio: float = RATIO,
) -> Figure:
    """mean|h_c| / median|h| of every channel, one panel for each block's output; massive channels are named.

    The median over samples, at the step where the channel is largest.

    Args:
        tree: a run.
        channels: which channels to mark as massive; None: none.
        blocks: which blocks; None: all, or twelve spread evenly.
        stream: `"img"` or `"txt"`.
        branch: which forward passes.
        ratio: drawn as a dashed line.
    """
    data = _cells(tree, stream, branch)
    value = (data.mean_abs / data.median_abs).median(SAMPLE).max(STEP).compute()
    held = [int(b) for b in value[BLOCK]]
    if blocks is None:
        blocks = [held[i] for i in np.unique(np.linspace(0, len(held) - 1, min(12, len(held))).round().astype(int))]
    figure, axes = panels(len(blocks), 3, 2.6, 2.0, sharex=True, sharey=True)
    width = value.sizes[CHANNEL]
    for ax, block in zip(axes, blocks, strict=True):
        y = value.isel({BLOCK: held.index(block)}).values
        ax.plot(np.arange(width), y, color=GREY, lw=0.7)
        ax.axhline(ratio, color="black", ls="--", lw=0.9)
        massive = channels.at(block, stream) if channels is not None else ()
        for k, channel in enumerate(massive):
            ax.plot(channel, y[channel], MARKERS[0], color=PALETTE[3], ms=5)
            if k < 6:
                right = channel > 0.7 * width
                ax.annotate(
                    str(channel), (channel, y[channel]), (-6 if right else 6, 0), textcoords="offset points", size=9,
                    ha="right" if right else "left", va="center", color=PALETTE[3], fontweight="bold",
                )  # fmt: skip
        more = f" ({len(massive)} massive)" if len(massive) > 6 else ""
        ax.set(yscale="log", title=f"block {block}{more}")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    top = max(float(value.max()), ratio) * 3
    bottom = 0.3 * float(value.quantile(0.05))  # some channels are all but dead: they would flatten the rest
    axes[0].set_ylim(bottom if bottom > 0 else 1e-3, top)
    _plain_log(axes[0])
    figure.supxlabel("channel of the residual stream", size=10)
    figure.supylabel(_RATIO_LABEL, size=10)
    return figure


@styled
def token_map(
    tree: xr.DataTree,
    block: int,
    channel: int,
    sample: int = 0,
    step: int | None = None,
    branch: str = "cond",
    ax: Axes | None = None,
) -> Axes:
    """Signed activation of one channel at each image token, on the image grid.

    One even colour means that the channel is constant over the picture; colours are symmetric about zero.

    Args:
        tree: a run recorded with `values="raw"` or `"both"`.
        block: whose output.
        channel: which channel.
        sample: position of the sample.
        step: position of the step; None: the last.
        branch: which forward passes.
        ax: where to draw; None: a new figure.

    Raises:
        StoreError: if the run has no raw activations of the image stream.
    """
    raw = views.group(tree, "/activations/img", "record with values='raw' or 'both'")
    cell = views.on_branch(raw, branch).isel({SAMPLE: sample, STEP: -1 if step is None else step})
    cell = cell.isel({BLOCK: [int(b) for b in raw[BLOCK]].index(block), CHANNEL: channel})
    row, column = (np.asarray(cell[name], int) for name in ("row", "column"))
    grid = np.full((row.max() + 1, column.max() + 1), np.nan)
    grid[row, column] = cell["activation"].transpose(TOKEN).values
    ax = new_axes(ax, 3.2, 3.0)
    limit = float(np.nanmax(np.abs(grid))) or 1.0
    image = ax.imshow(grid, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.03)
    ax.grid(visible=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    title = f"channel {channel}, block {block}, σ = {float(cell.sigma):.2f}"
    ax.set_title(f"{title}\nmean {np.nanmean(grid):.4g}, deviation {np.nanstd(grid):.2g}", size=10)
    ax.set(xlabel="token column", ylabel="token row")
    return ax


@styled
def token_maps(tree: xr.DataTree, places: Sequence[tuple[int, int]], **kwargs: Any) -> Figure:
    """`token_map` of several (block, channel) side by side; keyword arguments go to each."""
    figure, axes = panels(len(places), 3, 2.6, 2.5)
    for ax, (block, channel) in zip(axes, places, strict=True):
        token_map(tree, block, channel, ax=ax, **kwargs)
    return figure


@styled
def magnitude_against_sigma(
    tree: xr.DataTree, block: int, channel: int, stream: str = "img", branch: str = "cond", ax: Axes | None = None
) -> Axes:
    """mean|h_c| of one channel against the noise level, a thin line for each prompt, and median|h| for scale.

    Lines on top of each other mean that the magnitude does not follow the prompt.

    Args:
        tree: a run.
        block: whose output.
        channel: which channel.
        stream: `"img"` or `"txt"`.
        branch: which forward passes.
        ax: where to draw; None: a new figure.

    Source: arXiv 2510.11538 shows that magnitudes follow the timestep and hardly the prompt.
    """
    data = _cells(tree, stream, branch)
    data = data.isel({BLOCK: [int(b) for b in data[BLOCK]].index(block), CHANNEL: channel}).compute()
    value = data.mean_abs
    prompts = value.groupby("prompt").mean(SAMPLE) if "prompt" in value.coords else value.rename({SAMPLE: "prompt"})
    sigma = np.asarray(value["sigma"], float)
    ax = new_axes(ax)
    lines = prompts.transpose(STEP, "prompt").values
    ax.plot(sigma, lines, color=PALETTE[0], lw=0.8, alpha=0.6, zorder=3)
    ax.plot(sigma, np.nanmedian(lines, 1), color="black", lw=3, marker="o", ms=5, label=f"channel {channel}: median")
    ax.plot([], [], color=PALETTE[0], lw=0.8, label=f"channel {channel}: each of {lines.shape[1]} prompts")
    ax.plot(sigma, data.median_abs.median(SAMPLE), color=PALETTE[1], ls="--", label="median |h| of all channels")
    ax.set(xlabel=_SIGMA_LABEL, ylabel=f"mean |h| at block {block}", yscale="log")
    _plain_log(ax)
    ax.invert_xaxis()
    ax.legend(loc="best")
    return ax


def _plain_log(ax: Axes) -> None:
    """Numbers instead of powers of ten where they are short; no crowd of minor labels."""
    low, high = ax.get_ylim()
    if low >= 1e-3 and high <= 1e5:
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    if high / low > 12:
        ax.yaxis.set_minor_formatter(NullFormatter())
