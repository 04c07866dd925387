"""What planted channels can depend on, each with its weights and its closed form.

A driver is made before anything is written, since refitting runs the unplanted model first: `value` may read only
weights that the driver will write, not the model's as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from madit.errors import ConfigError
from madit.zoo.rows import Rows

PROMPTS = (
    "a red circle", "a large blue square", "a cat with a green circle", "a small dog on a square",
    "a red cat", "a green square with a red circle", "a dog", "a large circle on a small blue square",
)  # fmt: skip
AT_FIRST_BLOCK = ("latent", "text_tokens")
_DIMS = 4  # dims of temb that each source gets


@dataclass(frozen=True)
class Request:
    """The arguments of `plant` that a driver needs."""

    pipeline: Any
    rows: Rows
    channels: tuple[int, ...]
    block: int
    stream: str
    depth: float
    interaction: float
    prompts: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Drive:
    """`value(inputs)`: (batch,) multiple of the magnitude; `write(magnitude, signs)` puts it into the weights."""

    value: Callable[[Mapping[str, Tensor]], Tensor]
    write: Callable[[float, tuple[int, ...]], None]


def _need(inputs: Mapping[str, Tensor], name: str) -> Tensor:
    if inputs.get(name) is None:
        raise ConfigError(f"expected the input {name!r}, which drives the planted channels; got {sorted(inputs)}")
    return inputs[name]


def _write_bias(request: Request, magnitude: float, signs: tuple[int, ...], weight: Tensor | float, bias: float) -> None:
    """The MLP writes sign * magnitude; the AdaLN gate multiplies it by weight SiLU(temb) + bias."""
    rows, channels = request.rows, request.channels
    block = rows.blocks[request.block]
    update = [u for u in block.updates() if u.stream == request.stream][-1]
    module = operator.attrgetter(update.module)(block.module)
    last = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
    name = f"{block.fqn}.{update.module}" + (f".{last}" if last else "")
    rows.linear(name, channels, 0.0, 0.0)
    rows.set(f"{name}.bias", channels, magnitude * torch.tensor(signs, dtype=torch.float32))
    rows.linear(*rows.adaln(request.block, update.gate, channels, request.stream), weight, bias)


def constant(request: Request) -> Drive:
    """The gate is 1."""
    return Drive(lambda _: torch.ones(1), lambda magnitude, signs: _write_bias(request, magnitude, signs, 0.0, 1.0))


DRIVERS: dict[str, Callable[[Request], Drive]] = {"constant": constant}
