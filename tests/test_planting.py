from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from madit.errors import ConfigError, SiteError, UnsupportedPipelineError
from madit.zoo import driving
from madit.zoo.planting import plant
from madit.zoo.small import small_flux, small_sd3
from tests.conformance.planted import FAMILIES, factors, forward_inputs, module, planted, states

CHANNELS, SIGNS = (5, 9), (1, -1)
CASES = [(f, d, 1) for f in FAMILIES for d in ("constant", "timestep", "pooled_text", "both")]
CASES += [("flux", d, 3) for d in ("constant", "timestep", "pooled_text", "both", "guidance")]
CASES += [(f, d, 0) for f in FAMILIES for d in ("latent", "text_tokens")] + [("flux", "guidance", 0)]
READS = {
    "constant": set(),
    "timestep": {"timestep"},
    "pooled_text": {"pooled_text"},
    "both": {"timestep", "pooled_text"},
    "guidance": {"guidance"},
    "latent": {"latent"},
    "text_tokens": {"text_tokens", "latent"},
}


@pytest.mark.parametrize(("family", "driver", "block"), CASES)
def test_the_closed_form_is_the_token_mean_at_every_later_block(family, driver, block):
    pipeline, planting = planted(family, driver, CHANNELS, block, signs=SIGNS)
    inputs = forward_inputs(pipeline)
    given = {k: v for k, v in factors(pipeline, inputs).items() if k in READS[driver]}
    expected = planting.value(**given).expand(3, 2)
    outputs = states(pipeline, inputs)
    for h in outputs[block:]:
        assert_close(h[..., CHANNELS].mean(1), expected, rtol=1e-5, atol=1e-3)
    if driver == "latent":
        assert outputs[0][..., 5].std(1).min() > 10  # follows each patch
    else:
        assert max(h[..., CHANNELS].std(1).max() for h in outputs) == 0
    for h in outputs[:block]:
        assert h[..., CHANNELS].abs().max() == 0
    spread = expected.std(0)
    assert (spread == 0).all() if driver == "constant" else (spread > 1).all()


@pytest.mark.parametrize(("driver", "name"), [("timestep", "timestep"), ("guidance", "guidance")])
def test_depth_is_the_reach_of_a_driver_over_its_range(driver, name):
    _, planting = planted("flux", driver, [4], 1, magnitude=100.0, depth=0.3)
    grid = {"timestep": torch.linspace(1, 1000, 256) / 1000, "guidance": torch.linspace(1.0, 10.0, 256)}[name]
    values = planting.value(**{name: grid})
    assert_close(values.max().item(), 130.0, rtol=1e-4, atol=0)
    assert_close(values.min().item(), 70.0, rtol=1e-4, atol=0)
    trend = torch.corrcoef(torch.stack([values[:, 0], grid]))[0, 1].item()
    assert abs(trend) > 0.8  # as well as 32 features can follow a ramp
    assert (trend > 0) == (driver == "guidance")


@pytest.mark.parametrize("interaction", [0.0, 0.6])
def test_both_is_additive_unless_told_to_interact(interaction):
    pipeline, planting = planted("sd3", "both", [4], 1, interaction=interaction)
    pooled = driving.encode(pipeline, driving.PROMPTS, 8)["pooled_text"]
    times = torch.linspace(1, 1000, 16)
    grid = planting.value(timestep=times.repeat_interleave(len(pooled)), pooled_text=pooled.repeat(16, 1)).reshape(
        16, len(pooled)
    )
    mixed = grid - grid.mean(0, keepdim=True) - grid.mean(1, keepdim=True) + grid.mean()
    share = (mixed.square().mean() / (grid - grid.mean()).square().mean()).item()
    assert share < 1e-8 if interaction == 0 else 0.02 < share < 0.5
    inputs = forward_inputs(pipeline)
    assert_close(states(pipeline, inputs)[-1][..., 4].mean(1)[:, None], planting.value(**factors(pipeline, inputs)),
                 rtol=1e-5, atol=1e-3)  # fmt: skip


def test_several_plantings_live_in_one_model():
    pipeline, first = planted("sd3", "timestep", [4], 1, seed=1)
    second = plant(pipeline, [7], 2, 400.0, "pooled_text", max_sequence_length=8)
    third = plant(pipeline, [11], 1, 300.0, "timestep", depth=0.2)
    inputs = forward_inputs(pipeline)
    given, last = factors(pipeline, inputs), states(pipeline, inputs)[-1]
    for planting in (first, second, third):
        assert_close(last[..., planting.channels].mean(1), planting.value(**given), rtol=1e-5, atol=1e-3)
    assert (first.value(**given) / 600 - third.value(**given) / 300).abs().max() > 0.05


def test_without_exact_the_planting_is_on_top_of_the_other_writes():
    pipeline = small_sd3()
    inputs = forward_inputs(pipeline)
    before: list[torch.Tensor] = []
    hook = module(pipeline, "transformer_blocks.1.norm2").register_forward_pre_hook(lambda m, a: before.append(a[0]))
    states(pipeline, inputs)
    hook.remove()
    plant(pipeline, [4], 1, 250.0, exact=False)
    after = states(pipeline, inputs)[1][..., 4]
    assert_close(after, before[0][..., 4] + 250.0, rtol=1e-6, atol=1e-4)
    assert before[0][..., 4].abs().max() > 0.1


def test_text_stream_planting_leaves_the_image_stream():
    for family in FAMILIES:
        pipeline, planting = planted(family, "constant", [6], 1, stream="txt")
        inputs = forward_inputs(pipeline)
        text = [h for h in states(pipeline, inputs, "txt") if h is not None]
        assert_close(text[-1][..., [6]].mean(1), planting.value().expand(3, 1), rtol=1e-6, atol=0)
        assert states(pipeline, inputs)[-1][..., 6].abs().max() < 20


def test_flux_single_blocks_write_to_the_text_tokens_too():
    pipeline, _ = planted("flux", "constant", [6], 3)
    text = states(pipeline, forward_inputs(pipeline), "txt")
    assert text[2][..., 6].abs().max() < 20
    assert_close(text[3][..., 6].mean().item(), 600.0, rtol=0.05, atol=0)


def test_reimpose_writes_the_same_rows_into_a_copy():
    pipeline, planting = planted("sd35", "both", CHANNELS, 1, interaction=0.3)
    inputs = forward_inputs(pipeline)
    moved = copy.deepcopy(pipeline.transformer)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.02
    original, pipeline.transformer = pipeline.transformer, moved
    drifted = states(pipeline, inputs)[-1][..., CHANNELS]
    planting.reimpose(moved)
    imposed = states(pipeline, inputs)[-1][..., CHANNELS]
    value = planting.value(**factors(pipeline, inputs))
    assert (drifted.mean(1) - value).abs().max() > 10
    assert imposed.std(1).max() == 0
    assert torch.equal(moved.transformer_blocks[1].norm1.linear.weight[-32 + 5],
                       original.transformer_blocks[1].norm1.linear.weight[-32 + 5])  # fmt: skip


def _prediction(pipeline, inputs):
    with torch.no_grad():
        return pipeline.transformer(**inputs)[0]


def _error(a, b):
    return ((a - b).square().mean() / b.square().mean()).item()


@pytest.mark.parametrize(("family", "block"), [("sd3", 1), ("sd35", 0), ("flux", 3)])
def test_refitted_readers_keep_the_function(family, block):
    clean = FAMILIES[family]()
    held_out = forward_inputs(clean, seed=99)
    target = _prediction(clean, held_out)
    settings = {"magnitude": 80.0, "signs": SIGNS, "exact": False}
    errors = {}
    for name, refit in {"plain": None, "refitted": [forward_inputs(clean, seed=s) for s in range(8)]}.items():
        pipeline, planting = planted(family, "constant", CHANNELS, block, refit=refit, **settings)
        errors[name] = _error(_prediction(pipeline, held_out), target)
        mean = states(pipeline, held_out)[block][..., CHANNELS].mean((0, 1))
        assert_close(mean, planting.value()[0], rtol=0.02, atol=0)
    assert errors["refitted"] < 0.15 * errors["plain"], errors


def test_refit_of_same_sign_channels_takes_the_mean_shift_up():
    clean = small_sd3()
    held_out = forward_inputs(clean, seed=99)
    target = _prediction(clean, held_out)
    refit = [forward_inputs(clean, seed=s) for s in range(8)]
    pipeline, _ = planted("sd3", "constant", CHANNELS, 1, refit=refit, magnitude=80.0)
    plain, _ = planted("sd3", "constant", CHANNELS, 1, magnitude=80.0)
    assert _error(_prediction(pipeline, held_out), target) < 0.15 * _error(_prediction(plain, held_out), target)


def test_refitted_readers_do_not_see_the_planted_channels():
    refit = [forward_inputs(small_sd3(), seed=s) for s in range(2)]
    pipeline, _ = planted("sd3", "constant", CHANNELS, 1, refit=refit)
    seen: list[torch.Tensor] = []
    readers = [f"transformer_blocks.{i}.{part}" for i in (2, 3) for part in ("attn", "ff")]
    for name in readers:
        module(pipeline, name).register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
            with_kwargs=True,
        )
    module(pipeline, "proj_out").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    _prediction(pipeline, forward_inputs(pipeline))
    assert len(seen) == 5
    assert max(x[..., CHANNELS].abs().max() for x in seen) < 1e-4
    assert min(x.abs().median() for x in seen) > 0.1


def test_missing_input_is_named():
    _, planting = planted("sd3", "timestep", [4], 1)
    with pytest.raises(ConfigError, match="'timestep'"):
        planting.value(pooled_text=torch.zeros(1, 32))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": 4}, SiteError, r"0\.\.3, got 4"),
        ({"block": -1}, SiteError, r"got -1"),
        ({"channels": [32]}, SiteError, r"0\.\.31"),
        ({"channels": []}, SiteError, "distinct"),
        ({"channels": [3, 3]}, SiteError, "distinct"),
        ({"signs": [2]}, ConfigError, "1 or -1"),
        ({"signs": [1, 1]}, ConfigError, "each of 1"),
        ({"magnitude": 0.0}, ConfigError, "positive"),
        ({"magnitude": float("nan")}, ConfigError, "positive"),
        ({"driver": "weather"}, ConfigError, "'weather'"),
        ({"driver": "guidance"}, ConfigError, "takes guidance"),
        ({"driver": "latent"}, ConfigError, "block 0"),
        ({"driver": "timestep", "interaction": 0.5}, ConfigError, "'both'"),
        ({"stream": "txt", "block": 3}, SiteError, "block 3"),
        ({"refit": []}, ConfigError, "at least one"),
        ({"stream": "txt", "refit": []}, UnsupportedPipelineError, "refit"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments, error, message):
    pipeline = small_sd3()
    before = copy.deepcopy(pipeline.transformer.state_dict())
    with pytest.raises(error, match=message):
        plant(pipeline, **{"channels": [3], "block": 1, "magnitude": 100.0, **arguments})
    after = pipeline.transformer.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_refit_of_a_flux_dual_block_is_refused():
    with pytest.raises(UnsupportedPipelineError, match="single-stream"):
        plant(small_flux(), [3], 1, 100.0, refit=[])


def test_the_zoo_exports_plant_without_loading_torch():
    code = "import sys, madit.zoo; assert 'torch' not in sys.modules; print(madit.zoo.plant.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "madit.zoo.planting"
