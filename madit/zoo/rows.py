"""Writing single rows of a transformer's weights, found through its adapter, and remembering them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from madit import arch


class Rows:
    """Writes slices of named parameters and buffers, and can write them again.

    Args:
        transformer: the model that is edited in place.

    Attributes:
        written: (tensor name, dimension) -> index along that dimension -> what was written there.
    """

    def __init__(self, transformer: Any):
        self.transformer = transformer
        self.family = arch.family_of(transformer)
        self.blocks = arch.bind(transformer, self.family)
        self.width = arch.width(transformer, self.family)
        self.written: dict[tuple[str, int], dict[int, Tensor]] = {}

    @torch.no_grad()
    def set(self, name: str, rows: Sequence[int], values: Tensor | float, dim: int = 0) -> None:
        """Write `values` (broadcast over what the rows hold) and remember them."""
        tensor = operator.attrgetter(name)(self.transformer)
        index = torch.tensor(list(rows), device=tensor.device)
        shape = tensor.index_select(dim, index).shape
        new = torch.as_tensor(values, dtype=tensor.dtype, device=tensor.device).expand(shape)
        tensor.index_copy_(dim, index, new)
        held = self.written.setdefault((name, dim), {})
        held.update(zip(rows, (v.clone() for v in new.unbind(dim)), strict=True))

    def linear(self, name: str, rows: Sequence[int], weight: Tensor | float, bias: Tensor | float) -> None:
        """Write rows of a Linear (or convolution): its output at `rows` is then weight x + bias."""
        self.set(f"{name}.weight", rows, weight)
        self.set(f"{name}.bias", rows, bias)

    def adaln(self, block: int, parameter: str, channels: Sequence[int], stream: str = "img") -> tuple[str, list[int]]:
        """Where the AdaLN parameter of these channels is made: name of the Linear, and its rows."""
        bound = self.blocks[block]
        for m in bound.modulation():
            if parameter in m.names and (m.stream == stream or len(bound.modulation()) == 1):
                start = m.names.index(parameter) * self.width
                return f"{bound.fqn}.{m.module}", [start + c for c in channels]
        raise KeyError(f"{bound.fqn} has no {parameter} in stream {stream}")

    def freeze(self) -> tuple[tuple[str, int, Tensor, Tensor], ...]:
        """What was written: (tensor name, dimension, index, values) for each tensor, to be written again."""
        return tuple(
            (name, dim, torch.tensor(list(held)), torch.stack(list(held.values()), dim))
            for (name, dim), held in self.written.items()
        )


@torch.no_grad()
def write_again(transformer: Any, writes: tuple[tuple[str, int, Tensor, Tensor], ...]) -> None:
    """Write what `Rows.freeze` returned into this model or a copy of it."""
    for name, dim, index, values in writes:
        tensor = operator.attrgetter(name)(transformer)
        tensor.index_copy_(dim, index.to(tensor.device), values.to(tensor))
