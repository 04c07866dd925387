"""Locate and attribute on planted pipelines: exactly the planted channels, and exactly their known shares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import madit
from madit.axes import FACTORS
from madit.zoo.planting import plant
from tests.conformance.planted import (
    FAMILIES,
    PIPE_KWARGS,
    PROMPTS,
    factors,
    forward_inputs,
    in_one_prompt,
    n_blocks,
    spot,
    states,
)

# driver, channels, signs, block, further arguments of `plant`: all of them live in one model
PLANTED = [
    ("constant", (2, 3), (1, -1), 1, {}),
    ("timestep", (5,), (1,), 2, {}),
    ("pooled_text", (7,), (-1,), 1, {}),
    ("both", (9,), (1,), 1, {}),
    ("both", (10,), (1,), 3, {"interaction": 0.6}),
    ("latent", (12,), (-1,), 0, {}),
    ("text_tokens", (14,), (1,), 0, {}),
]
GUIDED = [("guidance", (15,), (1,), 1, {})]
ONE_TOKEN, HALF, ONE_PROMPT, TEXT = 23, 27, 31, 35
LEVELS = {"latent": 2, "timestep": 3, "pooled_text": 4, "text_tokens": 2, "guidance": 2}
DESIGNS = {"sd3": "matched", "sd35": "label", "flux": "matched"}
WIDTH = 48


def build(family):
    """A pipeline of the family with everything planted, and the plantings."""
    pipeline = FAMILIES[family](heads=WIDTH // 16)
    settings = {"magnitude": 600.0, "prompts": PROMPTS, "max_sequence_length": 8}
    return pipeline, [
        plant(pipeline, channels, block, driver=driver, signs=signs, **settings, **more)
        for driver, channels, signs, block, more in PLANTED + (GUIDED if family == "flux" else [])
    ]


def add_decoys(pipeline, size=600.0):
    """Large, but not massive image channels: see each one's own docstring."""
    plant(pipeline, [TEXT], 1, size, stream="txt")
    in_one_prompt(pipeline, ONE_PROMPT, 1, which=2, magnitude=size)
    spot(pipeline, ONE_TOKEN, 1, 10 * size)
    spot(pipeline, HALF, 32, size)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoys_are_what_they_are_called(family):
    pipeline = FAMILIES[family](heads=WIDTH // 16)
    add_decoys(pipeline)
    inputs = forward_inputs(pipeline, batch=4)
    image, text = (states(pipeline, inputs, stream)[1] for stream in ("img", "txt"))
    large = image.abs() > 100 * image.abs().flatten(1).median(1).values[:, None, None]
    share = large.float().mean(1)  # of the tokens, (prompt, channel)
    assert_allclose(share[:, ONE_TOKEN], 1 / 64)
    assert_allclose(share[:, HALF], 0.5)
    assert_allclose(share[:, ONE_PROMPT], [0, 0, 1, 0])
    assert_allclose(share[:, TEXT], 0)
    assert (text[..., TEXT] > 100 * text.abs().median()).all()
    others = [c for c in range(WIDTH) if c not in (ONE_TOKEN, HALF, ONE_PROMPT)]
    assert share[:, others].max() == 0


def run(pipeline, path, **more):
    return madit.record(
        pipeline, PROMPTS, path, num_inference_steps=2, guidance_scale=1.0, batch_size=4, pipe_kwargs=PIPE_KWARGS,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_locate_finds_exactly_the_planted_channels(family, tmp_path):
    pipeline, plantings = build(family)
    add_decoys(pipeline)
    channels = madit.locate(run(pipeline, tmp_path / "run.zarr"))
    for block in range(n_blocks(pipeline)):
        assert set(channels.at(block)) == {c for p in plantings if p.block <= block for c in p.channels}, block
    signs = {c: sign for p in plantings for c, sign in zip(p.channels, p.signs, strict=True)}
    assert {e.channel: e.sign for e in channels.entries} == signs


@pytest.mark.parametrize("family", FAMILIES)
def test_locate_finds_nothing_where_there_are_only_decoys(family, tmp_path):
    pipeline = FAMILIES[family](heads=WIDTH // 16)
    add_decoys(pipeline)
    tree = run(pipeline, tmp_path / "run.zarr", sites=["blocks.*.img.resid_post", "blocks.*.txt.resid_post"])
    assert len(madit.locate(tree)) == 0
    assert set(madit.locate(tree, stream="txt").at(1, "txt")) == {TEXT}


def brute_force(y):
    """First-order and total Sobol indices of each factor by enumeration: loops over levels, no matrix algebra."""
    if np.ptp(y) == 0:
        return np.full(y.ndim, np.nan), np.full(y.ndim, np.nan)
    y = y.astype(np.float64)
    cells = list(itertools.product(*(range(n) for n in y.shape)))
    mean = sum(y[c] for c in cells) / len(cells)
    variance = sum((y[c] - mean) ** 2 for c in cells) / len(cells)
    first, total = [], []
    for i, n in enumerate(y.shape):
        given = [np.mean([y[c] for c in cells if c[i] == level]) for level in range(n)]
        first.append(np.mean([(g - mean) ** 2 for g in given]) / variance)
        rest = {c[:i] + c[i + 1 :] for c in cells}
        inner = [np.var([y[(*r[:i], level, *r[i:])] for level in range(n)]) for r in rest]
        total.append(np.mean(inner) / variance)
    return np.array(first), np.array(total)


def record_and_enumerate(pipeline, plantings, path, design):
    """A factorial recording, and the closed forms on every input that the transformer got meanwhile.

    Returns the store and the values (*levels of each factor, planted channel).
    """
    rows = []

    def keep(module, args, kwargs):
        if kwargs["hidden_states"].shape[0] == 4:  # cells of the design; runs that make the latents have one row
            given = factors(pipeline, kwargs)
            rows.append(torch.cat([p.value(**given).expand(4, -1) for p in plantings], 1))

    handle = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    tree = madit.record_factorial(
        pipeline, PROMPTS, path, design=design, levels=LEVELS, batch_size=4, num_inference_steps=3,
        guidance_scale=1.0, pipe_kwargs=PIPE_KWARGS,
    )  # fmt: skip
    handle.remove()
    sizes = [tree["statistics/img"].sizes[f] for f in FACTORS if f in tree["statistics/img"].dims]
    return tree, torch.cat(rows).reshape(*sizes, -1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_attribute_gives_the_known_shares(family, tmp_path):
    pipeline, plantings = build(family)
    design = DESIGNS[family]
    tree, y = record_and_enumerate(pipeline, plantings, tmp_path / "factorial.zarr", design)
    names = [f for f in FACTORS if f in tree["statistics/img"].dims]
    assert ("guidance" in names) == (family == "flux")
    n = n_blocks(pipeline)
    massive = {b: [c for p in plantings if p.block <= b for c in p.channels] for b in range(n)}
    effects = madit.attribute(tree, madit.ChannelSet.of(massive, n, WIDTH), n_boot=20)
    cases = [(p, c, more) for p, (*_, more) in zip(plantings, PLANTED + GUIDED, strict=False) for c in p.channels]
    for k, (planting, channel, more) in enumerate(cases):
        mean = tree["statistics/img/mean"].sel(channel=channel)
        first, total = brute_force(y[..., k])
        for block in range(planting.block, n):
            assert_allclose(mean.sel(block=block).transpose(*names), y[..., k], rtol=2e-5, atol=1e-3)
            at = effects.sel(block=block, channel=channel)
            assert bool(at["constant"]) == (planting.driver == "constant")
            assert_allclose(at["first_order"].sel(factor=names), first, atol=1e-4)
            assert_allclose(at["total"].sel(factor=names), total, atol=1e-4)
        if planting.driver != "constant":
            shares = {f: (first[i], total[i]) for i, f in enumerate(names)}
            assert_known(shares, planting.driver, design, more.get("interaction", 0))


def assert_known(shares, driver, design, interaction):
    """What the construction says of (first order, total) of each factor, whatever the levels."""
    drivers = {"both": ("timestep", "pooled_text")}.get(driver, (driver,))
    if driver == "latent" and design == "matched":  # z mixes x0 and eps by the cell's own sigma
        drivers = ("latent", "timestep")
    for factor, (first, total) in shares.items():
        if factor not in drivers:
            assert max(first, total) < 1e-6
    if len(drivers) == 1:
        assert_allclose(shares[driver], 1, atol=1e-6)
    if driver == "both":
        first, total = np.array([shares[d] for d in drivers]).T
        assert first.min() > 0.02
        gap = total - first
        assert (gap > 0.005).all() if interaction else (gap < 1e-6).all()
