"""What an adapter says about a DiT family: a table of module paths and argument names, no code of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from madit.sites import Site


@dataclass(frozen=True)
class Modulation:
    """The AdaLN projection of one stream: `module`'s output is cut into `names`, in order, along channels."""

    stream: str
    module: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Update:
    """One residual update, `gate * module's output`.

    `index` picks from a tuple output (None: the output itself). `joint` marks an output whose token axis is text
    then image. `norm` is the LayerNorm that the module reads through.
    """

    kind: str
    stream: str
    module: str
    index: int | None
    gate: str
    joint: bool = False


@dataclass(frozen=True)
class BlockTable:
    """One block class.

    Attributes:
        cls: class name in diffusers.
        kind: label for the `block_kind` coordinate, e.g. `"dual"` or `"single"`.
        inputs: stream -> name of the forward argument that holds its residual state.
        outputs: stream -> position in the tuple that forward returns.
        modulation: AdaLN projections in forward order.
        updates: residual updates in forward order.
        norms: image-stream LayerNorm modules (without affine) in forward order, for frozen-LayerNorm edits.
        joint_norms: those among `norms` that see text tokens then image tokens.
    """

    cls: str
    kind: str
    inputs: dict[str, str]
    outputs: dict[str, int]
    modulation: tuple[Modulation, ...]
    updates: tuple[Update, ...]
    norms: tuple[str, ...]
    joint_norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One DiT family.

    Attributes:
        name: short name, e.g. `"sd3"`.
        transformers: transformer class names that this adapter has been shown to fit.
        stacks: names of the block lists in forward order.
        blocks: block class name -> table.
        arguments: what the transformer's forward calls its inputs: keys among `latent`, `timestep`, `text_tokens`,
            `pooled_text`, `guidance`.
        timestep_scale: what the transformer receives divided by the scheduler's timestep.
        cfg: how the classic pipeline runs classifier-free guidance: one batch `[uncond; cond]` or two calls, cond
            first.
        embed: module whose output is the image stream entering block 0.
        final_norm: the LayerNorm after the last block.
        packed: latents reach the transformer as (batch, token, channel), with the grid in the argument `img_ids`.
    """

    name: str
    transformers: tuple[str, ...]
    stacks: tuple[str, ...]
    blocks: dict[str, BlockTable]
    arguments: dict[str, str]
    timestep_scale: float
    cfg: Literal["batched", "two_calls"]
    embed: str
    final_norm: str
    packed: bool = False
    notes: str = ""


@dataclass(frozen=True)
class BoundBlock:
    """One block of a real model: its place, its module and what its class's table says of it."""

    index: int
    fqn: str
    module: object = field(repr=False, compare=False)
    table: BlockTable = field(repr=False)

    def streams(self) -> tuple[str, ...]:
        """Streams whose state leaves this block (SD3's last block returns no text)."""
        last_text = getattr(self.module, "context_pre_only", False)
        return tuple(s for s in self.table.inputs if not (last_text and s == "txt"))

    def modulation(self) -> tuple[Modulation, ...]:
        """AdaLN projections that this instance has, with the names that fit their width."""
        return tuple(_fit(m, self.module) for m in self.table.modulation if _has(self.module, m.module))

    def updates(self) -> tuple[Update, ...]:
        """Residual updates that this instance has."""
        streams = self.streams()
        return tuple(u for u in self.table.updates if u.stream in streams and _has(self.module, u.module))

    def sites(self) -> list[Site]:
        """Sites of this block in forward order."""
        streams = self.streams()
        kinds = [(s, "resid_pre") for s in self.table.inputs]
        kinds += [(m.stream, name) for m in self.modulation() for name in m.names]
        kinds += [(u.stream, u.kind) for u in self.updates()]
        kinds += [(s, "resid_post") for s in streams]
        return [Site(self.index, stream, kind) for stream, kind in kinds]


def _has(module: object, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


# Names by number of chunks, for blocks of one class that differ by instance (dual attention; SD3's last text norm,
# an AdaLayerNormContinuous, chunks scale before shift).
_CHUNKS = {
    2: ("scale_msa", "shift_msa"),
    6: ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"),
    9: ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp",
        "shift_msa2", "scale_msa2", "gate_msa2"),
}  # fmt: skip


def _fit(modulation: Modulation, module: object) -> Modulation:
    for name in modulation.module.split("."):
        module = getattr(module, name)
    chunks = module.out_features // module.in_features  # type: ignore[attr-defined]
    if chunks == len(modulation.names):
        return modulation
    return Modulation(modulation.stream, modulation.module, _CHUNKS[chunks])
