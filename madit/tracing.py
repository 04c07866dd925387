"""Visits a model's sites in forward order while its pipeline runs; the only module that imports nnsight."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from nnsight.modeling.diffusion import DiffusionModel, _PipelineModule
from torch import Tensor

from madit.arch import BoundBlock, Modulation, Update
from madit.calls import Call, track
from madit.sites import Site

if TYPE_CHECKING:
    from madit.dit import DiT

Sink = Callable[[Call, Site, Tensor], None]
_Emit = Callable[[Site, Tensor], None]

_END = "'.*' was never reached: the loop asked for a step the run did not make"
_ATTRIBUTE = "_madit_nnsight"


def wrap(pipeline: Any) -> DiffusionModel:
    """The nnsight model over a pipeline that is already loaded; the same one at every call.

    `DiffusionModel(pipeline)` would take the pipeline for a hub id; `_PipelineModule` is what it builds itself.
    """
    model = pipeline.__dict__.get(_ATTRIBUTE)
    if model is None or model._module.transformer is not pipeline.transformer:
        model = DiffusionModel(_PipelineModule(pipeline))
        model.pipeline = pipeline
        object.__setattr__(pipeline, _ATTRIBUTE, model)
    return model


def visit(dit: DiT, sites: Iterable[Site], sink: Sink, **run: Any) -> Any:
    """Run the pipeline and hand the value of each site, in each call of the transformer, to `sink`.

    Every block is followed by an nnsight worker of its own, so a call that leaves blocks out (skip-layer guidance) or
    a number of calls that nobody knows beforehand needs no special case. Within a call, sites come in forward order.

    Args:
        dit: the model.
        sites: which sites; others cost nothing.
        sink: called with the `Call`, the `Site` and the live tensor, (row, token, channel) or for AdaLN parameters
            (row, channel); rows are the whole batch of the call. Later operations of the model may write over the
            tensor: copy or reduce at once.
        **run: arguments of the pipeline.

    Returns:
        What the pipeline returns.
    """
    wanted = set(sites)
    blocks = [b for b in dit.blocks if any(site.block == b.index for site in wanted)]
    model = wrap(dit.pipeline)
    steps = run.get("num_inference_steps")
    if steps is None:  # a traced run would take one step
        steps = inspect.signature(type(dit.pipeline).__call__).parameters["num_inference_steps"].default
    run = {**run, "num_inference_steps": steps}
    with track(dit.pipeline, dit.family) as tracker, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_END)  # how an open loop ends

        def emit(site: Site, value: Tensor) -> None:
            if site in wanted and tracker.current is not None:
                sink(tracker.current, site, value)

        with model.generate(num_inference_steps=steps) as tracer:
            with tracer.invoke(**run):
                result = tracer.result.save()
            for block in blocks:
                envoy = model.get(f"transformer.{block.fqn}")
                with tracer.invoke():
                    _follow(tracer, envoy, block, wanted, emit)
    return result


def visit_forward(dit: DiT, sites: Iterable[Site], sink: Sink, call: Call, arguments: dict[str, Any]) -> None:
    """Run the transformer once, outside a pipeline, and hand the value of each site to `sink` as `visit` does.

    Args:
        dit: the model.
        sites: which sites.
        sink: as in `visit`.
        call: the label that the sink gets.
        arguments: keyword arguments of the transformer's forward.
    """
    wanted = set(sites)
    model = wrap(dit.pipeline)

    def emit(site: Site, value: Tensor) -> None:
        if site in wanted:
            sink(call, site, value)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_END)
        with model.transformer.trace() as tracer:
            with tracer.invoke(**arguments):
                pass
            for block in dit.blocks:
                if any(site.block == block.index for site in wanted):
                    envoy = model.get(f"transformer.{block.fqn}")
                    with tracer.invoke():
                        _follow(tracer, envoy, block, wanted, emit)


def _follow(tracer: Any, envoy: Any, block: BoundBlock, wanted: set[Site], emit: _Emit) -> None:
    """Read one block at each of its calls; requests must come in the order in which the block computes."""
    kinds = {(site.stream, site.kind) for site in wanted if site.block == block.index}
    updates = [u for u in block.updates() if (u.stream, u.kind) in kinds]
    modulation = [m for m in block.modulation() if _needed(m, kinds, updates)]
    posts = [s for s in block.streams() if (s, "resid_post") in kinds]
    for _ in tracer.iter[:]:
        states = _states(block, *envoy.inputs)
        for stream, state in states.items():
            emit(Site(block.index, stream, "resid_pre"), state)
        gates: dict[tuple[str, str], Tensor] = {}
        for m in modulation:
            for name, value in zip(m.names, envoy.get(m.module).output.chunk(len(m.names), dim=-1), strict=True):
                gates[m.stream, name] = value
                emit(Site(block.index, m.stream, name), value)
        for module, group in groupby(updates, key=lambda u: u.module):
            output = envoy.get(module).output
            for u in group:
                gate = gates[u.stream if (u.stream, u.gate) in gates else "img", u.gate]
                value = _part(output, u, states["txt"].shape[1])
                emit(Site(block.index, u.stream, u.kind), rearrange(gate, "row channel -> row 1 channel") * value)
        if posts:
            output = envoy.output
            for stream in posts:
                emit(Site(block.index, stream, "resid_post"), output[block.table.outputs[stream]])


def _needed(modulation: Modulation, kinds: set[tuple[str, str]], updates: list[Update]) -> bool:
    gates = {u.gate for u in updates}  # one projection may serve both streams (Flux single blocks)
    return any((modulation.stream, name) in kinds or name in gates for name in modulation.names)


def _states(block: BoundBlock, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    names = list(inspect.signature(type(block.module).forward).parameters)[1:]  # type: ignore[attr-defined]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {stream: given[name] for stream, name in block.table.inputs.items()}


def _part(output: Any, update: Update, text_tokens: int) -> Tensor:
    value = output if update.index is None else output[update.index]
    if not update.joint:
        return value
    return value[:, :text_tokens] if update.stream == "txt" else value[:, text_tokens:]


def first_call(dit: DiT, **run: Any) -> tuple[Call, dict[str, Any]]:
    """Run a pipeline up to its first conditional call of the transformer, and return that call and its arguments.

    The transformer does not run, so this costs the text encoding. Rows are those of the whole batch.
    """
    seen: dict[str, Any] = {}
    names = list(inspect.signature(type(dit.transformer).forward).parameters)[1:]

    with track(dit.pipeline, dit.family) as tracker:

        def stop(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.update(call=tracker.current, kwargs={**dict(zip(names, args, strict=False)), **kwargs})
            raise _Reached

        handle = dit.transformer.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            dit.pipeline(**run)
        except _Reached:
            pass
        finally:
            handle.remove()
    return seen["call"], seen["kwargs"]


class _Reached(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a run at its first call."""
