"""What a store says of where it comes from, and what two runs must share to be one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from madit.prompts import PromptSet

if TYPE_CHECKING:
    from madit.dit import DiT

_DECLARED = "_madit_edits"
LIBRARIES = ("torch", "diffusers", "transformers", "nnsight", "zarr", "xarray", "numpy")


def common_settings(dit: DiT, prompts: PromptSet) -> dict[str, Any]:
    """Settings that every kind of recording has: model, weights, dtype, scheduler, prompts and active edits."""
    model, scheduler = dit.fingerprint, dit.pipeline.scheduler
    return {
        "transformer": model.transformer,
        "config_hash": model.config_hash,
        "weights_hash": model.weights_hash,
        "dtype": str(dit.transformer.dtype).removeprefix("torch."),
        "scheduler": {"class": type(scheduler).__name__, **{k: plain(v) for k, v in _config(scheduler).items()}},
        "prompts": prompts.sha256,
        "edits": edits(dit),
    }


def about(dit: DiT, prompts: PromptSet, dtype: str) -> dict[str, Any]:
    """Root attributes of a store: model, library versions, prompt set, dtype of the residual stream, depth, time."""
    return {
        "model": dit.fingerprint.model_dump_json(),
        "libraries": json.dumps({name: version(name) for name in LIBRARIES}),
        "prompt_set": json.dumps({"name": prompts.name, "sha256": prompts.sha256, "n": len(prompts)}),
        "dtype": dtype,
        "n_blocks": len(dit.blocks),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def declared(dit: DiT, name: str, arguments: Any) -> Iterator[None]:
    """Let recordings made inside know of an edit by its arguments, which its hooks do not tell."""
    active = vars(dit.transformer).setdefault(_DECLARED, [])
    text = f"{name} {json.dumps(plain(arguments))}"
    active.append(text)
    try:
        yield
    finally:
        active.remove(text)


def edits(dit: DiT) -> list[str]:
    """Declared edits, and hooks on the transformer's modules: a run under an edit is not the run without it."""
    found = list(vars(dit.transformer).get(_DECLARED, ()))
    for name, module in dit.transformer.named_modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, kind).values()
            found += [f"{name}{kind}: {getattr(hook, '__qualname__', type(hook).__qualname__)}" for hook in hooks]
    return [edit for edit in found if not edit.endswith("CallTracker._before")]  # it only counts


def plain(value: Any) -> Any:
    """A value as JSON: containers and numbers as they are, tensors, arrays and images by hash, others by class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.ascontiguousarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        return f"{type(value).__name__} {array.shape} sha256:{digest}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _config(component: Any) -> dict[str, Any]:
    return {k: v for k, v in dict(component.config).items() if not k.startswith("_")}
