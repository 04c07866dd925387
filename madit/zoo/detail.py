"""Construct `shapes-detail`: a model whose local detail hangs on planted massive channels at one block.

It is a positive control for the instruments, never evidence for a claim: two channels are planted in the trained
`shapes` model (`planting.plant`), and the model is fine-tuned so that with these channels set to zero in the state
entering block 4 it predicts the 5x5-blurred picture. The planted values are written again after every step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from madit.zoo import classifiers, training
from madit.zoo.planting import plant

CHANNELS = 2
BLOCK = 3  # whose output is massive; zeroing acts on the state entering the next block
MAGNITUDE = 100.0
SOFTNESS = 0.05


@contextmanager
def zeroed(transformer: nn.Module, channels: tuple[int, ...], block: int) -> Iterator[None]:
    """Set image channels to zero in the state entering `block` (differentiable)."""

    def edit(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        keep = torch.ones(kwargs["hidden_states"].shape[-1])
        keep[list(channels)] = 0
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * keep}

    handle = transformer.transformer_blocks[block].register_forward_pre_hook(edit, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def detail_loss(model: training.Trainable, batch: tuple[Tensor, ...], channels: tuple[int, ...], block: int) -> Tensor:
    """Flow loss of the model as it is, plus a loss of the zeroed model towards the blurred picture.

    Half of the zeroed batch starts from sharp pictures (what Detail Guidance sees along a sharp trajectory), half from
    blurred ones (what the zeroed model sees along its own). Zeroing multiplies what every later LayerNorm returns by
    ten and more, so the second loss starts 1,000 times above the first: it enters as s log(1 + loss / s) for each
    sample, which keeps the model's own function while the zeroed one learns.
    """
    x0, ids, noise, sigma = batch
    sharp = training.flow_loss(model, (x0, ids, noise, sigma))
    blurred = classifiers.box_blur(x0)
    half = len(x0) // 2
    seen = torch.cat([x0[:half], blurred[half:]])
    with zeroed(model.transformer, channels, block):
        velocity = model(training.mix(seen, noise, sigma), sigma, ids)
    degraded = (velocity - (noise - blurred)).square().mean((1, 2, 3))
    return sharp + SOFTNESS * (degraded / SOFTNESS).log1p().mean()


@torch.no_grad()
def quiet_channels(model: training.Trainable, batch: tuple[Tensor, ...], block: int, count: int) -> tuple[int, ...]:
    """The `count` image channels with the least energy at the output of `block`: planting there costs least."""
    outputs: list[Tensor] = []
    blocks = model.transformer.transformer_blocks
    handle = blocks[block].register_forward_hook(lambda m, a, out: outputs.append(out[1]))
    x0, ids, noise, sigma = batch
    model(training.mix(x0, noise, sigma), sigma, ids)
    handle.remove()
    energy = outputs[0].square().mean((0, 1))
    return tuple(sorted(energy.argsort()[:count].tolist()))


def calibration(model: training.Trainable, batches: training.Batches, count: int = 8) -> list[dict]:
    """Inputs of the transformer on batches that training does not reach."""
    calls = []
    for step in range(count):
        x0, ids, noise, sigma = batches[10**6 + step]
        tokens, pooled = model.encode(ids)
        calls.append({"hidden_states": training.mix(x0, noise, sigma), "encoder_hidden_states": tokens,
                      "pooled_projections": pooled, "timestep": 1000 * sigma})  # fmt: skip
    return calls


def train_detail(out: Path, steps: int, seed: int, lr: float, base: Path) -> None:
    """Plant in the model whose weights are in `base` (a snapshot of `shapes`), then fine-tune."""
    pipeline = training.install(training.build_pipeline(seed), torch.load(base, weights_only=True))
    batches = training.Batches(pipeline.tokenizer, seed + 1, size=20)
    model = training.Trainable(pipeline)
    channels = quiet_channels(model, batches[10**6], BLOCK, CHANNELS)
    with torch.no_grad():
        inputs = calibration(model, batches)
    planting = plant(pipeline, channels, BLOCK, MAGNITUDE, signs=(1, -1), refit=inputs)
    facts = {"channels": channels, "block": BLOCK, "magnitude": MAGNITUDE, "base": base.name}
    out.mkdir(parents=True, exist_ok=True)
    (out / "planting.json").write_text(json.dumps(facts))
    ema = training.train(
        model,
        lambda m, step: detail_loss(m, batches[step], channels, BLOCK + 1),
        out,
        steps,
        lr=lr,
        ema_decay=0.995,
        after_step=lambda m: planting.reimpose(m.transformer),
        snapshots=(200, 500, 1000, 1500, 2000),
    )
    planting.reimpose(ema.transformer)
    training.install(pipeline, ema).save_pretrained(out / "pipeline")
