"""`visit` and its kin against plain hooks."""

from __future__ import annotations

import warnings
from typing import Any

import hooked
import pytest
import torch

from madit import tracing
from madit.calls import Call
from madit.dit import DiT
from madit.sites import Site
from madit.zoo.small import small_flux, small_sd3, small_sd35

RUN = {"prompt": ["a dog"], "num_inference_steps": 2, "max_sequence_length": 8}
FAMILIES = {
    "sd3": (small_sd3, {}),
    "sd35": (small_sd35, {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}),
    "flux": (small_flux, {"height": 32, "width": 32, "true_cfg_scale": 2.0, "negative_prompt": ["a cat"]}),
}


def run_kwargs(more: dict[str, Any]) -> dict[str, Any]:
    return {**RUN, **more, "generator": torch.Generator().manual_seed(0)}


def visited(dit: DiT, sites: list[Site], **run: Any) -> list[tuple[Call, Site, torch.Tensor]]:
    seen: list[tuple[Call, Site, torch.Tensor]] = []
    tracing.visit(dit, sites, lambda call, site, value: seen.append((call, site, value.clone())), **run)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_come_in_forward_order_in_every_call_with_the_values_that_hooks_read(family: str) -> None:
    make, more = FAMILIES[family]
    pipeline = make()
    dit = DiT(pipeline)
    sites = [Site.parse(name) for name in dit.sites()]
    calls, _ = hooked.read(pipeline, lambda: pipeline(**run_kwargs(more)))
    seen = visited(dit, sites, **run_kwargs(more))
    by_call = {i: [(s, v) for call, s, v in seen if call.index == i] for i in range(len(calls))}
    assert sum(len(v) for v in by_call.values()) == len(seen)
    for i, values in by_call.items():
        present = {s.block for s, _ in values}
        assert [s for s, _ in values] == [s for s in sites if s.block in present]
        got = {str(s): v for s, v in values}
        assert set(calls[i]) <= set(got)  # hooks do not read the shift and scale that AdaLN keeps to itself
        for name, value in calls[i].items():
            assert torch.equal(got[name], value), name


def test_shift_and_scale_are_what_adaln_applies() -> None:
    """AdaLN's own output is LN(x) (1 + scale) + shift; the last text norm of SD3 chunks scale before shift."""
    pipeline = small_sd3()
    dit = DiT(pipeline)
    out: list[torch.Tensor] = []
    last = pipeline.transformer.transformer_blocks[-1]
    for norm in (last.norm1, last.norm1_context):
        norm.register_forward_hook(lambda m, a, o: out.append(o[0] if isinstance(o, tuple) else o))
    end = len(dit.blocks) - 1
    kinds = ("resid_pre", "scale_msa", "shift_msa")
    seen = visited(dit, [Site(end, s, k) for s in ("img", "txt") for k in kinds], **run_kwargs({}))
    first = {(s.stream, s.kind): v for call, s, v in seen if call.index == 0}
    for stream, got in zip(("img", "txt"), out, strict=False):
        x, scale, shift = (first[stream, k] for k in kinds)
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        torch.testing.assert_close(got, normed * (1 + scale[:, None]) + shift[:, None])


def test_only_the_sites_asked_for_are_visited() -> None:
    pipeline = small_sd3()
    wanted = [Site(1, "img", "update_mlp"), Site(3, "txt", "resid_pre")]
    assert {s for _, s, _ in visited(DiT(pipeline), wanted, **run_kwargs({}))} == set(wanted)


def test_the_result_is_the_pipelines_and_nothing_is_said() -> None:
    images = small_sd3()(**run_kwargs({})).images
    pipeline = small_sd3()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = tracing.visit(DiT(pipeline), [Site(0, "img", "resid_post")], lambda *_: None, **run_kwargs({}))
    assert result.images[0].tobytes() == images[0].tobytes()
    assert pipeline(**run_kwargs({})).images[0].tobytes() == images[0].tobytes()  # outside a trace, as before


def test_the_pipelines_own_number_of_steps_holds_in_a_trace() -> None:
    pipeline = small_sd3()
    run = {k: v for k, v in run_kwargs({}).items() if k != "num_inference_steps"}
    seen = visited(DiT(pipeline), [Site(0, "img", "gate_msa")], **run)
    assert len(seen) == 28  # a traced run would take one


def test_an_error_in_the_sink_comes_out_and_the_next_run_works() -> None:
    pipeline = small_sd3()
    dit, site = DiT(pipeline), Site(0, "img", "resid_post")

    def fail(call: Call, site: Site, value: torch.Tensor) -> None:
        raise ZeroDivisionError("of the sink")

    with pytest.raises(ZeroDivisionError, match="of the sink"):
        tracing.visit(dit, [site], fail, **run_kwargs({}))
    assert len(visited(dit, [site], **run_kwargs({}))) == 2


def test_a_pipeline_is_wrapped_once_and_again_with_another_transformer() -> None:
    pipeline = small_sd3()
    model = tracing.wrap(pipeline)
    assert tracing.wrap(pipeline) is model
    assert DiT(pipeline).model is model
    assert model.pipeline is pipeline
    pipeline.transformer = small_sd3(seed=1).transformer
    assert tracing.wrap(pipeline) is not model


def test_free_tracing_through_dit_model() -> None:
    dit = DiT(small_sd3())
    got: list[torch.Tensor] = []
    with dit.model.generate("a dog", num_inference_steps=3, max_sequence_length=8) as tracer:
        for _ in tracer.iter[0:3]:
            got.append(dit.model.transformer.transformer_blocks[0].output[1].clone())
    assert [tuple(x.shape) for x in got] == [(2, 64, 32)] * 3
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_call_is_taken_before_the_transformer_runs(family: str) -> None:
    make, more = FAMILIES[family]
    pipeline = make()
    ran: list[int] = []
    pipeline.transformer.register_forward_hook(lambda *_: ran.append(1))
    seen: list[dict[str, Any]] = []
    call, arguments = tracing.first_call(DiT(pipeline), **run_kwargs(more))
    assert ran == []
    handle = pipeline.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    pipeline(**run_kwargs(more))
    handle.remove()
    assert (call.index, call.step) == (0, 0)
    assert "cond" in call.rows
    assert set(arguments) == set(seen[0])
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, seen[0][name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_visits_as_a_run_does(family: str) -> None:
    make, more = FAMILIES[family]
    pipeline = make()
    dit = DiT(pipeline)
    call, arguments = tracing.first_call(dit, **run_kwargs(more))
    sites = [Site.parse(name) for name in dit.sites()]
    got: list[tuple[Call, Site, torch.Tensor]] = []
    tracing.visit_forward(dit, sites, lambda *item: got.append(item), call, arguments)
    run = [item for item in visited(dit, sites, **run_kwargs(more)) if item[0].index == 0]
    assert [s for _, s, _ in got] == [s for _, s, _ in run]
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(got, run, strict=True))
