"""Locate on synthetic runs: exactly the planted channels, never the decoys, and the same from raw values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import trees
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from madit import views
from madit.channels import ChannelSet
from madit.errors import CriterionError, StoreError
from madit.location import locate, profile, summary

SAMPLES, STEPS, BLOCKS, TOKENS, WIDTH = 10, 4, 3, 64, 24
CONSTANT, GROWING, NEGATIVE = 7, 11, 13
ONE_TOKEN, HALF_TOKENS, ONE_PROMPT, FEW_STEPS, POSITIONAL, TEXT_ONLY = 2, 3, 4, 5, 6, 8


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image and text activations with massive channels and every decoy."""
    rng = np.random.default_rng(seed)
    img = trees.noise(rng, SAMPLES, STEPS, 1, BLOCKS, TOKENS, WIDTH)
    txt = trees.noise(rng, SAMPLES, STEPS, 1, BLOCKS, 16, WIDTH)
    img[..., 1:, :, CONSTANT] += 200
    img[..., 2, :, GROWING] += 100 * np.arange(STEPS).reshape(1, -1, 1, 1)  # 0, 100, 200, 300 over the steps
    img[..., 1:, :, NEGATIVE] -= 150
    img[..., 1:, 5, ONE_TOKEN] = 1e5
    img[..., 1:, ::2, HALF_TOKENS] += 400
    img[0, ..., 1:, :, ONE_PROMPT] += 400
    img[:, 0, :, 1:, :, FEW_STEPS] += 400
    img[..., 1:, :, POSITIONAL] += 300 * np.where(np.arange(TOKENS) % 2, 1.0, -1.0)
    txt[..., 1:, :, TEXT_ONLY] += 400
    return img, txt


@pytest.fixture(scope="module")
def both() -> xr.DataTree:
    return trees.run_tree(*planted())


def found(channels: ChannelSet) -> dict[int, tuple[int, ...]]:
    return {b: channels.at(b) for b in channels.blocks()}


EXPECTED = {1: (CONSTANT, NEGATIVE), 2: (CONSTANT, GROWING, NEGATIVE)}


def test_exactly_the_planted_channels(both):
    assert found(locate(both)) == EXPECTED


@pytest.mark.parametrize("values", ["statistics", "raw"])
def test_statistics_and_raw_values_give_the_same_answer(both, values):
    of_both = locate(both)
    alone = locate(trees.run_tree(*planted(), values=values))
    assert alone.evidence["source"] == {"statistics": "statistics", "raw": "activations"}[values]
    assert found(alone) == EXPECTED
    for left, right in zip(of_both.entries, alone.entries, strict=True):
        assert left.means.keys() == right.means.keys()
        np.testing.assert_allclose(left.means["cond"], right.means["cond"], rtol=1e-5)
        for name in ("ratio", "ratio_low", "ratio_high", "magnitude", "persistence", "coverage", "sigma_min", "sign"):
            assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-5)


def test_evidence_of_an_entry_is_what_the_raw_values_say(both):
    img, _ = planted()
    h = img[:, :, 0, 2, :, GROWING].astype(np.float64)
    median = np.sort(np.abs(img[:, :, 0, 2].reshape(SAMPLES, STEPS, -1)), axis=-1)[..., TOKENS * WIDTH // 2]
    entry = next(e for e in locate(both).entries if (e.block, e.channel) == (2, GROWING))
    steps = [1, 2, 3]  # at step 0 it is ordinary
    ratio = np.abs(h).mean(-1) / median
    assert entry.ratio == pytest.approx(np.median(ratio[:, steps]), rel=1e-5)
    assert entry.magnitude == pytest.approx(np.median(np.abs(h).mean(-1)[:, steps]), rel=1e-5)
    constancy = np.abs(h.mean(-1)) / h.std(-1)
    assert entry.constancy == pytest.approx(np.median(constancy[:, steps]), rel=1e-2)
    assert (entry.sign, entry.persistence) == (1, 1.0)
    assert entry.means["cond"] == pytest.approx(h.mean((0, 2)), rel=1e-4, abs=1e-4)
    sigma = both["/statistics/img"].sigma.values
    assert (entry.sigma_max, entry.sigma_min) == (sigma[1], sigma[3])
    assert entry.ratio_low < entry.ratio < entry.ratio_high
    assert {e.sign for e in locate(both).entries if e.channel == NEGATIVE} == {-1}


def test_evidence_of_the_run(both):
    channels = locate(both)
    evidence = channels.evidence
    positional = {(p["block"], p["channel"]) for p in evidence["positional"]}
    assert {(1, POSITIONAL), (2, POSITIONAL)} <= positional
    assert positional <= {(b, c) for b in (1, 2) for c in (POSITIONAL, ONE_TOKEN, HALF_TOKENS)}
    assert all(p["constancy"] < 1 for p in evidence["positional"])
    assert (evidence["n_samples"], evidence["n_steps"], evidence["n_found"]) == (SAMPLES, STEPS, 5)
    stored = both["/statistics/img"].to_dataset()
    ratio = stored.mean_abs / stored.median_abs
    largest = evidence["largest_ratio"]
    assert largest["ratio"] == pytest.approx(float(ratio.max()))
    place = {d: largest[d] for d in ("sample", "step", "block", "channel")}
    assert float(ratio.isel(branch=0).sel(place)) == pytest.approx(largest["ratio"])
    assert largest["channel"] == ONE_TOKEN  # a mean is moved by one giant token, the share of tokens is not
    assert evidence["largest_at_coverage"]["channel"] in (ONE_PROMPT, FEW_STEPS)
    assert channels.model.config_hash == "c" * 64
    assert (channels.n_blocks, channels.width, len(channels.sigma)) == (BLOCKS, WIDTH, STEPS)
    assert channels.criterion["ratio"] == 100.0


def test_text_stream_is_its_own(both):
    channels = locate(both, stream="txt")
    assert {(e.block, e.channel, e.stream) for e in channels.entries} == {(b, TEXT_ONLY, "txt") for b in (1, 2)}


def test_round_trip_and_dataset(both, tmp_path):
    channels = locate(both)
    assert ChannelSet.load(channels.save(tmp_path / "channels.json")) == channels
    assert channels.to_dataset().channel.values.tolist() == [7, 13, 7, 11, 13]


def test_nothing_found_is_said_plainly(both):
    channels = locate(both, ratio=5000)
    assert len(channels) == 0
    assert channels.evidence["n_found"] == 0
    text = summary(channels)
    assert "no massive channel at ratio 5000" in text
    largest = channels.evidence["largest_at_coverage"]
    assert f"{largest['ratio']:.3g} (block {largest['block']}, channel {largest['channel']}" in text


def test_summary_names_what_was_found(both):
    lines = summary(locate(both)).splitlines()
    assert lines[0].startswith(f"block 1: {CONSTANT} (ratio ")
    assert f"{POSITIONAL} at block 1" in lines[-1]


def test_step_share_decides_on_channels_massive_at_some_steps(both):
    quarter = locate(both, step_share=0.25)
    assert quarter.at(1) == (FEW_STEPS, CONSTANT, NEGATIVE)
    few = next(e for e in quarter.entries if e.channel == FEW_STEPS)
    assert few.sigma_min == few.sigma_max == 1.0
    assert locate(both, step_share=1.0).at(2) == (CONSTANT, NEGATIVE)


def test_persistence_and_coverage_decide_on_prompts_and_tokens(both):
    assert ONE_PROMPT in locate(both, persistence=0.1).at(1)
    assert ONE_PROMPT not in locate(both, persistence=0.11).at(1)
    assert HALF_TOKENS in locate(both, coverage=0.5).at(1)
    rare = next(e for e in locate(both, persistence=0.1).entries if e.channel == ONE_PROMPT)
    assert rare.persistence == pytest.approx(0.1)
    assert rare.persistence_low == 0.0
    assert 0.1 < rare.persistence_high < 0.5


def test_the_ratio_cut_is_exact():
    """|h| at 95 % of the tokens is exactly 100 medians: it reaches; the next float below does not."""
    h = np.ones((1, 1, 1, 1, 20, 8), np.float32)
    h[..., 1:, 3] = 100.0
    assert locate(trees.run_tree(h)).at(0) == (3,)
    h[..., 1, 3] = np.nextafter(np.float32(100), np.float32(0))
    assert locate(trees.run_tree(h)).at(0) == ()


def test_sun_criterion_asks_for_size_and_a_thousand_medians():
    rng = np.random.default_rng(0)
    h = trees.noise(rng, 3, 2, 1, 1, 64, 16) * 0.1  # median 0.067
    h[..., 1] += 150  # above 100, 2200 medians
    h[..., 2] += 90  # 1340 medians, but not above 100
    tree = trees.run_tree(h)
    assert locate(tree, criterion="sun").at(0) == (1,)
    assert locate(tree).at(0) == (1, 2)
    larger = trees.run_tree(h * 2)
    assert locate(larger, criterion="sun").at(0) == (1, 2)
    noisy = h.copy()
    noisy[..., 4:] *= 3  # 300 and 180 above 100, under a thousand medians
    assert locate(trees.run_tree(noisy * 2), criterion="sun").at(0) == ()
    assert locate(tree, criterion="sun").criterion["magnitude"] == 100.0


def test_top_k_is_marked_and_takes_no_positional_channel(both):
    img, _ = planted()
    img[..., 0, :, 20:] += 4  # block 0 has no massive channel, only four that lean to one side
    tree = trees.run_tree(img, values="statistics")
    channels = locate(tree, top_k=2)
    assert [len(channels.at(b)) for b in range(BLOCKS)] == [2, 2, 2]
    assert set(channels.at(0)) < {20, 21, 22, 23}
    assert channels.at(1) == (CONSTANT, NEGATIVE)
    assert channels.evidence["positional"] == locate(tree).evidence["positional"]
    assert channels.criterion["top_k"] == 2
    assert "asked for by name" in channels.criterion["note"]
    assert "asked for by name" in summary(channels)
    ordinary = [e for e in channels.entries if e.block == 0]
    assert [e.persistence for e in ordinary] == [0.0, 0.0]
    assert all(e.ratio < 8 for e in ordinary)
    assert locate(tree, top_k=WIDTH).at(0) == (20, 21, 22, 23)
    assert POSITIONAL not in locate(tree, top_k=WIDTH).at(1)


def test_coverage_that_no_stored_level_answers_names_the_levels():
    img, txt = planted()
    stored = trees.run_tree(img, txt, values="statistics")
    with pytest.raises(CriterionError, match=r"quantile levels 0.01, 0.05, 0.1, 0.25, 0.5 .*got 0.8;"):
        locate(stored, coverage=0.8)
    raw = locate(trees.run_tree(img, txt), coverage=0.8)
    assert raw.evidence["source"] == "activations"
    assert found(raw) == EXPECTED
    # 64 tokens: a share of 0.94 is the same token as level 0.05, once the store says how many tokens there are
    with pytest.raises(CriterionError, match=r"0\.94"):
        locate(stored, coverage=0.94)
    stored["/statistics/img"].attrs["tokens"] = TOKENS
    assert found(locate(stored, coverage=0.94)) == EXPECTED


def test_padded_text_counts_valid_tokens_only():
    rng = np.random.default_rng(3)
    img = trees.noise(rng, 4, 2, 1, 1, 16, 8)
    txt = trees.noise(rng, 4, 2, 1, 1, 30, 8)
    lengths = np.array([30, 20, 13, 7])
    valid = np.arange(30) < lengths[:, None]
    txt[..., 5] = 300
    txt[~np.broadcast_to(valid[:, None, None, None], txt.shape[:-1])] = 0  # padding would hide the channel
    for values in ("statistics", "raw"):
        tree = trees.run_tree(img, txt, txt_valid=valid, values=values)
        channels = locate(tree, stream="txt")
        assert channels.at(0, "txt") == (5,)
        assert channels.entries[0].means["cond"] == pytest.approx((300.0, 300.0))


def test_unwritten_cells_do_not_count():
    img, _ = planted()
    recorded = np.ones((SAMPLES, STEPS, 1), bool)
    recorded[6:] = False
    recorded[:, 3] = False
    for values in ("statistics", "raw"):
        channels = locate(trees.run_tree(img, recorded=recorded, values=values))
        assert found(channels) == EXPECTED
        assert (channels.evidence["n_samples"], channels.evidence["n_steps"]) == (6, 3)
        assert all(e.means["cond"][3] is None for e in channels.entries)
        assert next(e for e in channels.entries if e.channel == GROWING).sigma_min == channels.sigma[2]


def test_one_sample_has_no_interval():
    img, _ = planted()
    entry = locate(trees.run_tree(img[1:2])).entries[0]
    assert (entry.ratio_low, entry.persistence_high) == (None, None)
    assert entry.ratio > 100


def test_means_of_every_branch():
    img, _ = planted()
    img = np.concatenate([img, img + 1], axis=2)
    for values in ("statistics", "raw"):
        entry = locate(trees.run_tree(img, branches=("cond", "uncond"), values=values)).entries[0]
        assert entry.means["uncond"] == pytest.approx(np.array(entry.means["cond"]) + 1, rel=1e-5)
    uncond = locate(trees.run_tree(img, branches=("cond", "uncond")), branch="uncond")
    assert uncond.criterion["branch"] == "uncond"
    assert found(uncond) == EXPECTED


def test_lazy_trees_give_the_same_and_stay_lazy(both):
    for values in ("statistics", "raw"):
        tree = trees.run_tree(*planted(), values=values)
        lazy = tree.map_over_datasets(lambda data: data.chunk({"sample": 3, "step": 1}) if data.sizes else data)
        assert all(v.chunks for v in profile(lazy).data_vars.values() if v.name != "recorded")
        chunked, plain = locate(lazy), locate(tree)
        assert chunked == plain


def test_profile_matches_the_raw_values(both):
    img, _ = planted()
    cells = profile(both).compute()
    assert cells.ratio.dims == ("sample", "step", "block", "channel")
    sample, step, block, channel = 4, 2, 1, HALF_TOKENS
    h = img[sample, step, 0, block].astype(np.float64)
    cell = cells.isel(sample=sample, step=step, block=block, channel=channel)
    median = np.sort(np.abs(h), axis=None)[h.size // 2]
    assert float(cell.ratio) == pytest.approx(np.abs(h[:, channel]).mean() / median, rel=1e-5)
    assert float(cell.constancy) == pytest.approx(abs(h[:, channel].mean()) / h[:, channel].std(), rel=1e-4)
    assert float(cell.ratio_at_coverage) == pytest.approx(np.sort(np.abs(h[:, channel]))[3] / median, rel=1e-5)
    assert not bool(cell.passes)
    assert float(cell.coverage) == 0.5  # half of the tokens pass, and level 0.5 is stored
    assert float(cells.coverage.isel(sample=sample, step=step, block=block, channel=CONSTANT)) == 0.99


def test_blank_channels_have_constancy_zero_and_no_warning(recwarn):
    h = np.random.default_rng(0).normal(size=(2, 2, 1, 1, 16, 6)).astype(np.float32)
    h[..., 2] = 0.0
    lazy = trees.run_tree(h, values="statistics").map_over_datasets(lambda d: d.chunk() if d.sizes else d)
    cells = profile(lazy).compute()
    assert (cells.constancy.sel(channel=2) == 0).all()
    assert not cells.passes.any()
    assert not [str(w.message) for w in recwarn]


def test_blank_cells_are_not_massive():
    h = np.zeros((2, 2, 1, 1, 16, 4), np.float32)
    h[..., 0] = 5.0  # the median is 0: no ratio exists
    channels = locate(trees.run_tree(h))
    assert len(channels) == 0
    assert channels.evidence["n_samples"] == 0
    assert channels.evidence["largest_ratio"] is None
    assert "no massive channel" in summary(channels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, "expected a positive ratio, got 0"),
        ({"ratio": math.nan}, "expected a positive ratio, got nan"),
        ({"coverage": 0.0}, "expected coverage as a share"),
        ({"persistence": 1.5}, "expected persistence as a share"),
        ({"step_share": -0.1}, "expected step_share as a share"),
        ({"criterion": "largest"}, "expected criterion 'ratio' or 'sun', got 'largest'"),
        ({"top_k": 0}, "expected top_k of 1 or more"),
    ],
)
def test_parameters_that_make_no_sense(both, arguments, message):
    with pytest.raises(CriterionError, match=message):
        locate(both, **arguments)


def test_stores_that_cannot_be_located_in(both):
    with pytest.raises(StoreError, match=r"expected a branch of cond .*got 'uncond'"):
        locate(both, branch="uncond")
    with pytest.raises(StoreError, match="expected /statistics/txt in the store"):
        locate(trees.run_tree(planted()[0], values="statistics"), stream="txt")
    factorial = trees.factorial_tree(np.zeros((2, 2, 1, 4)), ("latent", "timestep"))
    with pytest.raises(StoreError, match="expected a run store, got a factorial store"):
        locate(factorial)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 5000), percent=st.integers(1, 100))
def test_level_and_coverage_are_the_same_order_statistic(n, percent):
    coverage = percent / 100
    index = views.coverage_index(coverage, n)
    need = -(-percent * n // 100)  # tokens that must exceed, in whole numbers
    assert n - index == need
    if percent < 100:
        assert views.order_index((100 - percent) / 100, n) == index
        assert views.stored_level([0.3, 1 - coverage, 0.9], coverage, None) in (0, 1, 2)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 40), coverage=st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.99, 1.0]))
def test_passing_means_that_a_share_of_the_tokens_exceeds(data, n, coverage):
    above = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    h = np.ones((1, 1, 1, 1, n, 5), np.float32)
    h[..., 2] = np.where(above, -100.0, 99.0)
    cells = profile(trees.run_tree(h, values="raw"), coverage=coverage)
    expected = 100 * sum(above) >= round(100 * coverage) * n
    assert bool(cells.passes.isel(sample=0, step=0, block=0, channel=2)) == expected


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_the_unit_and_the_order_of_samples_do_not_matter(seed, scale):
    rng = np.random.default_rng(seed)
    h = trees.noise(rng, 3, 2, 1, 2, 16, 6)
    channel, block = int(rng.integers(6)), int(rng.integers(2))
    h[:, :, :, block, :, channel] += 150 * rng.choice([-1, 1])
    plain = locate(trees.run_tree(h, values="statistics"), ratio=50)
    assert found(plain) == {block: (channel,)}
    scaled = locate(trees.run_tree((h[::-1] * np.float32(scale)).copy(), values="statistics"), ratio=50)
    assert found(scaled) == found(plain)
    assert scaled.entries[0].ratio == pytest.approx(plain.entries[0].ratio, rel=1e-4)


def test_the_largest_of_all_cells_is_found_on_any_axis():
    for sample, step, block, channel in itertools.product(range(2), repeat=4):
        h = np.ones((2, 2, 1, 2, 4, 9), np.float32)
        h[sample, step, 0, block, :, channel] = 30.0
        largest = locate(trees.run_tree(h, values="statistics")).evidence["largest_at_coverage"]
        assert {k: largest[k] for k in ("ratio", "sample", "step", "block", "channel")} == {
            "ratio": 30.0, "sample": sample, "step": step, "block": block, "channel": channel,
        }  # fmt: skip
