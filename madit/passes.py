"""A second forward through the same weights that observers of the first do not see.

A degraded branch, or a clean one beside an edited one, must not look like another call of the transformer to nnsight
or to a recording: their counts of calls would shift. So the pass runs on a shadow of the module tree, which shares
every parameter and every hook of the blocks, but has neither nnsight's controllers nor the transformer's own hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def shadow(module: nn.Module) -> nn.Module:
    """A copy of the module tree that shares parameters, buffers and hooks' functions; nnsight is left out.

    Hooks registered on the copy do not reach the original.
    """
    clone = type(module).__new__(type(module))
    state = dict(vars(module))
    state["_modules"] = {name: None if m is None else shadow(m) for name, m in module._modules.items()}
    state.update({name: state[name].copy() for name in _HOOKS})
    if type(state.get("forward")).__module__.partition(".")[0] == "nnsight":
        del state["forward"]
        body = getattr(state.pop("__nnsight__", None), "original", None)
        if body is not None and body is not type(module).forward:  # what another library had put there before
            state["forward"] = MethodType(body, clone)
    vars(clone).update(state)
    return clone


def shadow_transformer(transformer: nn.Module) -> nn.Module:
    """A `shadow` without the transformer's own hooks, which count its calls or would start another pass.

    A `forward` that another library put on the instance (offloading) is bound to the original and would run that, so
    the class's own is used: the pass happens during a call, when the weights are where they must be.
    """
    clone = shadow(transformer)
    clear_hooks(clone)
    vars(clone).pop("forward", None)
    return clone


def clear_hooks(module: nn.Module) -> None:
    """Drop the hooks of one module of a shadow."""
    for name in _HOOKS:
        vars(module)[name].clear()


def replay(clone: nn.Module, forward: Callable[..., Any]) -> None:
    """Let one block of a shadow return what `forward` does, its own hooks included."""
    clear_hooks(clone)
    vars(clone)["forward"] = forward


def bound(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, with dictionaries copied: SD3's forward pops from `joint_attention_kwargs`."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return {k: dict(v) if isinstance(v, dict) else v for k, v in named.items()}


def take_rows(value: Any, rows: slice, n: int) -> Any:
    """The rows of every batched tensor (first axis of size `n`) inside lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and value.shape[0] == n else value
    if isinstance(value, dict):
        return {k: take_rows(v, rows, n) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(take_rows(v, rows, n) for v in value)
    return value


def prediction(output: Any) -> torch.Tensor:
    """The tensor in a transformer's output, a tuple or an output class."""
    return output[0] if isinstance(output, tuple) else output.sample


def with_prediction(output: Any, value: torch.Tensor) -> Any:
    """The output with another tensor in it."""
    return (value, *output[1:]) if isinstance(output, tuple) else type(output)(sample=value)
