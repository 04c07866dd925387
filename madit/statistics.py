"""Reductions of a state over its tokens, made where the state lives, so that activations need not leave the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from madit.axes import QUANTILE_LEVELS

FP16_MAX = 65504.0
"""Where float16 ends, and where diffusers clips the residual stream in float16."""


def order(level: float, n: int) -> int:
    """Index of the ascending order statistic of `level` among `n` values: floor(p N), from 0, no interpolation.

    >>> order(0.05, 64), order(0.5, 4)
    (3, 2)
    """
    return min(math.floor(level * n + 1e-9), n - 1)  # 0.29 * 100 is 28.999...


def reduce_tokens(
    h: Float[Tensor, "row token channel"],
    valid: Bool[Tensor, "row token"] | None = None,
    levels: Sequence[float] = QUANTILE_LEVELS,
) -> dict[str, Tensor]:
    """Reduce a state over its tokens, in float32.

    mean = 1/N sum_n h[n], mean_abs = 1/N sum_n |h[n]|, mean_square = 1/N sum_n h[n]^2, max_abs = max_n |h[n]|, and
    abs_quantile at level p = the ascending order statistic floor(p N) of |h[n]|, all for each channel; median_abs =
    the order statistic floor(M / 2) of |h[n, c]| over all M values of tokens and channels.

    Args:
        h: residual state, an update or any (row, token, channel), in the unit of the residual stream.
        valid: tokens that count; all if None.
        levels: levels p in [0, 1); without any, `abs_quantile` is left out, and the sort that it needs.

    Returns:
        `mean mean_abs mean_square max_abs` (row, channel), `abs_quantile` (row, quantile, channel), `median_abs`
        (row), all float32 on the device of `h`. NaN among a channel's values makes its moments NaN.

    Raises:
        ValueError: if a row has no valid token.

    >>> h = torch.tensor([[[1.0, -4.0], [3.0, 4.0]]])
    >>> reduce_tokens(h)["mean"].tolist(), reduce_tokens(h)["max_abs"].tolist()
    ([[2.0, 0.0]], [[3.0, 4.0]])
    """
    x = h.detach().to(torch.float32)
    n = x.shape[1]
    if valid is None:
        counts = [n] * x.shape[0]
        magnitude = ordered = x.abs()
    else:
        counts = valid.sum(dim=1).tolist()
        keep = rearrange(valid, "row token -> row token 1")
        x = torch.where(keep, x, 0.0)
        magnitude = x.abs()
        ordered = torch.where(keep, magnitude, torch.inf)  # so that tokens that do not count sort last
    if not all(counts):
        raise ValueError("expected at least one valid token in each row, got a row without any")
    total = rearrange(torch.tensor(counts, dtype=torch.float32, device=x.device), "row -> row 1")
    reduced = {
        "mean": x.sum(dim=1) / total,
        "mean_abs": magnitude.sum(dim=1) / total,
        "mean_square": x.square().sum(dim=1) / total,
        "max_abs": magnitude.amax(dim=1),
        "median_abs": _median(ordered, counts),
    }
    if levels:
        ascending = ordered.sort(dim=1).values
        rows = [ascending[row, [order(p, count) for p in levels]] for row, count in enumerate(counts)]
        reduced["abs_quantile"] = torch.stack(rows)
    return reduced


def _median(ordered: Float[Tensor, "row token channel"], counts: list[int]) -> Float[Tensor, " row"]:
    flat = rearrange(ordered, "row token channel -> row (token channel)")
    width = ordered.shape[2]
    return torch.stack(
        [values.kthvalue(order(0.5, count * width) + 1).values for values, count in zip(flat, counts, strict=True)]
    )


def suspicious(h: Float[Tensor, "row ..."]) -> Bool[Tensor, " row"]:
    """Rows that hold a value which is not finite or, in float16, sits where the format ends or diffusers clips.

    >>> suspicious(torch.tensor([[1.0, float("nan")], [1.0, 2.0]])).tolist()
    [True, False]
    """
    flat = rearrange(h.detach(), "row ... -> row (...)")
    bad = ~flat.isfinite()
    if h.dtype == torch.float16:
        bad |= flat.abs() >= FP16_MAX
    return bad.any(dim=1)
