"""What madit.tracing relies on in nnsight; when one of these fails, an upstream release changed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnsight.modeling.diffusion import DiffusionModel

from madit import tracing
from madit.zoo.small import small_sd3, small_sd35

RUN = {"num_inference_steps": 2, "max_sequence_length": 8}


@pytest.fixture
def pipeline() -> Any:
    return small_sd3()


def test_a_loaded_pipeline_must_be_wrapped_by_the_private_module(pipeline: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  (any refusal; it takes the pipeline for a hub id)
        DiffusionModel(pipeline)
    assert tracing.wrap(pipeline).transformer._module is pipeline.transformer


def test_a_traced_run_defaults_to_one_step(pipeline: Any) -> None:
    steps: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    with tracing.wrap(pipeline).generate("a dog", max_sequence_length=8):
        pass
    assert len(steps) == 1


def _open_loop(model: Any, got: list[int]) -> None:
    with model.generate("a dog", **RUN) as tracer:
        for _ in tracer.iter[:]:
            got.append(model.transformer.transformer_blocks[0].output[1].shape[0])


def test_an_open_loop_ends_by_the_warning_that_visit_keeps_quiet(pipeline: Any) -> None:
    got: list[int] = []
    with pytest.warns(UserWarning, match=tracing._END):
        _open_loop(tracing.wrap(pipeline), got)
    assert len(got) == 2


def _follow(tracer: Any, model: Any, i: int, counts: list[int]) -> None:
    for _ in tracer.iter[:]:
        assert model.transformer.transformer_blocks[i].output[1] is not None
        counts[i] += 1


def _workers(model: Any, counts: list[int]) -> None:
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    with model.generate(num_inference_steps=3) as tracer:
        with tracer.invoke("a dog", num_inference_steps=3, max_sequence_length=8, **skip):
            pass
        for i in range(3):
            with tracer.invoke():
                _follow(tracer, model, i, counts)


def test_workers_of_empty_invokes_follow_their_own_module() -> None:
    """A block that some calls leave out has fewer iterations, and no worker waits for another."""
    counts = [0, 0, 0]
    with pytest.warns(UserWarning, match="was never reached"):
        _workers(tracing.wrap(small_sd35()), counts)
    assert counts == [5, 3, 5]


def test_values_are_the_live_tensors(pipeline: Any) -> None:
    images = [pipeline("a dog", generator=torch.Generator().manual_seed(0), output_type="pt", **RUN).images]
    model = tracing.wrap(pipeline)
    for factor in (1.0, 0.0):
        run = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", **RUN}
        with model.generate("a dog", **run) as tracer:
            for _ in tracer.iter[0:2]:
                model.transformer.transformer_blocks[0].output[1].mul_(factor)
            images.append(tracer.result.images.save())
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_edits_of_a_blocks_input_by_torch_hooks_are_seen(pipeline: Any) -> None:
    model = tracing.wrap(pipeline)
    handle = pipeline.transformer.transformer_blocks[1].register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "hidden_states": torch.full_like(k["hidden_states"], 7.0)}), with_kwargs=True
    )
    got: list[torch.Tensor] = []
    with model.generate("a dog", **RUN) as tracer:
        for _ in tracer.iter[0:2]:
            got.append(model.transformer.transformer_blocks[1].inputs[1]["hidden_states"])
    handle.remove()
    assert len(got) == 2
    assert all(bool((x == 7.0).all()) for x in got)
