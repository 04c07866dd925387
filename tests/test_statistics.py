"""Reductions over tokens against numpy and closed forms."""

from __future__ import annotations

import hooked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from madit.axes import QUANTILE_LEVELS
from madit.statistics import order, reduce_tokens, suspicious


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reductions_equal_numpys(dtype: torch.dtype) -> None:
    h = (torch.randn(2, 41, 7, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    got = reduce_tokens(h)
    for row in range(2):
        for name, truth in hooked.statistics(h[row].float()).items():
            assert got[name].dtype == torch.float32
            tolerance = 0 if name in ("max_abs", "abs_quantile", "median_abs") else 1e-5
            np.testing.assert_allclose(got[name][row].numpy(), truth, rtol=tolerance, atol=tolerance)


def test_squares_are_taken_in_float32() -> None:
    h = torch.full((1, 4, 1), 300.0, dtype=torch.float16)
    assert reduce_tokens(h)["mean_square"].item() == 90000.0  # above what float16 holds


def test_tokens_that_are_not_valid_do_not_count() -> None:
    h = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(9)[None] < torch.tensor([[4], [9]])
    spoiled = torch.where(valid[..., None], h, torch.tensor(1e9))
    got = reduce_tokens(spoiled, valid)
    for row, n in enumerate((4, 9)):
        alone = reduce_tokens(h[row : row + 1, :n])
        for name, value in alone.items():
            torch.testing.assert_close(got[name][row], value[0])
    spoiled[0, 5] = float("nan")
    assert torch.isfinite(reduce_tokens(spoiled, valid)["mean"]).all()


def test_a_row_without_valid_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one valid token"):
        reduce_tokens(torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.bool))


def test_levels_answer_a_share_of_the_tokens_exceeds() -> None:
    """A share q exceeds a cut exactly where the order statistic at 1 - q does (method, Locate)."""
    h = torch.arange(1, 101, dtype=torch.float32).reshape(1, 100, 1)
    quantiles = reduce_tokens(h)["abs_quantile"][0, :, 0]
    for level, quantile in zip(QUANTILE_LEVELS, quantiles, strict=True):
        assert (h >= quantile).float().mean().item() == pytest.approx(1 - level)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 100), st.integers(1, 5000))
def test_the_index_is_the_floor_of_the_exact_product(percent: int, n: int) -> None:
    level = percent / 100
    assert order(level, n) == min(percent * n // 100, n - 1)


def test_without_levels_there_is_no_quantile() -> None:
    h = torch.randn(1, 5, 2)
    few, all_ = reduce_tokens(h, levels=()), reduce_tokens(h)
    assert "abs_quantile" not in few
    torch.testing.assert_close(few["median_abs"], all_["median_abs"])


def test_suspicious_rows() -> None:
    h = torch.zeros(4, 2, 2)
    h[1, 0, 1], h[2, 1, 0] = float("inf"), float("nan")
    h[3] = 65504.0
    assert suspicious(h).tolist() == [False, True, True, False]
    assert suspicious(h.half()).tolist() == [False, True, True, True]  # where diffusers clips
