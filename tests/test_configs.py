from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from madit import ChannelSet, GuidanceConfig
from madit.channels import ChannelEntry, ModelFingerprint
from madit.configs import SCHEMA
from madit.errors import ConfigError, ModelMismatchError, ModelMismatchWarning

MODEL = ModelFingerprint(name="m", transformer="T", config_hash="a" * 64, weights_hash="b" * 64)
MASSIVE = ChannelSet(
    model=MODEL,
    n_blocks=6,
    width=32,
    sigma=(1.0, 0.5),
    criterion={"ratio": 100.0},
    entries=(
        ChannelEntry(block=3, channel=9, ratio=140.0, means={"cond": (4.0, 5.0), "uncond": (1.0, 2.0)}),
        ChannelEntry(block=3, channel=7, ratio=130.0, means={"cond": (6.0, None), "uncond": (1.0, 2.0)}),
        ChannelEntry(block=3, stream="txt", channel=7, means={"cond": (-6.0, -7.0)}),
        ChannelEntry(block=1, channel=11),
    ),
)


def test_from_channels_takes_what_enters_the_block():
    config = GuidanceConfig.from_channels(MASSIVE, block=4, scale=2.0, factor=0.5)
    assert (config.block, config.channels, config.scale, config.factor) == (4, (7, 9), 2.0, 0.5)
    assert (config.model, config.mode, config.means, config.steps) == (MODEL, "scale", (), None)
    assert [e["ratio"] for e in config.evidence["entries"]] == [130.0, 140.0]
    with pytest.raises(ConfigError, match=r"entering block 3, .* blocks with some: \[2, 4\]"):
        GuidanceConfig.from_channels(MASSIVE, block=3, scale=2.0)


def test_means_are_the_conditional_ones_in_the_order_of_channels():
    config = GuidanceConfig.from_channels(MASSIVE, block=4, scale=1.0, mode="mean")
    assert config.means == ((6.0, None), (4.0, 5.0))
    assert config.sigma == (1.0, 0.5)
    with pytest.raises(ConfigError, match="carries none"):
        GuidanceConfig.from_channels(MASSIVE, block=2, scale=1.0, mode="mean")


def test_tokens_from_a_mask_keep_their_grid():
    mask = np.zeros((2, 3), dtype=bool)
    mask[1, ::2] = True
    config = GuidanceConfig.from_channels(MASSIVE, block=4, scale=1.0, tokens=mask)
    assert (config.tokens, config.grid) == ((3, 5), (2, 3))
    assert GuidanceConfig.from_channels(MASSIVE, block=4, scale=1.0, tokens=[5, 3, 5]).tokens == (3, 5)
    with pytest.raises(ConfigError, match="mask or a list"):
        GuidanceConfig.from_channels(MASSIVE, block=4, scale=1.0, tokens=[0.5])
    with pytest.raises(ConfigError, match="at least one token"):
        GuidanceConfig.from_channels(MASSIVE, block=4, scale=1.0, tokens=np.zeros((2, 3), dtype=bool))


def test_round_trip_and_replace(tmp_path):
    config = GuidanceConfig.from_channels(MASSIVE, block=4, scale=0.1, mode="mean", steps=(0.2, 0.8), tokens=[1, 4])
    assert GuidanceConfig.load(config.save(tmp_path / "dg.json")) == config
    assert config.replace(scale=3.0).scale == 3.0
    with pytest.raises(ValidationError):
        config.scale = 3.0  # type: ignore[misc]


def test_scale_has_no_default():
    with pytest.raises(ValidationError, match="scale"):
        GuidanceConfig(block=4, channels=(7,))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "change",
    [
        {"block": 0},
        {"channels": []},
        {"channels": [3, 3]},
        {"channels": [-1]},
        {"scale": float("nan")},
        {"scale": "much"},
        {"factor": float("inf")},
        {"mode": "add"},
        {"mode": "mean"},
        {"mode": "mean", "sigma": [1.0], "means": [[None]]},
        {"mode": "mean", "sigma": [1.0, 0.5], "means": [[1.0]]},
        {"sigma": [1.0]},
        {"steps": [0.5, 0.5]},
        {"steps": [0.0, 20.0]},
        {"tokens": []},
        {"tokens": [4], "grid": [2, 2]},
        {"stream": "txt"},
        {"kind": "madit.channels"},
        {"format_version": 2},
        {"format_version": 0},
        {"surprise": 1},
        {"two\nlines": 1},
    ],
)
def test_malformed_documents_give_one_line(tmp_path, change):
    file = tmp_path / "dg.json"
    file.write_text(json.dumps({"block": 4, "channels": [7], "scale": 1.0, **change}))
    with pytest.raises(ConfigError) as error:
        GuidanceConfig.load(file)
    assert "\n" not in str(error.value)


def test_the_published_schema_is_current():
    assert json.loads(SCHEMA.read_text()) == GuidanceConfig.json_schema(), "run python -m madit.configs"
    assert GuidanceConfig.json_schema()["required"] == ["block", "channels", "scale"]


def test_another_architecture_is_refused_and_other_weights_warned_of():
    config = GuidanceConfig.from_channels(MASSIVE, block=4, scale=1.0)
    config.check(MODEL)
    with pytest.raises(ModelMismatchError):
        config.check(MODEL.replace(config_hash="c" * 64))
    with pytest.warns(ModelMismatchWarning):
        config.check(MODEL.replace(weights_hash="c" * 64))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.sampled_from(sorted(GuidanceConfig.model_fields)), JSON, max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=JSON | FIELDS | FIELDS.map(lambda d: {"block": 4, "channels": [7], "scale": 1.0, **d}))
def test_any_json_is_a_config_or_one_error(tmp_path, document):
    file = tmp_path / "any.json"
    file.write_text(json.dumps(document))
    try:
        config = GuidanceConfig.load(file)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert config.block >= 1
        assert config.channels


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64))
def test_any_bytes_are_a_config_or_one_error(tmp_path, content):
    file = tmp_path / "any.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        GuidanceConfig.load(file)
