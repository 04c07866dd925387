"""The registry of DiT families, one file each; a family is a table (`base.Family`)."""

from __future__ import annotations

import inspect
import operator
from typing import Any

from madit.arch.base import BlockTable, BoundBlock, Family, Modulation, Update
from madit.arch.flux import FLUX
from madit.arch.sd3 import SD3
from madit.errors import UnknownFamilyError

FAMILIES: tuple[Family, ...] = (SD3, FLUX)

__all__ = ["FAMILIES", "BlockTable", "BoundBlock", "Family", "Modulation", "Update", "bind", "family_of"]


def family_of(transformer: Any) -> Family:
    """The family that a transformer belongs to, by class name, checked against the table's structure.

    Raises:
        UnknownFamilyError: if no adapter names the class, or the model's structure is not what its adapter says.
    """
    name = type(transformer).__name__
    for family in FAMILIES:
        if name in family.transformers:
            bind(transformer, family)
            return family
    known = ", ".join(t for f in FAMILIES for t in f.transformers)
    raise UnknownFamilyError(
        f"expected a transformer of a known family ({known}), got {name}; to add it, write madit/arch/<family>.py: "
        "block lists in forward order, state arguments and outputs of each block class, AdaLN projections and "
        "residual updates, and list it in madit.arch.FAMILIES"
    )


def bind(transformer: Any, family: Family) -> list[BoundBlock]:
    """The blocks of a model in forward order; refuses a model whose structure differs from the family's table."""
    blocks: list[BoundBlock] = []
    for stack in family.stacks:
        for i, module in enumerate(getattr(transformer, stack, ())):
            table = family.blocks.get(type(module).__name__)
            if table is None:
                raise UnknownFamilyError(
                    f"expected {stack} of {type(transformer).__name__} to hold {', '.join(family.blocks)}, "
                    f"got {type(module).__name__}; its table in madit.arch.{family.name} does not know this block"
                )
            blocks.append(BoundBlock(len(blocks), f"{stack}.{i}", module, table))
    if not blocks:
        raise UnknownFamilyError(f"expected blocks in {', '.join(family.stacks)}, found none; is the model loaded?")
    parameters = inspect.signature(type(transformer).forward).parameters
    missing = [a for a in family.arguments.values() if a not in parameters]
    if missing:
        raise UnknownFamilyError(
            f"expected {type(transformer).__name__}.forward to take {', '.join(missing)}, it does not; "
            f"this diffusers release is not the one madit.arch.{family.name} was written for"
        )
    return blocks


def width(transformer: Any, family: Family) -> int:
    """Number of channels of the residual stream."""
    return int(operator.attrgetter(family.final_norm)(transformer).normalized_shape[-1])
