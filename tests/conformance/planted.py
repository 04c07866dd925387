"""Pipelines whose massive channels are known, the decoys that are not massive, and the inputs to run them on."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from madit import arch
from madit.zoo import driving
from madit.zoo.planting import Planting, plant
from madit.zoo.rows import Rows
from madit.zoo.small import small_flux, small_sd3, small_sd35

FAMILIES = {"sd3": small_sd3, "sd35": small_sd35, "flux": small_flux}
PIPE_KWARGS = {"height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ("a red circle", "a small blue square", "a cat with a dog", "a large green circle on a square")


def planted(family: str, driver: str, channels: Sequence[int], block: int, **more: Any) -> tuple[Any, Planting]:
    """A fresh small pipeline of the family with channels planted, and the planting."""
    pipeline = FAMILIES[family]()
    settings = {"magnitude": 600.0, "prompts": PROMPTS, "max_sequence_length": 8, **more}
    return pipeline, plant(pipeline, channels, block, driver=driver, **settings)


def n_blocks(pipeline: Any) -> int:
    """Blocks over all stacks."""
    return len(arch.bind(pipeline.transformer, arch.family_of(pipeline.transformer)))


def forward_inputs(pipeline: Any, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    """Arguments of one forward of the transformer, every row different in every input."""
    generator = torch.Generator().manual_seed(seed)
    text = driving.encode(pipeline, PROMPTS[:batch], 8)
    family = arch.family_of(pipeline.transformer)
    fraction = torch.linspace(0.1, 0.9, batch) + 0.05 * torch.rand(1, generator=generator)
    inputs = {
        "encoder_hidden_states": text["text_tokens"],
        "pooled_projections": text["pooled_text"],
        "timestep": 1000 * fraction * family.timestep_scale,
        "return_dict": False,
    }
    if not family.packed:
        return {"hidden_states": torch.randn(batch, 4, 16, 16, generator=generator), **inputs}
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    return {
        "hidden_states": torch.randn(batch, 64, 16, generator=generator),
        "img_ids": torch.stack([0 * rows, rows, columns], -1).flatten(0, 1),
        "txt_ids": torch.zeros(text["text_tokens"].shape[1], 3),
        "guidance": torch.linspace(1.5, 8.0, batch),
        **inputs,
    }


def factors(pipeline: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same inputs under the names of the factors, as `Planting.value` takes them."""
    names = arch.family_of(pipeline.transformer).arguments
    return {factor: inputs[name] for factor, name in names.items() if name in inputs}


@torch.no_grad()
def states(pipeline: Any, inputs: dict[str, Any], stream: str = "img") -> list[Tensor]:
    """The stream at each block's output, by plain hooks: (batch, token, channel) each."""
    transformer = pipeline.transformer
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]
    found: list[Tensor] = []
    position = {"txt": 0, "img": 1}[stream]
    handles = [b.register_forward_hook(lambda m, a, out: found.append(out[position])) for b in blocks]
    transformer(**inputs)
    for handle in handles:
        handle.remove()
    return found


class Spotted(nn.Module):
    """An embedding that adds a fixed pattern to one channel."""

    def __init__(self, inner: nn.Module, channel: int, pattern: Tensor):
        super().__init__()
        self.inner, self.channel, self.pattern = inner, channel, pattern

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).clone()
        h[..., self.channel] += self.pattern
        return h


def spot(pipeline: Any, channel: int, tokens: int, size: float) -> None:
    """Decoy: the channel is massive at the first `tokens` of 64 image tokens only."""
    embed = arch.family_of(pipeline.transformer).embed
    pattern = torch.where(torch.arange(64) < tokens, size, 0.0)
    setattr(pipeline.transformer, embed, Spotted(getattr(pipeline.transformer, embed), channel, pattern))


def in_one_prompt(pipeline: Any, channel: int, block: int, which: int, magnitude: float) -> None:
    """Decoy: the channel is massive for one prompt of `PROMPTS` and about zero for the others.

    The last dim of temb is solved for, from the pooled text: 3 at that prompt, -20 at the others, where SiLU is zero.
    """
    rows = Rows(pipeline.transformer)
    dim = rows.width - 1
    embedder = rows.transformer.time_text_embed
    pooled = driving.encode(pipeline, PROMPTS, 8)["pooled_text"]
    with torch.no_grad():
        read = nn.functional.silu(embedder.text_embedder.linear_1(pooled))
    target = torch.full((len(PROMPTS),), -20.0)
    target[which] = 3.0
    weight = torch.linalg.lstsq(read, target[:, None], driver="gelsd").solution[:, 0]
    rows.linear("time_text_embed.text_embedder.linear_2", [dim], weight, 0.0)
    rows.linear("time_text_embed.timestep_embedder.linear_2", [dim], 0.0, 0.0)
    if hasattr(embedder, "guidance_embedder"):
        rows.linear("time_text_embed.guidance_embedder.linear_2", [dim], 0.0, 0.0)
    gate = torch.zeros(rows.width)
    gate[dim] = 1 / nn.functional.silu(torch.tensor(3.0))
    rows.linear(*rows.adaln(block, "gate_mlp", [channel]), gate, 0.0)
    name = f"{rows.blocks[block].fqn}.ff.net.2"
    rows.linear(name, [channel], 0.0, magnitude)


def module(pipeline: Any, name: str) -> Any:
    """A part of the transformer by its dotted name."""
    return operator.attrgetter(name)(pipeline.transformer)
