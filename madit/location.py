"""Locate massive activations: the channels whose magnitude is orders above the rest at nearly every token."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from madit.axes import BLOCK, BRANCH, CHANNEL, QUANTILE, SAMPLE, STEP
from madit.channels import ChannelEntry, ChannelSet
from madit.errors import CriterionError
from madit.views import as_tree, channel_means, expect_kind, fingerprint, n_blocks, token_statistics

SUN_MAGNITUDE, SUN_RATIO = 100.0, 1000.0
"""Sun et al. 2024 (arXiv 2402.17762), section 2: |h| > 100 and >= 1000 x the median of |h|."""
N_BOOT = 500
CONSTANCY_RESOLUTION = float(np.finfo(np.float32).eps)
"""Relative variance that float32 moments resolve: a channel constant beyond it has constancy 2.9e3."""
ENTRY = "entry"
Criterion = Literal["ratio", "sun"]


def locate(
    tree: xr.DataTree | str | Path,
    ratio: float = 100.0,
    coverage: float = 0.95,
    persistence: float = 0.90,
    step_share: float = 0.5,
    criterion: Criterion = "ratio",
    top_k: int | None = None,
    stream: str = "img",
    branch: str = "cond",
    seed: int = 0,
) -> ChannelSet:
    """Find the massive channels of a run, block by block.

    A (sample, step) cell passes for channel c when a share `coverage` of its tokens has
    |h[n,c]| >= ratio * median_{n,c} |h|; c is massive at a block's output when a share `persistence` of the samples
    passes at a share `step_share` of the steps. A channel whose standard deviation over tokens is above its |mean| is
    positional: it is named in the evidence and never called massive.

    Args:
        tree: a run, as `record` or `open_run` return it, or the path of its store.
        ratio: how many times the median (over tokens and channels) the tokens must reach.
        coverage: share of tokens that must reach it, 0 to 1.
        persistence: share of samples that must pass, 0 to 1.
        step_share: share of the recorded steps at which they must, 0 to 1: a channel may follow the timestep.
        criterion: `"ratio"`, or `"sun"`: |h| > 100 and >= 1000 medians at the same coverage (`ratio` is not used).
        top_k: instead of the criterion take this many channels per block, marked so: the largest by the ratio that a
            share `coverage` of the tokens reaches, among those whose |mean| is above their deviation over tokens.
        stream: `"img"` or `"txt"`.
        branch: which of the run's branches decides.
        seed: of the bootstrap over samples.

    Returns:
        A `ChannelSet`: each entry with its evidence, intervals over samples (None for a single sample), and the mean
        of h per branch and step; an entry's `coverage` is the largest level that is surely reached. `evidence` holds
        the largest ratio seen and where, the positional channels and the counts; `summary` puts it in words. Empty
        if nothing is massive.

    Raises:
        CriterionError: if the stored quantiles can't answer `coverage`, or a parameter makes no sense.
        StoreError: if this is no run, or it lacks the stream or branch.

    >>> channels = locate("run.zarr", ratio=50)
    >>> channels.at(2)
    (7, 20)

    Source: Sun et al. 2024 (arXiv 2402.17762) for the magnitude; Detail Guidance (arXiv 2510.11538) for "at all
    image tokens, in a few fixed channels".
    """
    _check(ratio, coverage, persistence, step_share, criterion, top_k)
    tree = as_tree(tree)
    cells = profile(tree, ratio, coverage, criterion, stream, branch)
    details, steps, positional = _massive(cells, persistence, step_share)
    if top_k is not None:
        details, steps = _largest(cells, top_k)
    rules = {"criterion": criterion, "ratio": ratio, "coverage": coverage, "persistence": persistence}
    rules |= {"step_share": step_share, "stream": stream, "branch": branch, "seed": seed, "top_k": top_k}
    if criterion == "sun":
        rules |= {"ratio": SUN_RATIO, "magnitude": SUN_MAGNITUDE}
    if top_k is not None:
        rules["note"] = f"the {top_k} largest channels of each block, asked for by name: not tested against the ratio"
    entries = [
        _entry(details.isel({ENTRY: i}), steps.values[i], stream, seed, top_k is not None)
        for i in range(details.sizes[ENTRY])
    ]
    means = _means(tree, stream, entries)
    return ChannelSet(
        model=fingerprint(tree),
        n_blocks=n_blocks(tree),
        width=cells.sizes[CHANNEL],
        sigma=tuple(float(s) for s in _sigma(cells)),
        entries=tuple(e.model_copy(update={"means": m}) for e, m in zip(entries, means, strict=True)),
        criterion=rules,
        evidence=_evidence(cells, positional, len(entries)),
    )


def profile(
    tree: xr.DataTree | str | Path,
    ratio: float = 100.0,
    coverage: float = 0.95,
    criterion: Criterion = "ratio",
    stream: str = "img",
    branch: str = "cond",
) -> xr.Dataset:
    """What `locate` looks at, cell by cell: lazy where the tree is.

    Args:
        tree: a run, or the path of its store.
        ratio: how many times the median the tokens must reach.
        coverage: share of tokens that must reach it.
        criterion: `"ratio"` or `"sun"`, as in `locate`.
        stream: `"img"` or `"txt"`.
        branch: one of the run's branches.

    Returns:
        A Dataset over (sample, step, block, channel): `ratio` = mean |h| / median |h|; `ratio_at_coverage`, the same
        of the order statistic that the criterion compares; `magnitude` = mean |h| and `mean`, in the unit of h;
        `constancy` = |mean| / standard deviation over tokens; `passes`; `positional` (ratio reached with constancy
        below 1); `coverage`, the largest stored share of tokens that surely passes (0 if none); and `recorded` over
        (sample, step). NaN, or False, where nothing was recorded or the median is not positive and finite.

    Raises:
        CriterionError, StoreError: as in `locate`.

    >>> cells = profile("run.zarr")
    >>> int(cells.passes.sum("channel").sel(block=2).min())
    2
    """
    tree = as_tree(tree)
    expect_kind(tree, "run", "locate reads what madit.record wrote")
    data, source = token_statistics(tree, stream, branch, coverage)
    median = data["median_abs"].astype(np.float64)
    usable = data["recorded"] & (median > 0) & np.isfinite(median)
    median = median.where(usable)
    ratio, magnitude = (SUN_RATIO, SUN_MAGNITUDE) if criterion == "sun" else (ratio, 0.0)
    cut = np.maximum(ratio * median, np.nextafter(magnitude, np.inf))  # above 100, not at it
    mean = data["mean"].astype(np.float64).where(usable)
    variance = data["mean_square"] - np.square(mean)
    resolved = np.maximum(CONSTANCY_RESOLUTION * data["mean_square"], np.finfo(np.float64).tiny)  # blank channels: 0
    constancy = np.abs(mean) / np.sqrt(np.maximum(variance, resolved))
    reached = data["abs_quantile"] >= cut
    cells = xr.Dataset(
        {
            "ratio": data["mean_abs"] / median,
            "ratio_at_coverage": data["at_coverage"] / median,
            "magnitude": data["mean_abs"].where(usable),
            "mean": mean,
            "constancy": constancy,
            "passes": data["at_coverage"] >= cut,
            "positional": (data["mean_abs"] >= cut) & (constancy < 1),
            "coverage": (reached * (1 - data[QUANTILE])).max(QUANTILE),
            "recorded": usable.any(BLOCK),
        },
        attrs={"source": source, "stream": stream, "branch": branch},
    )
    order = [d for d in (SAMPLE, STEP, BLOCK, CHANNEL) if d in cells.dims]
    return cells.transpose(*order).drop_vars(BRANCH, errors="ignore")


def summary(channels: ChannelSet) -> str:
    """What `locate` found, in one line for each block and one for what was seen beside it.

    >>> summary(locate("run.zarr")).splitlines()[0]
    'block 1: 7 (ratio ...), 20 (ratio ...)'
    """
    evidence, rules = channels.evidence, channels.criterion
    lines = []
    for block in channels.blocks(rules.get("stream", "img")):
        found = [e for e in channels.entries if e.block == block]
        lines.append(f"block {block}: " + ", ".join(f"{e.channel} (ratio {e.ratio or math.nan:.3g})" for e in found))
    if not lines:
        lines.append(f"no massive channel at ratio {rules.get('ratio', math.nan):g}")
    if rules.get("note"):
        lines.append(rules["note"])
    largest = evidence.get("largest_at_coverage")
    if largest:
        lines.append(
            f"largest ratio at coverage {rules['coverage']:g}: {largest['ratio']:.3g} "
            f"(block {largest['block']}, channel {largest['channel']}, sigma {largest['sigma']:.3g})"
        )
    pairs = [f"{p['channel']} at block {p['block']}" for p in evidence.get("positional", ())]
    if pairs:
        shown = ", ".join(pairs[:6]) + (f" and {len(pairs) - 6} more" if len(pairs) > 6 else "")
        lines.append(f"large but positional, not massive: {shown}")
    return "\n".join(lines)


def _check(
    ratio: float, coverage: float, persistence: float, step_share: float, criterion: str, top_k: int | None
) -> None:
    if not (ratio > 0 and math.isfinite(ratio)):
        raise CriterionError(f"expected a positive ratio, got {ratio!r}")
    for name, share in {"coverage": coverage, "persistence": persistence, "step_share": step_share}.items():
        if not 0 < share <= 1:
            raise CriterionError(f"expected {name} as a share above 0 and at most 1, got {share!r}")
    if criterion not in ("ratio", "sun"):
        raise CriterionError(f"expected criterion 'ratio' or 'sun', got {criterion!r}")
    if top_k is not None and top_k < 1:
        raise CriterionError(f"expected top_k of 1 or more channels per block, or None, got {top_k!r}")


Pairs = list[tuple[int, int]]
"""(position of the block, position of the channel) in the tree's own order."""


def _massive(cells: xr.Dataset, persistence: float, step_share: float) -> tuple[xr.Dataset, xr.DataArray, Pairs]:
    """Cells of the massive channels, the steps at which each is (entry, step), and the positional pairs."""
    counts = xr.Dataset(
        {"n": cells["recorded"].sum(SAMPLE)} | {k: cells[k].sum(SAMPLE) for k in ("passes", "positional")}
    ).compute()  # one pass over the store: what is kept has no sample dimension
    n_steps = int((counts["n"] > 0).sum())
    share = counts[["passes", "positional"]] / counts["n"].where(counts["n"] > 0)
    holds = share >= persistence
    enough = (holds.sum(STEP) >= step_share * n_steps - 1e-9) & holds.any(STEP)
    pairs = {k: [(int(b), int(c)) for b, c in np.argwhere(enough[k].values)] for k in ("passes", "positional")}
    steps = holds["passes"].isel(_index(pairs["passes"])).transpose(ENTRY, STEP)
    details = _gather(cells, pairs["passes"])
    inside = details["recorded"] & details["passes"] & steps
    keep = (details["constancy"].where(inside).median([SAMPLE, STEP]) >= 1).values.reshape(-1)
    massive = {pair for pair, kept in zip(pairs["passes"], keep, strict=True) if kept}
    positional = sorted({*pairs["passes"], *pairs["positional"]} - massive)
    return details.isel({ENTRY: keep}), steps.isel({ENTRY: keep}), positional


def _largest(cells: xr.Dataset, top_k: int) -> tuple[xr.Dataset, xr.DataArray]:
    """Cells of each block's `top_k` largest channels that hold over tokens; every recorded step is theirs."""
    pairs: Pairs = []
    for block in range(cells.sizes[BLOCK]):
        medians = cells[["ratio_at_coverage", "constancy"]].isel({BLOCK: block}).compute().median([SAMPLE, STEP])
        score = medians["ratio_at_coverage"].where(medians["constancy"] >= 1, -np.inf).values
        best = np.argsort(-score, kind="stable")[:top_k]
        pairs += [(block, int(c)) for c in best if np.isfinite(score[c])]
    steps = cells["recorded"].any(SAMPLE).compute().expand_dims({ENTRY: len(pairs)})
    return _gather(cells, pairs), steps


def _index(pairs: Pairs) -> dict[str, xr.DataArray]:
    positions = np.array(pairs, int).reshape(-1, 2)
    return {BLOCK: xr.DataArray(positions[:, 0], dims=ENTRY), CHANNEL: xr.DataArray(positions[:, 1], dims=ENTRY)}


def _gather(cells: xr.Dataset, pairs: Pairs) -> xr.Dataset:
    """All cells of these (block, channel) pairs in memory, over (entry, sample, step)."""
    return cells.isel(_index(pairs)).compute().transpose(ENTRY, SAMPLE, STEP)


def _entry(cell: xr.Dataset, steps: np.ndarray, stream: str, seed: int, everywhere: bool) -> ChannelEntry:
    """One channel's evidence from its (sample, step) cells; `steps` are those at which it is massive."""
    eligible = cell["recorded"] & xr.DataArray(steps, dims=STEP)
    inside = eligible if everywhere else eligible & cell["passes"]
    median: dict[str, Any] = {
        k: float(cell[k].where(inside).median()) for k in ("ratio", "constancy", "magnitude", "coverage")
    }
    signs = {int(s) for s in np.sign(cell["mean"].values[inside.values])}
    passed = cell["passes"].where(eligible).mean(STEP).values
    ratios = cell["ratio"].where(inside).values
    sigma = _sigma(cell)[steps]
    ratio_low, ratio_high = _interval(lambda i: np.nanmedian(ratios[i], axis=(1, 2)), np.isfinite(ratios).any(1), seed)
    low, high = _interval(lambda i: np.nanmean(passed[i], axis=1), np.isfinite(passed), seed)
    return ChannelEntry(
        block=int(cell[BLOCK]),
        stream=stream,  # type: ignore[arg-type]
        channel=int(cell[CHANNEL]),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        persistence=float(np.nanmean(passed)),
        persistence_low=low,
        persistence_high=high,
        sign=signs.pop() if len(signs) == 1 else 0,  # type: ignore[arg-type]
        sigma_min=float(sigma.min()),
        sigma_max=float(sigma.max()),
        **median,
    )


def _interval(statistic: Callable, counts: Any, seed: int) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap interval of a statistic of sample indices (draw, sample) -> (draw,).

    `counts` says which samples have a value: a draw without any has no statistic. None for a single sample.
    """
    if len(counts) < 2:
        return None, None
    draws = np.random.default_rng(seed).integers(0, len(counts), (N_BOOT, len(counts)))
    draws = draws[counts[draws].any(axis=1)]
    size = max(1, 10**6 // len(counts))
    values = np.concatenate([statistic(draws[i : i + size]) for i in range(0, len(draws), size)])
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _sigma(cells: xr.Dataset) -> np.ndarray:
    return cells["sigma"].values if "sigma" in cells.coords else np.arange(cells.sizes[STEP], dtype=float)


def _means(tree: xr.DataTree, stream: str, entries: list[ChannelEntry]) -> list[dict[str, tuple[float | None, ...]]]:
    """Mean of h over samples for each entry: branch -> one number for each step, None where nothing was recorded."""
    if not entries:
        return []
    labels = {BLOCK: [e.block for e in entries], CHANNEL: [e.channel for e in entries]}
    where = {d: xr.DataArray(np.array(v, int), dims=ENTRY) for d, v in labels.items()}
    values = channel_means(tree, stream, where).mean(SAMPLE).compute().transpose(ENTRY, BRANCH, STEP)
    branches = [str(b) for b in values[BRANCH].values]
    return [
        {b: tuple(float(v) if np.isfinite(v) else None for v in row) for b, row in zip(branches, rows, strict=True)}
        for rows in values.values
    ]


def _evidence(cells: xr.Dataset, positional: Pairs, found: int) -> dict[str, Any]:
    names = {"largest_ratio": "ratio", "largest_at_coverage": "ratio_at_coverage"}
    filled = {k: cells[v].fillna(-1.0) for k, v in names.items()}
    seen = xr.Dataset(
        {k: v.max(CHANNEL) for k, v in filled.items()}
        | {f"{k}_channel": v.argmax(CHANNEL) for k, v in filled.items()}
        | {"recorded": cells["recorded"]}
    ).compute()
    details = _gather(cells, positional)
    evidence: dict[str, Any] = {k: _where(seen, k, cells) for k in names}
    evidence["positional"] = [
        {
            "block": int(cells[BLOCK][block]),
            "channel": int(cells[CHANNEL][channel]),
            "ratio": float(details["ratio"].isel({ENTRY: i}).median()),
            "constancy": float(details["constancy"].isel({ENTRY: i}).median()),
        }
        for i, (block, channel) in enumerate(positional)
    ]
    evidence["n_samples"] = int(seen["recorded"].any(STEP).sum())
    evidence["n_steps"] = int(seen["recorded"].any(SAMPLE).sum())
    evidence["n_found"] = found
    evidence["source"] = cells.attrs["source"]
    return evidence


def _where(seen: xr.Dataset, name: str, cells: xr.Dataset) -> dict[str, Any] | None:
    """The largest value seen and its place; None where no cell has a usable median."""
    values = seen[name].transpose(SAMPLE, STEP, BLOCK)
    index = np.unravel_index(int(values.values.argmax()), values.shape)
    at = {d: int(i) for d, i in zip((SAMPLE, STEP, BLOCK), index, strict=True)}
    if not float(values.isel(at)) >= 0:
        return None
    channel = int(seen[f"{name}_channel"].isel(at))
    place = {d: int(seen[d].isel({d: i})) if d in seen.coords else i for d, i in at.items()}
    sigma = float(_sigma(cells)[at[STEP]])
    return {"ratio": float(values.isel(at)), "channel": int(cells[CHANNEL][channel]), "sigma": sigma, **place}
