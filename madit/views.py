"""What the analysis reads of a run: one group, one branch, and token statistics whether stored or from raw values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import xarray as xr

from madit.axes import BLOCK, BRANCH, CHANNEL, QUANTILE, QUANTILE_LEVELS, SAMPLE, STATISTICS, STEP, TOKEN
from madit.channels import ChannelSet, ModelFingerprint
from madit.errors import CriterionError, StoreError


def as_tree(tree: xr.DataTree | str | Path) -> xr.DataTree:
    """A DataTree as it is; a store's path opened lazily."""
    if isinstance(tree, xr.DataTree):
        return tree
    from madit.store import open_run

    return open_run(tree)


def has(tree: xr.DataTree, path: str) -> bool:
    """Whether the store has a group at `path`; `in` looks at direct children only."""
    return path in tree.groups


def group(tree: xr.DataTree, path: str, hint: str = "") -> xr.Dataset:
    """The dataset at `path`; raises `StoreError` naming what the store has, with `hint` on what to do."""
    if not has(tree, path):
        held = ", ".join(sorted(node.path for node in tree.subtree if node.has_data)) or "nothing"
        raise StoreError(f"expected {path} in the store, it holds {held}{'; ' + hint if hint else ''}")
    return tree[path].to_dataset()


def expect_kind(tree: xr.DataTree, kind: str, hint: str) -> None:
    """Refuse a store of the other kind; one that does not say is taken at its word."""
    got = tree.attrs.get("kind", kind)
    if got != kind:
        raise StoreError(f"expected a {kind} store, got a {got} store; {hint}")


def on_branch(data: xr.Dataset, branch: str) -> xr.Dataset:
    """One branch of a run's group; raises `StoreError` naming those recorded."""
    branches = [str(b) for b in data[BRANCH].values]
    if branch not in branches:
        raise StoreError(f"expected a branch of {', '.join(branches)} (those recorded), got {branch!r}")
    return data.isel({BRANCH: branches.index(branch)})


def fingerprint(tree: xr.DataTree) -> ModelFingerprint | None:
    """Which model the store was recorded from, or None where it does not say."""
    model = tree.attrs.get("model")
    if not model:
        return None
    return ModelFingerprint.parse(json.loads(model) if isinstance(model, str) else model, source="the store")


def n_blocks(tree: xr.DataTree) -> int:
    """Number of blocks of the model: as the store says, else the highest block recorded + 1."""
    said = tree.attrs.get("n_blocks")
    if said is not None:
        return int(said)
    return 1 + max(int(node.coords[BLOCK].max()) for node in tree.subtree if BLOCK in node.coords)


def recorded(data: xr.Dataset) -> xr.DataArray:
    """Which cells were written: a missing value can read 0, so only this mask knows. All, where there is no mask."""
    if "recorded" in data:
        return data["recorded"].astype(bool)
    dims = [d for d in (SAMPLE, STEP, BRANCH) if d in data.sizes]
    return xr.DataArray(np.ones([data.sizes[d] for d in dims], bool), dims=dims)


def pairs(data: xr.Dataset, channels: ChannelSet, stream: str) -> tuple[list[tuple[int, int]], dict[str, xr.DataArray]]:
    """The (block, channel) pairs of a stream, and the labels over `entry` that select them in `data`."""
    chosen = [(e.block, e.channel) for e in channels.entries if e.stream == stream]
    missing = [(b, c) for b, c in chosen if b not in data.get_index(BLOCK) or c not in data.get_index(CHANNEL)]
    if missing:
        block, channel = missing[0]
        raise StoreError(
            f"expected block {block}, channel {channel} in the store, it holds {data.sizes[BLOCK]} blocks and "
            f"{data.sizes[CHANNEL]} channels of stream {stream}; record these, or select other channels"
        )
    at = np.array(chosen, int).reshape(-1, 2)
    return chosen, {BLOCK: xr.DataArray(at[:, 0], dims="entry"), CHANNEL: xr.DataArray(at[:, 1], dims="entry")}


def order_index(level: float, n: int) -> int:
    """The 0-based ascending order statistic of a quantile level, floor(p N), free of binary rounding.

    >>> order_index(0.05, 64)
    3
    """
    return min(math.floor(_exact(level) * n), n - 1)


def coverage_index(coverage: float, n: int) -> int:
    """The 0-based ascending order statistic that must pass for a share `coverage` of `n` tokens: N - ceil(q N).

    >>> coverage_index(0.95, 64)
    3
    """
    return n - math.ceil(_exact(coverage) * n)


def _exact(number: float) -> Fraction:
    return Fraction(repr(round(float(number), 9)))


def stored_level(levels: Iterable[float], coverage: float, n_tokens: Iterable[int] | None) -> int | None:
    """Position of the stored level that answers `coverage` exactly, or None.

    Level 1 - q is the order statistic N - ceil(q N) for every N; another level is, where both land on the same token
    for each of the token counts.
    """
    levels = [float(p) for p in levels]
    for i, p in enumerate(levels):
        if _exact(p) == 1 - _exact(coverage):
            return i
    counts = set(n_tokens or ())
    for i, p in enumerate(levels):
        if counts and all(order_index(p, n) == coverage_index(coverage, n) for n in counts):
            return i
    return None


def n_tokens(tree: xr.DataTree, stream: str) -> set[int] | None:
    """Counts of valid tokens that occur: the statistics' `n_tokens` / `tokens`, else from raw values, else None."""
    path = f"/statistics/{stream}"
    stored = tree[path].to_dataset() if has(tree, path) else xr.Dataset()
    for name in ("n_tokens", "tokens"):
        for source in (stored.variables, stored.attrs):
            if name in source:
                counts = np.asarray(source[name]).ravel()
                return {int(n) for n in counts[np.isfinite(counts)] if n > 0}
    path = f"/activations/{stream}"
    if has(tree, path):
        raw = tree[path].to_dataset()
        if "token_valid" not in raw:
            return {raw.sizes[TOKEN]}
        return {int(n) for n in raw["token_valid"].sum(TOKEN).values.ravel() if n > 0}
    return None


def token_statistics(tree: xr.DataTree, stream: str, branch: str, coverage: float) -> tuple[xr.Dataset, str]:
    """Statistics over tokens of one stream and branch, with `at_coverage`, the order statistic that `coverage` asks.

    Taken from `/statistics` where its levels answer the coverage, else computed lazily from raw `/activations`, which
    gives the same numbers.

    Returns:
        A lazy Dataset over (sample, step, block, channel) with the names of `axes.STATISTICS`, `median_abs`,
        `abs_quantile` (also over quantile), `at_coverage` and `recorded`; and its source.

    Raises:
        CriterionError: if neither answers the coverage, naming the stored levels.
        StoreError: if the store has nothing of this stream or branch.
    """
    stored, raw = f"/statistics/{stream}", f"/activations/{stream}"
    if not has(tree, stored) and has(tree, raw):
        return _from_raw(tree, stream, branch, coverage), "activations"
    data = group(tree, stored, "record with values='statistics', 'raw' or 'both' and this stream's resid_post")
    data = on_branch(data, branch)
    levels = data[QUANTILE].values
    level = stored_level(levels, coverage, n_tokens(tree, stream))
    if level is not None:
        data = data.assign(at_coverage=data["abs_quantile"].isel({QUANTILE: level}, drop=True), recorded=recorded(data))
        return data, "statistics"
    if has(tree, raw):
        return _from_raw(tree, stream, branch, coverage), "activations"
    named = ", ".join(f"{float(p):g}" for p in levels)
    answers = ", ".join(f"{1 - float(p):g}" for p in levels)
    raise CriterionError(
        f"expected a coverage that the stored quantile levels {named} answer (coverage {answers}), got {coverage:g}; "
        "ask for one of these, or record with values='raw'"
    )


def channel_means(tree: xr.DataTree, stream: str, where: dict[str, xr.DataArray]) -> xr.DataArray:
    """Mean of h over tokens at the labels `where`, for every branch: lazy, NaN where nothing was recorded."""
    if has(tree, f"/statistics/{stream}"):
        data = tree[f"/statistics/{stream}"].to_dataset()
        return data["mean"].sel(where).astype(np.float64).where(recorded(data))
    data = group(tree, f"/activations/{stream}")
    h = data["activation"].sel(where).astype(np.float64)
    h = h.where(data["token_valid"].astype(bool)) if "token_valid" in data else h
    return h.mean(TOKEN).where(recorded(data))


def _from_raw(tree: xr.DataTree, stream: str, branch: str, coverage: float) -> xr.Dataset:
    data = on_branch(group(tree, f"/activations/{stream}"), branch)
    mask = recorded(data)
    if "recorded" not in data and has(tree, f"/statistics/{stream}"):
        mask = recorded(on_branch(tree[f"/statistics/{stream}"].to_dataset(), branch))
    h = data["activation"]
    if h.chunks is not None:
        h = h.chunk({TOKEN: -1, CHANNEL: -1})
    everywhere = xr.DataArray(np.ones(h.sizes[TOKEN], bool), dims=TOKEN)
    valid = data["token_valid"].astype(bool) if "token_valid" in data else everywhere
    return _reduce(h, valid.reset_coords(drop=True), coverage).assign(recorded=mask)


def _reduce(h: xr.DataArray, valid: xr.DataArray, coverage: float) -> xr.Dataset:
    levels = np.array(QUANTILE_LEVELS)
    outputs = xr.apply_ufunc(
        reduce_tokens,
        h,
        valid,
        input_core_dims=[[TOKEN, CHANNEL], [TOKEN]],
        output_core_dims=[*[[CHANNEL]] * (len(STATISTICS) + 1), [QUANTILE, CHANNEL], []],
        kwargs={"coverage": coverage},
        dask="parallelized",
        output_dtypes=[np.float32] * (len(STATISTICS) + 3),
        dask_gufunc_kwargs={"output_sizes": {QUANTILE: len(levels)}},
    )
    names = (*STATISTICS, "at_coverage", "abs_quantile", "median_abs")
    return xr.Dataset(dict(zip(names, outputs, strict=True))).assign_coords({QUANTILE: levels})


def reduce_tokens(h: np.ndarray, valid: np.ndarray, coverage: float) -> tuple[np.ndarray, ...]:
    """Statistics over the valid tokens of `h` (..., token, channel); `valid` is (..., token).

    Returns:
        mean, mean_abs, mean_square, max_abs, at_coverage (..., channel), abs_quantile (..., quantile, channel) and
        median_abs (...), float32; NaN where no token is valid.
    """
    lead, (tokens, channels) = h.shape[:-2], h.shape[-2:]
    valid = np.broadcast_to(valid, h.shape[:-1]).reshape(-1, tokens)
    h = h.reshape(-1, tokens, channels)
    results: list[list[np.ndarray]] = [[] for _ in range(len(STATISTICS) + 3)]
    for cell, keep in zip(h, valid, strict=True):  # one cell at a time: a copy of a Flux block is 50 MB
        for result, value in zip(results, _reduce_cell(cell[keep], coverage), strict=True):
            result.append(value)
    return tuple(np.stack(r).astype(np.float32).reshape(lead + r[0].shape) for r in results)


def _reduce_cell(h: np.ndarray, coverage: float) -> list[np.ndarray]:
    n, channels = h.shape
    if n == 0:
        nothing = np.full(channels, np.nan)
        return [nothing] * 5 + [np.full((len(QUANTILE_LEVELS), channels), np.nan), np.array(np.nan)]
    size = np.abs(h)
    at = coverage_index(coverage, n)
    levels = [order_index(p, n) for p in QUANTILE_LEVELS]
    ordered = np.partition(size, sorted({at, *levels}), axis=0)
    wide = h.astype(np.float64)
    middle = order_index(0.5, size.size)
    median = np.partition(size.ravel(), middle)[middle]
    moments = [wide.mean(0), np.abs(wide).mean(0), np.square(wide).mean(0), size.max(0)]
    return [*moments, ordered[at], ordered[levels], np.asarray(median)]
