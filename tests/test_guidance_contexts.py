from __future__ import annotations

import pytest
import torch
from editing import CONFIG, MAKERS, by_hand, close, hooks, is_flux, run

from madit import DiT, guide, intervene, tracing
from madit.errors import (
    ConfigError,
    ModelMismatchError,
    UnsupportedPipelineError,
)
from madit.passes import bound
from madit.zoo.small import small_flux, small_sd3


@pytest.fixture(scope="module", params=MAKERS)
def pipeline(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


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
