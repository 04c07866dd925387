"""Pictures of the same samples under edits, controls and guidance: what the demo and the tables in docs compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from madit.channels import ChannelSet
from madit.configs import GuidanceConfig
from madit.dit import DiT
from madit.evaluation import compare
from madit.guidance import guide
from madit.intervention import controls, intervene

BASELINE = "baseline"


@dataclass(frozen=True)
class Samples:
    """What is drawn: prompts with the labels that a classifier should read, and how.

    Attributes:
        prompts: one for each sample; sample i uses seed `seed + i`.
        labels: factor -> true index of each sample.
        real: pictures that the prompts describe, (n, row, column, rgb) in [0, 1]; the reference for detail.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        batch: samples that run together.
        seed: of the first sample.
    """

    prompts: Sequence[str]
    labels: Mapping[str, np.ndarray]
    real: np.ndarray
    steps: int = 20
    guidance_scale: float = 2.0
    batch: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Condition:
    """One way to run the model.

    Attributes:
        name: what the tables call it.
        context: opened around the pipeline's calls.
        control: whether it is a control.
        pipe_kwargs: other arguments of the pipeline.
    """

    name: str
    context: Callable[[], AbstractContextManager] = nullcontext
    control: bool = False
    pipe_kwargs: Mapping[str, Any] = field(default_factory=dict)


def shapes_samples(n: int, seed: int = 0, **how: Any) -> Samples:
    """`n` samples of the shapes set, with captions, labels and real pictures drawn from `seed`.

    >>> samples = shapes_samples(4)
    >>> len(samples.prompts), samples.real.shape
    (4, (4, 32, 32, 3))
    """
    from madit.zoo import shapes_data

    rng = np.random.default_rng([20_000, seed])
    labels = shapes_data.sample_labels(rng, n)
    real = np.moveaxis(shapes_data.render(labels, rng), 1, -1)
    return Samples(shapes_data.captions(labels), labels, real, seed=10_000 * (seed + 1), **how)


def generate(
    dit: DiT, samples: Samples, condition: Condition, advance: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Pictures (n, row, column, rgb), uint8, each from its own CPU generator."""
    import torch

    pictures = []
    with dit.quiet(), condition.context():
        for start in range(0, len(samples.prompts), samples.batch):
            prompts = list(samples.prompts[start : start + samples.batch])
            seeds = range(samples.seed + start, samples.seed + start + len(prompts))
            kwargs = {"num_inference_steps": samples.steps, "guidance_scale": samples.guidance_scale}
            result = dit.pipeline(
                prompts,
                generator=[torch.Generator().manual_seed(s) for s in seeds],
                output_type="np",
                **{**kwargs, **condition.pipe_kwargs},
            )
            pictures.append(result.images)
            for _ in prompts:
                advance()
    return np.rint(255 * np.clip(np.concatenate(pictures), 0, 1)).astype(np.uint8)


def disruptions(dit: DiT, channels: ChannelSet, block: int, seed: int = 0) -> Iterator[Condition]:
    """The massive channels set to zero in the state entering `block`, with the controls of method.md."""
    random = controls(channels, "random", seed=seed)
    matched = controls(channels, "norm_matched", seed=seed)
    yield Condition("set to zero", lambda: intervene(dit, channels, blocks=[block]))
    yield Condition("random channels to zero", lambda: intervene(dit, random, blocks=[block]), control=True)
    yield Condition("norm-matched vector", lambda: intervene(dit, matched, blocks=[block], mode="add"), control=True)
    yield Condition("set to their mean", lambda: intervene(dit, channels, blocks=[block], mode="mean"), control=True)
    yield Condition(
        "zero, LayerNorm frozen", lambda: intervene(dit, channels, blocks=[block], layernorm="frozen"), control=True
    )


def guidances(
    dit: DiT, config: GuidanceConfig, scales: Sequence[float], more_cfg: float, seed: int = 0
) -> Iterator[Condition]:
    """Detail Guidance at some scales; the same with random channels; and simply more classifier-free guidance."""
    for scale in scales:
        changed = config.replace(scale=scale)
        yield Condition(guided(scale), lambda changed=changed: guide(dit, changed))
    used = ChannelSet.of({config.block - 1: config.channels}, len(dit.blocks), dit.width)
    drawn = controls(used, "random", seed=seed)
    random = drawn.at(config.block - 1)  # type: ignore[union-attr]
    other = config.replace(channels=random, scale=scales[len(scales) // 2])
    yield Condition(f"DG, random channels, w = {other.scale:g}", lambda: guide(dit, other), control=True)
    yield Condition(f"CFG only, {more_cfg:g}", control=True, pipe_kwargs={"guidance_scale": more_cfg})


def guided(scale: float) -> str:
    """Name of the condition under Detail Guidance at scale w."""
    return f"DG, w = {scale:g}"


def tabulate(pictures: Mapping[str, np.ndarray], samples: Samples, classifiers: Any, seed: int = 0) -> xr.Dataset:
    """Metrics of each condition: power, noise and detail against real pictures, layout against the baseline.

    Returns:
        Dataset over `condition` as `madit.evaluation.compare` makes it.
    """
    real = np.rint(255 * samples.real).astype(np.uint8)
    table = compare(pictures, real, classifiers, samples.labels, baseline=BASELINE, seed=seed, paired=False)
    paired = compare(pictures, pictures[BASELINE], baseline=BASELINE, seed=seed, paired=True)
    layout = paired[[name for name in paired.data_vars if str(name).startswith("layout")]]
    for values in layout.data_vars.values():
        values.attrs["long_name"] = str(values.attrs.get("long_name", "")).replace("the reference", "the baseline")
    return table.merge(layout)
