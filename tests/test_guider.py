from __future__ import annotations

import pytest
import torch
from diffusers import ClassifierFreeGuidance, QwenImageTransformer2DModel
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3AutoBlocks
from editing import CONFIG, close, hooks, run

from madit import DetailGuidance, DiT, GuidanceConfig, guide
from madit.errors import ConfigError, ModelMismatchError, UnknownFamilyError
from madit.zoo.small import small_sd3, small_sd35


@pytest.fixture(scope="module", params=[small_sd3, small_sd35])
def classic(request):
    return request.param()


@pytest.fixture(scope="module")
def modular(classic):
    pipeline = StableDiffusion3AutoBlocks().init_pipeline()
    pipeline.update_components(**{k: v for k, v in classic.components.items() if k in pipeline.component_names})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(modular, guider, steps=2, **more):
    modular.update_components(guider=guider)
    return modular(
        prompt="a red cat",
        num_inference_steps=steps,
        max_sequence_length=8,
        generator=torch.Generator().manual_seed(0),
        height=32,
        width=32,
        output="latents",
        **more,
    )


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("change", [{}, {"steps": (0.5, 1.0)}, {"block": 1, "tokens": tuple(range(10))}])
def test_the_guider_does_what_guide_does(classic, modular, cfg, change):
    config = GuidanceConfig(**{**CONFIG.model_dump(), **change})
    more = {"negative_prompt": ""} if cfg > 1 else {}
    guided = generate(modular, DetailGuidance.from_config(config, guidance_scale=cfg), **more)
    with guide(classic, config):
        close(guided, run(classic, cfg=cfg))
    assert (guided - run(classic, cfg=cfg)).abs().max() > 0.02


def test_the_mean_mode(classic, modular):
    values = {"block": 2, "channels": (3,), "scale": 2.0, "mode": "mean", "means": ((8.0, 40.0),), "sigma": (1.0, 0.0)}
    config = GuidanceConfig(**values)
    guided = generate(modular, DetailGuidance.from_config(config))
    with guide(classic, config):
        close(guided, run(classic))


def test_no_scale_no_disruption_or_disabled_is_no_guidance(modular):
    clean = generate(modular, ClassifierFreeGuidance(guidance_scale=3.0), negative_prompt="dog")
    for change in ({"scale": 0.0}, {"factor": 1.0}):
        guider = DetailGuidance.from_config(CONFIG.replace(**change), guidance_scale=3.0)
        assert torch.equal(generate(modular, guider, negative_prompt="dog"), clean)
    alone = generate(modular, ClassifierFreeGuidance(guidance_scale=1.0))
    off = DetailGuidance.from_config(CONFIG, guidance_scale=3.0)
    off.disable()
    assert torch.equal(generate(modular, off), alone)


def test_three_forwards_of_which_one_is_partial(modular):
    blocks = modular.transformer.transformer_blocks
    calls = []
    handles = [b.attn.register_forward_pre_hook(lambda m, a, i=i: calls.append(i)) for i, b in enumerate(blocks)]
    generate(modular, DetailGuidance.from_config(CONFIG, guidance_scale=3.0), negative_prompt="", steps=1)
    for handle in handles:
        handle.remove()
    assert [calls.count(i) for i in range(4)] == [2, 2, 3, 3]


def test_round_trip(modular, tmp_path):
    config = CONFIG.replace(steps=(0.0, 0.75), tokens=(1, 2), model=DiT(modular).fingerprint.model_dump())
    guider = DetailGuidance.from_config(config, guidance_scale=3.0)
    guider.save_pretrained(tmp_path)
    loaded = DetailGuidance.from_pretrained(tmp_path)
    assert (loaded.guidance, loaded.guidance_scale) == (config, 3.0)
    assert guider.new(guidance_scale=5.0).guidance_scale == 5.0
    assert guider.new(guidance_scale=5.0).guidance == config
    a, b = (generate(modular, g, negative_prompt="dog") for g in (guider, loaded))
    assert torch.equal(a, b)


def test_nothing_stays_on_the_model(modular):
    before, forward = hooks(modular.transformer), vars(modular.transformer).get("forward")
    guider = DetailGuidance.from_config(CONFIG)
    generate(modular, guider)
    assert (hooks(modular.transformer), vars(modular.transformer).get("forward")) == (before, forward)

    def fail(module, args):
        raise RuntimeError("in the degraded forward" if fail.armed else "never")

    count = iter(range(10))
    handle = modular.transformer.transformer_blocks[3].register_forward_pre_hook(
        lambda m, a: fail(m, a) if next(count) == 1 else None
    )
    fail.armed = True
    with pytest.raises(RuntimeError, match="degraded forward"):
        generate(modular, guider)
    handle.remove()
    assert (hooks(modular.transformer), vars(modular.transformer).get("forward")) == (before, forward)


def test_refusals(modular):
    with pytest.raises(ConfigError, match="negative prompt"):
        generate(modular, DetailGuidance.from_config(CONFIG, guidance_scale=3.0))
    with pytest.raises(ModelMismatchError, match="block below 4"):
        generate(modular, DetailGuidance.from_config(CONFIG.replace(block=4)))
    other = small_sd3(layers=5)
    with pytest.raises(ModelMismatchError, match="another architecture"):
        generate(modular, DetailGuidance.from_config(CONFIG.replace(model=DiT(other).fingerprint.model_dump())))
    with pytest.raises(ConfigError, match="block"):
        DetailGuidance(guidance={"scale": 1.0})
    guider = DetailGuidance.from_config(CONFIG)
    guider.set_state(0, 2, torch.tensor(900.0))
    unknown = QwenImageTransformer2DModel(num_layers=1, attention_head_dim=16, num_attention_heads=1,
                                          joint_attention_dim=16, axes_dims_rope=(4, 4, 8))  # fmt: skip
    with pytest.raises(UnknownFamilyError, match="QwenImage"):
        guider.prepare_models(unknown)
