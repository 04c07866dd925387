"""The demo's own parts: samples with labels, conditions that differ where they should, and what it exports."""

from __future__ import annotations

import numpy as np
import pytest

import madit
from madit import zoo
from madit.workflows import conditions
from madit.workflows.conditions import BASELINE, Condition
from madit.workflows.demo import demo
from madit.zoo.classifiers import load_classifiers


@pytest.fixture(scope="module")
def control():
    return madit.DiT.from_pretrained("shapes-detail")


def test_samples_are_a_function_of_the_seed():
    one, two, other = (conditions.shapes_samples(6, seed) for seed in (0, 0, 1))
    assert one.prompts == two.prompts != other.prompts
    np.testing.assert_array_equal(one.real, two.real)


def test_judges_read_real_pictures():
    samples = conditions.shapes_samples(64)
    table = madit.evaluate(
        (255 * samples.real).round().astype(np.uint8), classifiers=load_classifiers(), labels=samples.labels
    )
    assert table.accuracy.sel(factor="texture") > 0.95
    assert table.accuracy.sel(factor="semantics") > 0.95


def test_a_picture_depends_on_its_seed_alone_and_not_on_its_batch(control):
    samples = conditions.shapes_samples(4, steps=2, guidance_scale=1.0, batch=4)
    together = conditions.generate(control, samples, Condition(BASELINE))
    apart = conditions.generate(
        control, conditions.shapes_samples(4, steps=2, guidance_scale=1.0, batch=1), Condition(BASELINE)
    )
    assert np.abs(together.astype(int) - apart.astype(int)).max() <= 1  # rounding to 8 bits


def test_the_control_loses_texture_and_keeps_its_controls(control):
    facts = zoo.facts("shapes-detail")
    channels = madit.ChannelSet.of({facts["planted_block"]: facts["channels"]}, len(control.blocks), control.width)
    samples = conditions.shapes_samples(16, seed=3, guidance_scale=1.0, steps=12)
    zero = Condition("zero", lambda: madit.intervene(control, channels, blocks=[facts["block"]]))
    frozen = Condition(
        "frozen", lambda: madit.intervene(control, channels, blocks=[facts["block"]], layernorm="frozen")
    )
    pictures = {c.name: conditions.generate(control, samples, c) for c in (Condition(BASELINE), zero, frozen)}
    table = conditions.tabulate(pictures, samples, load_classifiers())
    assert table.layout_ssim.attrs["long_name"] == "layout: SSIM with the baseline"
    texture = table.accuracy.sel(factor="texture")
    assert texture.sel(condition=BASELINE) - texture.sel(condition="zero") > 0.4
    assert abs(texture.sel(condition=BASELINE) - texture.sel(condition="frozen")) < 0.2
    assert table.high_band_power.sel(condition="zero") < 0.3 * table.high_band_power.sel(condition=BASELINE)


def test_demo_writes_what_it_says(tmp_path):
    said = []
    page = demo(tmp_path / "demo", models=("shapes-detail",), samples=4, say=said.append)
    folder = page.parent / "shapes-detail"
    facts = zoo.facts("shapes-detail")
    channels = madit.ChannelSet.load(folder / "channels.json")
    assert {(e.block, e.channel) for e in channels.entries} == {
        (block, channel) for block in range(facts["planted_block"], 6) for channel in facts["channels"]
    }
    config = madit.GuidanceConfig.load(folder / "dg.json")
    assert (config.block, list(config.channels)) == (facts["block"], facts["channels"])
    assert "minutes" in "".join(said[:3])
    assert "Constructed positive control" in page.read_text()
    rows = (folder / "metrics.md").read_text().splitlines()
    assert len(rows) == 2 + 11
    assert rows[3].startswith("| set to zero |")
    with np.load(folder / "pictures.npz") as pictures:
        assert pictures["baseline"].shape == (4, 32, 32, 3)
