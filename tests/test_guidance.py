from __future__ import annotations

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from editing import CONFIG, MAKERS, all_blocks, by_hand, close, disrupted, inputs, is_flux, run

from madit import ChannelSet, DiT, GuidanceConfig, guide, intervene
from madit.channels import ChannelEntry
from madit.errors import (
    NothingEditedError,
    SiteError,
)
from madit.guidance import Degrader
from madit.zoo.small import small_sd3


@pytest.fixture(scope="module", params=MAKERS)
def pipeline(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_formula_with_and_without_classifier_free_guidance(pipeline, cfg):
    with guide(pipeline, CONFIG):
        guided = run(pipeline, cfg=cfg)
    close(guided, by_hand(pipeline, CONFIG, cfg))
    assert (guided - run(pipeline, cfg=cfg)).abs().max() > 0.05


def test_two_prompts_in_a_batch(sd3):
    with guide(sd3, CONFIG):
        guided = run(sd3, cfg=3.0, num_images_per_prompt=2)
    close(guided, by_hand(sd3, CONFIG, 3.0, num_images_per_prompt=2))
    assert not torch.allclose(guided[0], guided[1])


def test_the_skip_layer_call_gets_the_same_term(sd3):
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -0.1, "skip_layer_guidance_stop": 1.0}
    more["skip_layer_guidance_scale"] = 2.0
    with guide(sd3, CONFIG):
        guided = run(sd3, cfg=3.0, **more)
    close(guided, by_hand(sd3, CONFIG, 3.0, skip_scale=2.0, **more))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_image_to_image(family):
    base = MAKERS[family]()
    cls = {"sd3": StableDiffusion3Img2ImgPipeline, "flux": FluxImg2ImgPipeline}[family]
    parts = {k: v for k, v in base.components.items() if k in cls.__init__.__annotations__}
    pipeline = cls(**parts)
    pipeline.set_progress_bar_config(disable=True)
    more = {"image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), "strength": 0.6, "steps": 5}
    with guide(pipeline, CONFIG):
        guided = run(pipeline, cfg=3.0, **more)
    close(guided, by_hand(pipeline, CONFIG, 3.0, **more))
    with guide(pipeline, CONFIG.replace(steps=(0.4, 0.6))):  # step 2 of 5, which is the first of this run
        guided = run(pipeline, cfg=3.0, **more)
    close(guided, by_hand(pipeline, CONFIG, 3.0, guided_steps=[0], **more))


def test_no_scale_or_no_disruption_is_no_guidance(pipeline):
    for cfg in (1.0, 3.0):
        clean = run(pipeline, cfg=cfg)
        for change in ({"scale": 0.0}, {"factor": 1.0}):
            with guide(pipeline, CONFIG.replace(**change)):
                assert torch.equal(run(pipeline, cfg=cfg), clean)
        with guide(pipeline, CONFIG.replace(scale=0.0), shortcut=False):
            assert torch.equal(run(pipeline, cfg=cfg), clean)
        with guide(pipeline, CONFIG.replace(factor=1.0), shortcut=False):
            identity = run(pipeline, cfg=cfg)
        if cfg == 1.0 or is_flux(pipeline):
            assert torch.equal(identity, clean)
        else:  # half of a batch differs from a smaller batch in the last bits
            close(identity, clean)


def test_the_shortcut_runs_no_second_forward(sd3):
    calls = []
    handle = all_blocks(sd3)[3].register_forward_pre_hook(lambda m, a: calls.append(m))
    for change, shortcut, expected in (
        ({"scale": 0.0}, True, 2),
        ({"factor": 1.0}, True, 2),
        ({"factor": 1.0}, False, 4),
        ({}, True, 4),
    ):
        calls.clear()
        with guide(sd3, CONFIG.replace(**change), shortcut=shortcut):
            run(sd3)
        assert len(calls) == expected
    handle.remove()


def test_partial_forward_is_the_full_one(pipeline):
    for block in (1, 2, 3):
        config = CONFIG.replace(block=block)
        for cfg in (1.0, 3.0):
            with guide(pipeline, config):
                partial = run(pipeline, cfg=cfg)
            with guide(pipeline, config, partial=False):
                full = run(pipeline, cfg=cfg)
            if cfg == 1.0 or is_flux(pipeline):
                assert torch.equal(partial, full)
            else:
                close(partial, full)


def test_partial_forward_computes_only_from_the_block_on(pipeline):
    calls = []
    block = DiT(pipeline).blocks
    handles = [b.module.attn.register_forward_pre_hook(lambda m, a, i=b.index: calls.append(i)) for b in block]
    with guide(pipeline, CONFIG.replace(block=3)):
        run(pipeline, steps=3)
    for handle in handles:
        handle.remove()
    assert [calls.count(i) for i in range(len(block))] == [3, 3, 3, *[6] * (len(block) - 3)]


def test_partial_forward_keeps_control_residuals(pipeline):
    t = pipeline.transformer
    g = torch.Generator().manual_seed(5)
    arguments = inputs(pipeline)
    residuals = [torch.randn(1, 64, 32, generator=g) for _ in range(2)]
    names = ("controlnet_block_samples", "controlnet_single_block_samples") if is_flux(pipeline) else (
        "block_controlnet_hidden_states",
    )  # fmt: skip
    arguments |= dict.fromkeys(names, residuals)
    config = CONFIG.replace(block=2)
    degrade = Degrader(DiT(pipeline).family, config)
    outputs = []
    handle = all_blocks(pipeline)[1].register_forward_hook(lambda m, a, o: outputs.append(o))
    t(**arguments)
    handle.remove()
    with disrupted(pipeline, config):
        expected = t(**arguments)[0]
    assert torch.equal(degrade(t, arguments, 0.6, outputs[0]), expected)
    assert torch.equal(degrade(t, arguments, 0.6), expected)
    with disrupted(pipeline, config):
        assert not torch.allclose(t(**inputs(pipeline))[0], expected, atol=1e-3)


@pytest.mark.parametrize("mode", ["scale", "mean"])
def test_degraded_is_what_intervene_does(pipeline, mode):
    dit = DiT(pipeline)
    means = {"cond": (4.0, -3.0, 9.0)}
    channels = ChannelSet(
        model=dit.fingerprint, n_blocks=len(dit.blocks), width=dit.width, sigma=(1.0, 0.7, 0.0),
        entries=tuple(ChannelEntry(block=1, channel=c, means=means) for c in (3, 5)),
    )  # fmt: skip
    tokens = torch.zeros(8, 8, dtype=torch.bool)
    tokens[2:5, 1:] = True
    config = GuidanceConfig.from_channels(channels, 2, scale=1.0, factor=-5.0, mode=mode, tokens=tokens.numpy())
    arguments = inputs(pipeline)
    sigma = float(arguments["timestep"][0]) / (1 if is_flux(pipeline) else 1000)
    degraded = Degrader(dit.family, config)(dit.transformer, arguments, sigma)
    with intervene(dit, channels, blocks=[2], mode=mode, factor=-5.0, tokens=tokens):
        assert torch.equal(dit.transformer(**arguments)[0], degraded)
    assert not torch.allclose(dit.transformer(**arguments)[0], degraded, atol=1e-3)


def test_set_to_mean_in_a_run(sd3):
    """Against the formula with the mean of each step's noise level, linear between levels, by a plain hook."""
    config = GuidanceConfig(block=2, channels=(3,), scale=1.5, mode="mean", means=((8.0, 40.0),), sigma=(1.0, 0.0))
    with guide(sd3, config):
        guided = run(sd3, steps=3)
    levels = sd3.scheduler.sigmas[:3].tolist()
    counter = iter(range(100))
    differences = []

    def hook(module, args, kwargs):
        h = kwargs["hidden_states"].clone()
        h[..., 3] = 40.0 - 32.0 * levels[next(counter)]
        return args, {**kwargs, "hidden_states": h}

    def add(module, args, kwargs, output):
        if not differences or differences[-1] is not None:
            differences.append(None)
            handle = all_blocks(sd3)[2].register_forward_pre_hook(hook, with_kwargs=True)
            degraded = module(**kwargs)[0]
            handle.remove()
            differences[-1] = output[0] - degraded
            return (output[0] + 1.5 * differences[-1],)
        return None

    handle = sd3.transformer.register_forward_hook(add, with_kwargs=True)
    expected = run(sd3, steps=3)
    handle.remove()
    assert len(differences) == 3
    close(guided, expected)


def test_only_some_tokens_are_disrupted(pipeline):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:3] = True
    local = GuidanceConfig(**{**CONFIG.model_dump(), "tokens": tuple(range(24)), "grid": (8, 8)})
    with guide(pipeline, local):
        guided = run(pipeline)
    close(guided, by_hand(pipeline, local, 1.0))
    with guide(pipeline, CONFIG):
        assert not torch.allclose(run(pipeline), guided, atol=1e-3)
    with (
        pytest.raises(SiteError, match="each of 64 tokens"),
        guide(pipeline, local.replace(grid=(6, 6))),
    ):
        run(pipeline)


def test_only_some_steps_are_guided(pipeline):
    for steps, expected in (((0.0, 0.5), [0, 1]), ((0.5, 0.75), [2]), ((0.26, 1.0), [1, 2, 3])):
        with guide(pipeline, CONFIG.replace(steps=steps)):
            guided = run(pipeline, steps=4, cfg=3.0)
        close(guided, by_hand(pipeline, CONFIG, 3.0, steps=4, guided_steps=expected))
    with (
        pytest.raises(NothingEditedError, match=r"steps=\(0.0, 0.2\)"),
        guide(pipeline, CONFIG.replace(steps=(0.0, 0.2))),
    ):
        run(pipeline, steps=4)
    with pytest.raises(NothingEditedError, match="did not run"), guide(pipeline, CONFIG):
        pass


def test_a_config_switched_off_midway_by_a_callback(sd3):
    """`SD3CFGCutoffCallback` ends classifier-free guidance within a run: later calls have one row."""
    from diffusers.callbacks import SD3CFGCutoffCallback

    cutoff = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    more = {"callback_on_step_end": cutoff, "callback_on_step_end_tensor_inputs": cutoff.tensor_inputs}
    rows = []
    handle = all_blocks(sd3)[3].register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k["hidden_states"])), with_kwargs=True
    )
    with guide(sd3, CONFIG, partial=False):
        guided = run(sd3, steps=4, cfg=3.0, **more)
    handle.remove()
    assert rows == [2, 1, 2, 1, 1, 1, 1, 1]
    with guide(sd3, CONFIG):
        close(run(sd3, steps=4, cfg=3.0, **more), guided)
