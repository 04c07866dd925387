"""Plant massive activations: ground truth at a channel, block, magnitude and driver of one's choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from madit.errors import ConfigError, SiteError, UnsupportedPipelineError
from madit.zoo import driving
from madit.zoo import refit as refitting
from madit.zoo.rows import Rows, write_again


@dataclass(frozen=True)
class Planting:
    """Planted channels and the closed form of their values.

    Attributes:
        channels: planted channels.
        block: block whose output is the first to carry them; so do all later ones.
        magnitude: |h| in the middle of the driver's range, in the unit of the residual stream.
        driver: what the values depend on.
        signs: +1 or -1 for each channel.
        stream: `"img"` or `"txt"`.
        exact: whether nothing else writes to the channels, so that `value` is all of h there.
    """

    channels: tuple[int, ...]
    block: int
    magnitude: float
    driver: str
    signs: tuple[int, ...]
    stream: str
    exact: bool
    _drive: Callable[..., Tensor] = field(repr=False, compare=False)
    _writes: tuple = field(repr=False, compare=False)
    _transformer: Any = field(repr=False, compare=False)

    def value(self, **inputs: Tensor) -> Tensor:
        """The planted channels' token mean at the output of `block` and of every later block.

            h[c] = sign[c] * magnitude * drive(inputs)

        computed from the inputs and the embedders' weights, without running a block.

        Args:
            **inputs: those that the driver reads, batch first, as the transformer receives them: `timestep` (batch,),
                `guidance` (batch,), `pooled_text` (batch, channel), `text_tokens` (batch, token, channel) and
                `latent` (batch, channel, row, column), or (batch, token, channel) where packed; driver
                `"text_tokens"` reads the number of image tokens off the latent.

        Returns:
            (batch, planted channel); a batch of one where the driver reads nothing.

        Raises:
            ConfigError: if an input that the driver reads is missing.
        """
        signs = torch.tensor(self.signs, dtype=torch.float32)
        return self.magnitude * self._drive(inputs).detach().float().cpu()[:, None] * signs

    def reimpose(self, transformer: Any = None) -> None:
        """Write the planted rows again, as after an optimiser step, into the planted model or a copy of it."""
        write_again(self._transformer if transformer is None else transformer, self._writes)


def plant(
    pipeline: Any,
    channels: Sequence[int],
    block: int,
    magnitude: float,
    driver: str = "constant",
    *,
    signs: Sequence[int] | None = None,
    depth: float = 0.5,
    interaction: float = 0.0,
    exact: bool = True,
    refit: Iterable[Mapping[str, Any]] | None = None,
    stream: str = "img",
    prompts: Sequence[str] = driving.PROMPTS,
    max_sequence_length: int = 64,
    seed: int = 0,
) -> Planting:
    """Make channels massive at the output of a block and of all later blocks, by editing weights in place.

        h[n, c] += gate[c] * bias[c],   gate = W SiLU(temb) + b,   temb = time(t) + text(pooled) (+ guidance(g))

    The write is the output bias of the block's MLP times its AdaLN gate: the same at every token. A driver that goes
    through temb gets a few dims of it for itself: its embedder's rows there are set, the other embedders' zeroed. The
    value falls with the timestep, as natural ones do, and rises with guidance.
    `latent` is written by the patch embedding, h[n, c] = magnitude (1 + depth * mean of patch n), and `text_tokens` by
    an attention head of block 0 that averages over all tokens, so both need `block=0` (`latent` is massive in the
    embedding too). Flux's single-stream blocks write to the text tokens as well.

    Args:
        pipeline: an SD3, SD3.5 or Flux pipeline; its transformer is changed.
        channels: image-stream channels to plant.
        block: block whose output is the first to be massive.
        magnitude: |h| in the middle of the driver's range, in the unit of the residual stream.
        driver: `"constant"`, `"timestep"`, `"pooled_text"`, `"guidance"`, `"both"` (timestep and pooled text),
            `"latent"` or `"text_tokens"`.
        signs: +1 or -1 for each channel, default +1; opposite pairs leave the mean that LayerNorm subtracts alone.
        depth: the driver moves the value by this share of `magnitude`, up and down, over the calibration inputs.
        interaction: for `"both"`, the share of `depth` that goes through temb dims which both inputs enter, so that
            SiLU makes them interact.
        exact: remove every other write to the channels, so that the closed form is all there is. Else the value is
            on top of what other blocks write.
        refit: keyword arguments of some forward calls of the transformer; given, the later blocks' AdaLN rows are
            refitted on them so that the model's function stays nearly the same, and they do not see the channels.
        stream: `"img"`, or `"txt"` for a decoy (drivers that go through a gate).
        prompts: calibration of the drivers that read text.
        max_sequence_length: at which these prompts are encoded.
        seed: of the random directions in which a driver reads pooled text.

    Returns:
        A `Planting`, with the closed form in `value`.

    Raises:
        SiteError: if the model has no such block, stream or channel.
        ConfigError: if the other arguments make no sense together.
        UnsupportedPipelineError: if the readers of a Flux dual-stream block are to be refitted, since a single-stream
            block reads text tokens, which lack the planted channels, through the same norm.

    >>> pipeline = small_sd3()
    >>> planting = plant(pipeline, [5, 9], block=1, magnitude=300.0, signs=(1, -1))
    >>> planting.value()
    tensor([[ 300., -300.]])

    Massive activations as biases: Sun et al. 2024, arXiv 2402.17762; their AdaLN gates: arXiv 2510.11538.
    """
    rows = Rows(pipeline.transformer)
    channels = tuple(int(c) for c in channels)
    signs = tuple(signs) if signs is not None else (1,) * len(channels)
    _check(rows, channels, signs, block, magnitude, driver, stream, refit is not None)
    drive = driving.DRIVERS[driver](
        driving.Request(
            pipeline, rows, channels, block, stream, depth, interaction, tuple(prompts), max_sequence_length, seed
        )
    )
    finish = None
    if refit is not None:
        scale = magnitude * torch.tensor(signs, dtype=torch.float32)

        def planted(h: Tensor, inputs: Mapping[str, Any]) -> Tensor:
            names = rows.family.arguments
            value = drive.value({k: inputs[v] for k, v in names.items() if inputs.get(v) is not None})
            value = (value[:, None] * scale.to(value))[:, None]
            return value.expand(*h.shape[:-1], -1) if exact else value + h[..., list(channels)]

        finish = refitting.measure(rows, block, channels, planted, refit)
    if exact:
        _silence(rows, channels, stream)
    drive.write(magnitude, signs)
    writes = rows.freeze()  # what makes the channels massive; the refitted readers are free to learn
    if finish is not None:
        finish()
    return Planting(
        channels, block, float(magnitude), driver, signs, stream, exact, drive.value, writes, rows.transformer
    )


def _check(
    rows: Rows, channels: tuple[int, ...], signs: tuple[int, ...], block: int, magnitude: float, driver: str,
    stream: str, refit: bool,
) -> None:  # fmt: skip
    if not 0 <= block < len(rows.blocks):
        raise SiteError(f"expected a block of 0..{len(rows.blocks) - 1}, got {block}")
    if stream not in rows.blocks[block].streams():
        raise SiteError(f"expected a stream of {rows.blocks[block].streams()} at block {block}, got {stream!r}")
    if not channels or len(set(channels)) < len(channels) or not all(0 <= c < rows.width for c in channels):
        raise SiteError(f"expected distinct channels of 0..{rows.width - 1}, got {list(channels)}")
    if len(signs) != len(channels) or any(s not in (1, -1) for s in signs):
        raise ConfigError(f"expected a sign, 1 or -1, for each of {len(channels)} channels, got {list(signs)}")
    if not (math.isfinite(magnitude) and magnitude > 0):
        raise ConfigError(f"expected a positive magnitude, got {magnitude}")
    if driver not in driving.DRIVERS:
        raise ConfigError(f"expected a driver of {', '.join(driving.DRIVERS)}; got {driver!r}")
    if driver in driving.AT_FIRST_BLOCK and (block != 0 or stream != "img"):
        raise ConfigError(f"expected block 0 of the image stream for driver {driver!r}, got {block}, {stream!r}")
    if refit and (stream != "img" or any(b.table.joint_norms for b in rows.blocks[block + 1 :])):
        single = rows.blocks[block].table.joint_norms
        if stream != "img" or not single:
            raise UnsupportedPipelineError(
                f"expected readers of the image stream alone, or a single-stream block, to refit; got block {block}, "
                f"stream {stream!r}, of {type(rows.transformer).__name__}: plant without refit, or in a later block"
            )


def _silence(rows: Rows, channels: tuple[int, ...], stream: str) -> None:
    """Nothing writes to these channels: embedding rows and AdaLN gate rows are zero."""
    embed = rows.family.embed if stream == "img" else "context_embedder"
    if stream == "img" and rows.family.name == "sd3":
        rows.set(f"{embed}.pos_embed", channels, 0.0, dim=2)
        embed = f"{embed}.proj"
    rows.linear(embed, channels, 0.0, 0.0)
    for block in rows.blocks:
        for update in block.updates():
            if update.stream == stream:
                rows.linear(*rows.adaln(block.index, update.gate, channels, stream), 0.0, 0.0)
