"""Sobol indices against brute-force enumeration of closed forms on the same levels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import trees
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from madit.attribution import attribute, observational, sobol
from madit.channels import ChannelSet, ModelFingerprint
from madit.errors import ModelMismatchError, StoreError

FOUR = ("latent", "timestep", "pooled_text", "text_tokens")
LEVELS = {
    "latent": np.array([-1.0, 0.2, 0.9, 1.7, -0.4]),
    "timestep": np.array([1.0, 0.7, 0.4, 0.1]),
    "pooled_text": np.array([0.3, -1.1, 2.0]),
    "text_tokens": np.array([0.5, 1.5, -2.0]),
}
ONE = ChannelSet.of({0: [0]}, n_blocks=1, width=1)

CLOSED_FORMS = {
    "timestep only": lambda latent, timestep, pooled_text, text_tokens: 200 * (1 - timestep) ** 2,
    "pooled text only": lambda latent, timestep, pooled_text, text_tokens: 40 * np.exp(pooled_text),
    "latent only": lambda latent, timestep, pooled_text, text_tokens: np.sin(latent),
    "additive": lambda latent, timestep, pooled_text, text_tokens: (
        3 * latent + 10 * timestep - pooled_text + 0.5 * text_tokens**2
    ),
    "product": lambda latent, timestep, pooled_text, text_tokens: 100 * timestep * (2 + pooled_text),
    "pure interaction": lambda latent, timestep, pooled_text, text_tokens: (
        (timestep - LEVELS["timestep"].mean()) * (latent - LEVELS["latent"].mean())
    ),
    "all four": lambda latent, timestep, pooled_text, text_tokens: (
        np.exp(latent * timestep) + pooled_text * text_tokens * timestep + np.cos(3 * latent + text_tokens)
    ),
}


def enumerate_indices(function, levels, factor):
    """S and T of one factor, straight from the definitions: loops over all cells, no array operation."""
    names = list(levels)

    def value(cell):
        return float(function(**cell))

    def mean(numbers):
        numbers = list(numbers)
        return sum(numbers) / len(numbers)

    def variance(numbers):
        numbers = list(numbers)
        centre = mean(numbers)
        return mean((n - centre) ** 2 for n in numbers)

    def cells(fixed):
        free = [n for n in names if n not in fixed]
        for combination in itertools.product(*(levels[n] for n in free)):
            yield {**fixed, **dict(zip(free, combination, strict=True))}

    whole = variance(value(c) for c in cells({}))
    first = variance(mean(value(c) for c in cells({factor: level})) for level in levels[factor])
    rest = {n: v for n, v in levels.items() if n != factor}
    total = mean(
        variance(value(c) for c in cells(dict(zip(rest, combination, strict=True))))
        for combination in itertools.product(*rest.values())
    )
    return first / whole, total / whole, whole


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_indices_equal_brute_force_enumeration(name):
    function = CLOSED_FORMS[name]
    effects = attribute(trees.factorial_of(function, LEVELS), ONE, n_boot=0).sel(block=0, channel=0)
    for factor in FOUR:
        first, total, variance = enumerate_indices(function, LEVELS, factor)
        got = effects.sel(factor=factor)
        assert float(got.first_order) == pytest.approx(first, abs=1e-12)
        assert float(got.total) == pytest.approx(total, abs=1e-12)
        assert float(got.variance) == pytest.approx(variance, rel=1e-12)


def test_known_shares_of_one_driver_and_of_an_interaction():
    timestep = attribute(trees.factorial_of(CLOSED_FORMS["timestep only"], LEVELS), ONE).sel(block=0, channel=0)
    assert timestep.first_order.values == pytest.approx([0, 1, 0, 0], abs=1e-12)
    assert timestep.total.values == pytest.approx([0, 1, 0, 0], abs=1e-12)
    assert timestep.first_order_low.sel(factor="timestep") == pytest.approx(1)
    crossed = attribute(trees.factorial_of(CLOSED_FORMS["pure interaction"], LEVELS), ONE).sel(block=0, channel=0)
    assert crossed.first_order.values == pytest.approx([0, 0, 0, 0], abs=1e-12)
    assert crossed.total.values == pytest.approx([1, 1, 0, 0], abs=1e-12)


def test_flux_has_guidance_and_a_factor_that_is_lacking_is_left_out():
    levels = {"latent": np.arange(3.0), "timestep": np.arange(2.0), "guidance": np.array([1.0, 3.5, 7.0])}
    effects = attribute(trees.factorial_of(lambda latent, timestep, guidance: latent + 2 * guidance, levels), ONE)
    assert effects.factor.values.tolist() == ["latent", "timestep", "guidance"]
    spread = {k: np.var(v) for k, v in levels.items()}
    share = 4 * spread["guidance"] / (4 * spread["guidance"] + spread["latent"])
    assert float(effects.first_order.sel(block=0, channel=0, factor="guidance")) == pytest.approx(share)


def test_a_constant_channel_is_flagged_and_has_no_indices():
    tree = trees.factorial_of(lambda latent, timestep, pooled_text, text_tokens: 200 + 1e-4 * latent, LEVELS)
    effects = attribute(tree, ONE, n_boot=20).sel(block=0, channel=0)
    assert bool(effects.constant)
    assert float(effects.variance) == pytest.approx(1e-8 * np.var(LEVELS["latent"]), rel=1e-3)
    for name in ("first_order", "total", "first_order_low", "total_high"):
        assert effects[name].isnull().all()
    lowered = attribute(tree, ONE, n_boot=0, floor=1e-12).sel(block=0, channel=0)
    assert not bool(lowered.constant)
    assert float(lowered.first_order.sel(factor="latent")) == pytest.approx(1, abs=1e-6)


def test_variance_is_in_squared_medians_of_the_block():
    rng = np.random.default_rng(0)
    h = trees.noise(rng, 3, 4, 2, 2, 1, 16, 8) * 5
    h[..., 3] += 1000 * np.array([0.0, 1.0, 2.0, 3.0])[:, None, None, None, None]
    effects = attribute(trees.factorial_tree(h), ChannelSet.of({0: [3]}, 1, 8), n_boot=0).sel(block=0, channel=3)
    ordinary = np.median(np.abs(h), axis=(-1, -2))
    y = h[..., 3].astype(np.float64).mean(-1)
    assert float(effects.variance) == pytest.approx(np.var(y) / np.median(ordinary) ** 2, rel=0.02)
    assert float(effects.first_order.sel(factor="timestep")) > 0.999


def test_signed_mean_is_the_target_and_the_magnitude_stands_beside_it():
    def flips(latent, timestep, pooled_text, text_tokens):
        return np.where(latent > 0, 1.0, -1.0) * (10 + timestep)

    effects = attribute(trees.factorial_of(flips, LEVELS), ONE, n_boot=0).sel(block=0, channel=0)
    assert float(effects.total.sel(factor="latent")) > 0.99
    assert float(effects.first_order_mean_abs.sel(factor="timestep")) == pytest.approx(1)
    assert float(effects.total_mean_abs.sel(factor="latent")) == pytest.approx(0, abs=1e-12)
    assert float(effects.level_mean_abs) == pytest.approx(10 + LEVELS["timestep"].mean())


def test_nan_exactly_where_a_pair_is_not_in_channels():
    rng = np.random.default_rng(1)
    tree = trees.factorial_tree(rng.normal(size=(3, 2, 2, 2, 4, 6)))
    channels = ChannelSet.of({1: [2, 5], 3: [5]}, n_blocks=4, width=6)
    effects = attribute(tree, channels, n_boot=5)
    assert effects.first_order.dims == ("block", "channel", "factor")
    assert effects.block.values.tolist() == [0, 1, 2, 3]
    held = {(int(b), int(c)) for b in effects.block for c in effects.channel
            if effects.total.sel(block=b, channel=c).notnull().all()}  # fmt: skip
    assert held == {(1, 2), (1, 5), (3, 5)}
    assert int(effects.total.notnull().sum()) == 3 * len(FOUR)
    y = tree["/statistics/img"]["mean"].sel(block=3, channel=5).values
    assert float(effects.variance.sel(block=3, channel=5)) == pytest.approx(np.var(y))


def test_no_channels_give_an_empty_table():
    empty = ChannelSet.of({}, n_blocks=1, width=1)
    effects = attribute(trees.factorial_of(CLOSED_FORMS["additive"], LEVELS), empty, n_boot=3)
    assert effects.first_order.shape == (1, 0, 4)
    assert observational(planted_run(), ChannelSet.of({}, 1, 2)).step_share.shape == (1, 0)


def test_bounds_resample_levels_and_not_cells():
    # The latent has two levels: a draw holds one of them (no variance from it) or both.
    levels = {**LEVELS, "latent": np.array([0.0, 1.0])}
    tree = trees.factorial_of(lambda latent, timestep, pooled_text, text_tokens: latent + timestep, levels)
    effects = attribute(tree, ONE, n_boot=400, seed=3).sel(block=0, channel=0, factor="latent")
    share = 0.25 / (0.25 + np.var(levels["timestep"]))
    assert float(effects.first_order) == pytest.approx(share)
    assert float(effects.first_order_low) == pytest.approx(0, abs=1e-12)
    assert float(effects.first_order_high) == pytest.approx(share)


def test_timestep_levels_are_not_resampled():
    tree = trees.factorial_of(lambda latent, timestep, pooled_text, text_tokens: timestep + 0 * latent, LEVELS)
    h = tree["/statistics/img"]["mean"].values
    effects = attribute(trees.factorial_tree(h), ONE, n_boot=50).sel(block=0, channel=0, factor="timestep")
    assert float(effects.total_low) == pytest.approx(1)
    assert float(effects.total_high) == pytest.approx(1)


def test_bounds_hold_the_point_and_mostly_the_long_run_share():
    """Latent effects drawn from a normal: the long-run share of the latent is 1 / (1 + Var(timestep))."""
    timestep = np.array([-1.0, 0.0, 1.0])
    truth = 1 / (1 + np.var(timestep))
    seeds = range(30)
    drawn = np.stack([np.random.default_rng(seed).normal(size=24) for seed in seeds])
    h = drawn[:, None] + timestep[None, :, None]  # each channel is an experiment of its own
    channels = ChannelSet.of({0: seeds}, n_blocks=1, width=len(seeds))
    tree = trees.factorial_tree(h.transpose(2, 1, 0)[:, :, None], ("latent", "timestep"))
    got = attribute(tree, channels, n_boot=300).sel(block=0, factor="latent")
    low, point, high = (got[f"first_order{suffix}"].values for suffix in ("_low", "", "_high"))
    assert ((low < point) & (point < high)).all()
    assert 0.7 < np.mean((low <= truth) & (truth <= high)) < 1


def test_bounds_equal_those_of_tables_rebuilt_from_drawn_levels():
    rng = np.random.default_rng(11)
    y = rng.normal(size=(4, 3, 3, 2))
    got = attribute(trees.factorial_tree(y[..., None, None]), ONE, n_boot=400, seed=0).sel(block=0, channel=0)
    shares = []
    for _ in range(400):
        index = [rng.integers(0, n, n) if i != 1 else np.arange(n) for i, n in enumerate(y.shape)]
        table = y[np.ix_(*index)]
        means = [table.mean(axis=tuple(j for j in range(4) if j != i)) for i in range(4)]
        shares.append([m.var() / table.var() for m in means])
    low, high = np.percentile(shares, [2.5, 97.5], axis=0)
    np.testing.assert_allclose(got.first_order_low, low, atol=0.06)  # two sets of 400 draws
    np.testing.assert_allclose(got.first_order_high, high, atol=0.06)


def test_bounds_are_seeded():
    tree = trees.factorial_of(CLOSED_FORMS["all four"], LEVELS)
    again = [attribute(tree, ONE, n_boot=30, seed=s) for s in (1, 1, 2)]
    assert again[0].identical(again[1])
    assert not again[0].total_low.equals(again[2].total_low)


def test_levels_and_design_are_kept():
    tree = trees.factorial_tree(np.random.default_rng(0).normal(size=(2, 3, 2, 2, 1, 1)), design="label")
    effects = attribute(tree, ONE, n_boot=0)
    assert effects.attrs["design"] == "label"
    assert "sigma" in effects.attrs["off_manifold"]
    assert effects.attrs["levels"] == {"latent": 2, "timestep": 3, "pooled_text": 2, "text_tokens": 2}
    assert effects.attrs["coordinates"]["sigma"] == pytest.approx([1.0, 0.55, 0.1])
    assert effects.attrs["coordinates"]["sigma_gap"] == pytest.approx([0.5, 0.05, 0.4])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    seed=st.integers(0, 2**31),
    offset=st.floats(-1e4, 1e4),
    scale=st.floats(0.1, 100),
)
def test_properties_of_the_decomposition(shape, seed, offset, scale):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(*shape, 3))
    weights = [rng.dirichlet(np.ones(n)) for n in shape]
    first, total, variance = sobol(y, weights)
    whole = np.maximum(variance, 1e-300)
    assert (first[:, variance > 0] <= total[:, variance > 0] + 1e-9).all()
    assert (first[:, variance > 0].sum(0) <= 1 + 1e-9).all()
    assert (total[:, variance > 0].sum(0) >= 1 - 1e-9).all()
    again = sobol(scale * y + offset, weights)  # indices don't depend on unit or origin
    np.testing.assert_allclose(again[0], first, atol=1e-6)
    np.testing.assert_allclose(again[2] / scale**2, whole, rtol=1e-6, atol=1e-9)
    for i, n in enumerate(shape):
        if n == 1:
            assert np.nan_to_num(total[i]).max() < 1e-9


def test_weighted_indices_equal_those_of_repeated_levels():
    rng = np.random.default_rng(5)
    y = rng.normal(size=(3, 2, 4, 1))
    index = [np.array([0, 0, 2]), np.array([0, 1]), np.array([3, 1, 1, 1])]
    weights = [np.bincount(i, minlength=n) / len(i) for i, n in zip(index, y.shape, strict=False)]
    repeated = y[np.ix_(*index)]
    plain = sobol(repeated, [np.full(n, 1 / n) for n in repeated.shape[:-1]])
    for weighted, expected in zip(sobol(y, weights), plain, strict=True):
        np.testing.assert_allclose(weighted, expected, atol=1e-12)


def planted_run(samples: int = 6, spread: float = 0.5) -> xr.DataTree:
    """Channel 0: step + spread * sample, tokens all alike; channel 1 ordinary."""
    steps = np.arange(4.0)
    h = np.empty((samples, 4, 1, 1, 8, 2), np.float32)
    h[..., 0] = (steps[None] + spread * np.arange(samples)[:, None])[:, :, None, None, None]
    h[..., 1] = 1.0
    return trees.run_tree(h, values="statistics")


def test_observational_splits_the_variance_of_a_run():
    tree = planted_run()
    table = observational(tree, ChannelSet.of({0: [0]}, 1, 2)).sel(block=0, channel=0)
    median = float(tree["/statistics/img"]["median_abs"].median())
    between, within = np.var(np.arange(4.0)), np.var(0.5 * np.arange(6))
    assert float(table.between_steps) == pytest.approx(between / median**2)
    assert float(table.within_step) == pytest.approx(within / median**2)
    assert float(table.step_share) == pytest.approx(between / (between + within))
    assert float(table.step_share_low) < float(table.step_share) < float(table.step_share_high)
    assert table.attrs["label"] == "observational"


def test_observational_leaves_out_unfinished_samples_and_flags_constants():
    tree = planted_run()
    mask = tree["/statistics/img"]["recorded"].values
    mask[4:, 3] = False
    table = observational(tree, ChannelSet.of({0: [0, 1]}, 1, 2)).sel(block=0)
    assert table.attrs["n_samples"] == 4
    within = np.var(0.5 * np.arange(4))
    share = np.var(np.arange(4.0)) / (np.var(np.arange(4.0)) + within)
    assert float(table.step_share.sel(channel=0)) == pytest.approx(share)
    assert table.constant.values.tolist() == [False, True]
    single = observational(planted_run(1), ChannelSet.of({0: [0]}, 1, 2)).sel(block=0, channel=0)
    assert float(single.step_share) == pytest.approx(1)
    assert bool(single.step_share_low.isnull())


def test_refusals_say_what_to_do():
    run, factorial = planted_run(), trees.factorial_of(CLOSED_FORMS["additive"], LEVELS)
    with pytest.raises(StoreError, match="expected a factorial store, got a run store"):
        attribute(run, ONE)
    with pytest.raises(StoreError, match="expected a run store, got a factorial store"):
        observational(factorial, ONE)
    with pytest.raises(StoreError, match="expected block 0, channel 9 in the store"):
        attribute(factorial, ChannelSet.of({0: [9]}, 1, 10))
    with pytest.raises(StoreError, match="/statistics/txt"):
        attribute(factorial, ONE, stream="txt")
    other = ONE.replace(model=ModelFingerprint(transformer="Other", config_hash="x" * 64))
    with pytest.raises(ModelMismatchError, match="another architecture"):
        attribute(factorial, other)
    unfinished = factorial.copy(deep=True)
    unfinished["/statistics/img"]["mean"][2] = np.nan
    with pytest.raises(StoreError, match="finite mean in every cell"):
        attribute(unfinished, ONE)
