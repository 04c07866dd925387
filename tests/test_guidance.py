from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from editing import MAKERS, hooks, inputs, is_flux, run

from madit import ChannelSet, DiT, GuidanceConfig, guide, intervene, tracing
from madit.channels import ChannelEntry
from madit.errors import (
    ConfigError,
    ModelMismatchError,
    NothingEditedError,
    SiteError,
    UnsupportedPipelineError,
)
from madit.guidance import Degrader
from madit.passes import bound
from madit.zoo.small import small_flux, small_sd3

CONFIG = GuidanceConfig(block=2, channels=(3, 5), scale=1.7, factor=-12.0)


@pytest.fixture(scope="module", params=MAKERS)
def pipeline(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


def all_blocks(pipeline):
    t = pipeline.transformer
    return [*t.transformer_blocks, *getattr(t, "single_transformer_blocks", ())]


@contextmanager
def disrupted(pipeline, config=CONFIG):
    """A second implementation of the disruption: a plain hook."""

    def hook(module, args, kwargs):
        h = kwargs["hidden_states"].clone()
        tokens = list(config.tokens) if config.tokens is not None else list(range(h.shape[1]))
        for c in config.channels:
            h[:, tokens, c] *= config.factor
        return args, {**kwargs, "hidden_states": h}

    handle = all_blocks(pipeline)[config.block].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def captured(pipeline, **more):
    """The arguments of each call of the transformer in an ordinary run."""
    found = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda m, a, k: found.append(k), with_kwargs=True)
    run(pipeline, **more)
    handle.remove()
    return found


def by_hand(pipeline, config, cfg, skip_scale=0.0, guided_steps=None, **more):
    """A scheduler loop that writes the formula out: D(0) + g (D(c) - D(0)) + w (D(c) - D_m(c)) + skip-layer term."""
    found = captured(pipeline, cfg=cfg, **more)
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler._step_index = None
    for name in ("step", "set_timesteps"):  # a tracker's, inside a context
        vars(scheduler).pop(name, None)
    timesteps = scheduler.timesteps[scheduler.begin_index or 0 :]
    per_step = len(found) // len(timesteps)
    batched = not is_flux(pipeline) and cfg > 1
    latents = found[0]["hidden_states"]
    latents = latents[: len(latents) // 2] if batched else latents
    predict = lambda k, z: pipeline.transformer(**{**k, "hidden_states": z})[0]  # noqa: E731
    for i, t in enumerate(timesteps):
        calls = found[i * per_step : (i + 1) * per_step]
        uncond, skip = None, None
        if batched:
            uncond, cond = predict(calls[0], torch.cat([latents] * 2)).chunk(2)
            n = len(latents)
            only = {k: v[n:] if isinstance(v, torch.Tensor) else v for k, v in calls[0].items()}
            skip = predict(calls[1], latents) if per_step == 2 else None
        else:
            only = calls[0]
            cond = predict(only, latents)
            uncond = predict(calls[1], latents) if per_step == 2 else None
        with disrupted(pipeline, config):
            degraded = predict(only, latents)
        noise = cond if uncond is None else uncond + cfg * (cond - uncond)
        if guided_steps is None or i in guided_steps:
            noise = noise + config.scale * (cond - degraded)
        if skip is not None:
            noise = noise + skip_scale * (cond - skip)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


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


def test_undone_after_an_exception_and_with_nnsight(pipeline):
    def fail(pipeline, step, timestep, state):
        raise RuntimeError("stop here")

    dit = DiT(pipeline)
    clean = run(pipeline)
    with guide(pipeline, CONFIG):
        guided = run(pipeline)
    assert dit.model is not None  # wraps every module
    wrappers = {name: vars(m).get("forward") for name, m in pipeline.transformer.named_modules()}
    before = hooks(pipeline.transformer)
    with pytest.raises(RuntimeError, match="stop here"), guide(pipeline, CONFIG):
        run(pipeline, callback_on_step_end=fail)
    assert hooks(pipeline.transformer) == before
    assert {name: vars(m).get("forward") for name, m in pipeline.transformer.named_modules()} == wrappers
    assert torch.equal(run(pipeline), clean)
    with guide(pipeline, CONFIG):
        assert torch.equal(run(pipeline), guided)


def test_a_recording_of_a_guided_run_sees_the_pipelines_own_calls(pipeline):
    """The degraded forward is no call of the transformer: labels stay, and states are those of the guided run."""
    dit = DiT(pipeline)
    more = {"height": 32, "width": 32, "true_cfg_scale": 3.0, "negative_prompt": "dog"} if is_flux(pipeline) else {
        "guidance_scale": 3.0
    }  # fmt: skip
    seen = []

    def sink(call, site, value):
        seen.append((call.step, site.block, tuple(call.rows), value.clone()))

    sites = [dit.site(f"blocks.{b}.img.resid_post") for b in (0, 2, 3)]

    def visit():
        seen.clear()
        generator = torch.Generator().manual_seed(0)
        result = tracing.visit(dit, sites, sink, prompt="a red cat", num_inference_steps=2, max_sequence_length=8,
                               output_type="latent", generator=generator, **more)  # fmt: skip
        return result.images, list(seen)

    _, unguided = visit()
    with guide(dit, CONFIG):
        images, recorded = visit()
        assert torch.equal(images, run(pipeline, cfg=3.0))
    assert [s[:3] for s in recorded] == [s[:3] for s in unguided]
    first = [torch.equal(a[3], b[3]) for a, b in zip(recorded, unguided, strict=True) if a[0] == 0]
    second = [torch.equal(a[3], b[3]) for a, b in zip(recorded, unguided, strict=True) if a[0] == 1]
    assert all(first)
    assert not any(second)


def test_an_edit_of_the_model_reaches_the_degraded_forward(pipeline):
    """Both orders: D and D_m are those of the edited model, so the formula holds on it."""
    with intervene(pipeline, [7], blocks=[1], factor=20.0):
        expected = by_hand(pipeline, CONFIG, 1.0)
        with guide(pipeline, CONFIG):
            close(run(pipeline), expected)
    with guide(pipeline, CONFIG), intervene(pipeline, [7], blocks=[1], factor=20.0):
        close(run(pipeline), expected)
    with guide(pipeline, CONFIG):
        assert not torch.allclose(run(pipeline), expected, atol=1e-3)


def test_an_edit_of_the_degraded_branch_only(sd3):
    """Disrupting the degraded branch again by `intervene` multiplies the factors, and leaves D(c) alone."""
    with guide(sd3, CONFIG), intervene(sd3, [3, 5], blocks=[2], factor=2.0, branch="degraded"):
        guided = run(sd3)
    with guide(sd3, CONFIG.replace(factor=-24.0)):
        close(run(sd3), guided)


def test_image_prompts_are_not_lost_to_the_degraded_forward(sd3, monkeypatch):
    """SD3's forward takes `ip_adapter_image_embeds` out of its dictionary, and both forwards need their rows of it."""
    sizes = []

    class ImageProjection(torch.nn.Module):
        def forward(self, embeds, timestep):
            sizes.append((len(embeds), len(timestep)))
            return embeds, timestep

    sd3.transformer.image_proj = ImageProjection()
    with guide(sd3, CONFIG):
        run(sd3, steps=2, cfg=3.0, joint_attention_kwargs={"ip_adapter_image_embeds": torch.randn(2, 4, 8)})
    del sd3.transformer.image_proj
    assert sizes == [(2, 2), (1, 1)] * 2


def test_arguments_are_bound_by_name_with_dictionaries_copied(sd3):
    kept = {"scale": 1.0}
    named = bound(sd3.transformer, ("latent", "text"), {"joint_attention_kwargs": kept})
    assert named == {"hidden_states": "latent", "encoder_hidden_states": "text", "joint_attention_kwargs": kept}
    assert named["joint_attention_kwargs"] is not kept


def test_half_precision_keeps_the_identities():
    pipeline = small_sd3().to(torch.bfloat16)
    clean = run(pipeline, cfg=3.0)
    assert clean.dtype == torch.bfloat16
    with guide(pipeline, CONFIG.replace(scale=0.0), shortcut=False):
        assert torch.equal(run(pipeline, cfg=3.0), clean)
    with guide(pipeline, CONFIG):
        assert not torch.equal(run(pipeline, cfg=3.0), clean)


def test_frozen_layernorm_is_refused_under_guidance(sd3):
    with (
        pytest.raises(UnsupportedPipelineError, match="degraded forward"),
        guide(sd3, CONFIG),
        intervene(sd3, [7], blocks=[1], layernorm="frozen"),
    ):
        run(sd3)


def test_refusals(sd3, monkeypatch):
    class Renormalising(type(sd3)):
        pass

    with pytest.raises(UnsupportedPipelineError, match="Renormalising"), guide(Renormalising(**sd3.components), CONFIG):
        pass
    with pytest.raises(ConfigError, match="GuidanceConfig"), guide(sd3, {"block": 2}):  # type: ignore[arg-type]
        pass
    for change in ({"block": 4}, {"channels": (3, 32)}):
        with (
            pytest.raises(ModelMismatchError, match="below 4 and channels below 32"),
            guide(sd3, CONFIG.replace(**change)),
        ):
            pass
    with (
        pytest.raises(ModelMismatchError, match="FluxTransformer2DModel"),
        guide(sd3, CONFIG.replace(model=DiT(small_flux()).fingerprint.model_dump())),
    ):
        pass
    monkeypatch.setattr(type(sd3.transformer), "is_cache_enabled", True, raising=False)
    with pytest.raises(UnsupportedPipelineError, match="disable_cache"), guide(sd3, CONFIG):
        pass
