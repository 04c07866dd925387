"""What madit relies on in diffusers, each as the smallest test that would fail if it changed."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3AutoBlocks
from editing import MAKERS, inputs, is_flux, run

from madit import DiT
from madit.guidance import PIPELINES


@pytest.fixture(scope="module", params=MAKERS)
def pipeline(request):
    return MAKERS[request.param]()


def calls_of(pipeline, **more):
    found = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda m, a, k: found.append((a, k)), with_kwargs=True)
    run(pipeline, **more)
    handle.remove()
    return found


def test_blocks_are_called_in_order_and_return_what_the_table_says(pipeline):
    dit, order = DiT(pipeline), []

    def hook(block):
        def check(module, args, kwargs, output):
            order.append(block.index)
            for stream in block.streams():
                entering = kwargs[block.table.inputs[stream]]
                assert output[block.table.outputs[stream]].shape == entering.shape

        return check

    handles = [b.module.register_forward_hook(hook(b), with_kwargs=True) for b in dit.blocks]
    pipeline.transformer(**inputs(pipeline))
    for handle in handles:
        handle.remove()
    assert order == list(range(len(dit.blocks)))


def test_the_last_sd3_block_returns_no_text():
    pipeline, seen = MAKERS["sd3"](), []
    pipeline.transformer.transformer_blocks[-1].register_forward_hook(lambda m, a, o: seen.append(o))
    pipeline.transformer(**inputs(pipeline))
    assert seen[0][0] is None


def test_the_order_of_classifier_free_guidance(pipeline):
    """SD3: one batch [uncond; cond]. Flux: two calls, cond first."""
    alone = calls_of(pipeline, steps=1)[0][1]["encoder_hidden_states"]
    guided = calls_of(pipeline, steps=1, cfg=3.0)
    if is_flux(pipeline):
        assert len(guided) == 2
        assert torch.equal(guided[0][1]["encoder_hidden_states"], alone)
        assert not torch.equal(guided[1][1]["encoder_hidden_states"], alone)
    else:
        assert len(guided) == 1
        states = guided[0][1]["encoder_hidden_states"]
        assert torch.allclose(states[1:], alone, atol=1e-5)
        assert not torch.allclose(states[:1], alone, atol=1e-5)


def test_the_skip_layer_call_comes_second_with_the_conditional_inputs():
    pipeline = MAKERS["sd3"]()
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -0.1, "skip_layer_guidance_stop": 1.0}
    main, skip = calls_of(pipeline, steps=1, cfg=3.0, **more)
    assert main[1].get("skip_layers") is None
    assert skip[1]["skip_layers"] == [1]
    assert len(skip[1]["hidden_states"]) == 1


def test_a_block_list_can_be_run_by_the_transformers_own_forward_from_any_block(pipeline):
    """The forward keeps no state of earlier blocks but what a block returns: the ground of the partial forward."""
    dit, outputs = DiT(pipeline), []
    middle = dit.blocks[1].module
    handle = middle.register_forward_hook(lambda m, a, o: outputs.append(o))
    expected = pipeline.transformer(**inputs(pipeline))[0]
    handle.remove()
    handle = dit.blocks[0].module.register_forward_hook(lambda m, a, o: tuple(torch.zeros_like(x) for x in o))
    replaced = middle.register_forward_hook(lambda m, a, o: outputs[0])
    assert torch.equal(pipeline.transformer(**inputs(pipeline))[0], expected)
    handle.remove()
    replaced.remove()


def test_pipelines_that_guide_accepts_exist_and_do_not_rescale_guidance():
    for name in PIPELINES:
        parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
        assert "guidance_rescale" not in parameters


def test_the_guider_protocol_of_modular_sd3():
    """Per step: set_state, prepare_inputs, then per batch prepare_models, forward, cleanup_models; then the guider."""
    log = []

    class Spy(BaseGuidance):
        _input_predictions = ["pred_cond"]  # noqa: RUF012
        num_conditions = 1
        is_conditional = True

        @register_to_config
        def __init__(self):
            super().__init__()

        def set_state(self, **state):
            log.append(("set_state", sorted(state)))
            super().set_state(**state)

        def prepare_inputs(self, data):
            log.append(("prepare_inputs", sorted(data)))
            return [self._prepare_batch(data, 0, "pred_cond")]

        def prepare_models(self, denoiser):
            log.append("prepare_models")

        def cleanup_models(self, denoiser):
            log.append("cleanup_models")

        def forward(self, pred_cond):
            log.append("forward")
            return diffusers.guiders.guider_utils.GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)

    classic = MAKERS["sd3"]()
    modular = StableDiffusion3AutoBlocks().init_pipeline()
    modular.update_components(**{k: v for k, v in classic.components.items() if k in modular.component_names})
    modular.update_components(guider=Spy())
    modular.set_progress_bar_config(disable=True)
    handle = modular.transformer.register_forward_pre_hook(lambda m, a: log.append("transformer"))
    modular(prompt="a cat", num_inference_steps=1, max_sequence_length=8, height=32, width=32, output="latents")
    handle.remove()
    assert log == [
        ("set_state", ["num_inference_steps", "step", "timestep"]),
        ("prepare_inputs", ["encoder_hidden_states", "hidden_states", "text_embeds"]),
        "prepare_models",
        "transformer",
        "cleanup_models",
        "forward",
    ]
