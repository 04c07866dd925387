"""What a run's store holds: which group and array a site's value goes to, with its dimensions and coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from madit.arch import BoundBlock
from madit.axes import (
    BLOCK,
    BRANCH,
    CHANNEL,
    KIND,
    MEANING,
    QUANTILE,
    QUANTILE_LEVELS,
    SAMPLE,
    STATISTICS,
    STEP,
    STREAMS,
    TOKEN,
)
from madit.sites import UPDATES, Site
from madit.store import Array, Group

CELL = (SAMPLE, STEP, BRANCH)
Coords = dict[str, tuple[tuple[str, ...], Any]]


@dataclass(frozen=True)
class Facts:
    """Sizes and labels of a run, from its first call or its first batch.

    Attributes:
        prompts: prompt of each sample.
        seeds: seed of each sample.
        timesteps: what the transformer receives at each step.
        sigmas: noise level at each step.
        branches: branches that occur, in the order of `axes.BRANCHES`.
        tokens: stream -> number of tokens.
        grid: row and column of each image token.
        width: channels of the residual stream.
        image: height and width in pixels.
        latent: shape of one sample's final latent.
        dtype: torch dtype of the residual stream, e.g. `"bfloat16"`.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    branches: tuple[str, ...]
    tokens: Mapping[str, int]
    grid: tuple[Sequence[int], Sequence[int]]
    width: int
    image: tuple[int, int]
    latent: tuple[int, ...]
    dtype: str


def family_of(site: Site) -> str:
    """The top-level group of a site: statistics, embedding, entering, updates or modulation."""
    if site.kind == "resid_post":
        return "statistics"
    if site.kind == "resid_pre":
        return "embedding" if site.block == 0 else "entering"
    return "updates" if site.kind in UPDATES else "modulation"


def run_groups(facts: Facts, blocks: Sequence[BoundBlock], sites: Iterable[Site], values: str) -> list[Group]:
    """The groups of a run's store for these sites."""
    groups = []
    chosen: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        chosen.setdefault((family_of(site), site.stream), []).append(site)
    for name in ("statistics", "embedding", "entering", "updates", "modulation"):
        for stream in STREAMS:
            here = chosen.get((name, stream))
            if here and not (name == "statistics" and values == "raw"):
                groups.append(_reduced(f"{name}/{stream}", name, facts, blocks, here))
            if here and name == "statistics" and values in ("raw", "both"):
                groups.append(_raw(f"activations/{stream}", stream, facts, blocks, here))
    return [*groups, _outputs(facts)]


def statistic_arrays(dims: tuple[str, ...], shape: tuple[int, ...], width: int) -> dict[str, Array]:
    """The arrays of `statistics.reduce_tokens` over leading dimensions."""
    arrays = {name: Array((*dims, CHANNEL), (*shape, width), attrs={"long_name": MEANING[name]}) for name in STATISTICS}
    arrays["abs_quantile"] = Array(
        (*dims, QUANTILE, CHANNEL),
        (*shape, len(QUANTILE_LEVELS), width),
        attrs={"long_name": f"{MEANING['abs_quantile']}; {MEANING[QUANTILE]}"},
    )
    arrays["median_abs"] = Array(dims, shape, attrs={"long_name": MEANING["median_abs"]})
    return arrays


def block_coords(blocks: Sequence[BoundBlock], chosen: Iterable[int]) -> Coords:
    """Coordinates of the block dimension."""
    indices = sorted(set(chosen))
    return {
        BLOCK: ((BLOCK,), np.array(indices)),
        "block_fqn": ((BLOCK,), [blocks[i].fqn for i in indices]),
        "block_kind": ((BLOCK,), [blocks[i].table.kind for i in indices]),
    }


def _cells(facts: Facts) -> tuple[tuple[int, ...], Coords]:
    shape = (len(facts.prompts), len(facts.sigmas), len(facts.branches))
    coords: Coords = {
        SAMPLE: ((SAMPLE,), np.arange(shape[0])),
        "prompt": ((SAMPLE,), list(facts.prompts)),
        "seed": ((SAMPLE,), np.array(facts.seeds)),
        STEP: ((STEP,), np.arange(shape[1])),
        "timestep": ((STEP,), np.array(facts.timesteps)),
        "sigma": ((STEP,), np.array(facts.sigmas)),
        BRANCH: ((BRANCH,), list(facts.branches)),
    }
    return shape, coords


def _flags(dims: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, Array]:
    return {
        "recorded": Array(CELL, shape[:3], "bool", {"long_name": MEANING["recorded"]}),
        "flagged": Array(dims, shape, "bool", {"long_name": "some value is not finite, or clipped in float16"}),
    }


def _reduced(path: str, name: str, facts: Facts, blocks: Sequence[BoundBlock], sites: list[Site]) -> Group:
    shape, coords = _cells(facts)
    dims: tuple[str, ...] = CELL
    if name != "embedding":
        block = block_coords(blocks, (s.block for s in sites))
        dims, shape, coords = (*dims, BLOCK), (*shape, len(block[BLOCK][1])), {**coords, **block}
    coords[CHANNEL] = ((CHANNEL,), np.arange(facts.width))
    if name == "modulation":
        kinds = dict.fromkeys(s.kind for s in sites)
        arrays = {
            kind: Array((*dims, CHANNEL), (*shape, facts.width), attrs={"long_name": f"AdaLN parameter {kind}"})
            for kind in kinds
        }
        return Group(path, {**arrays, "recorded": _flags(dims, shape)["recorded"]}, coords)
    if name == "updates":
        present = [kind for kind in UPDATES if any(s.kind == kind for s in sites)]
        dims, shape, coords = (*dims, KIND), (*shape, len(present)), {**coords, KIND: ((KIND,), present)}
    coords[QUANTILE] = ((QUANTILE,), np.array(QUANTILE_LEVELS))
    return Group(path, {**statistic_arrays(dims, shape, facts.width), **_flags(dims, shape)}, coords)


def _raw(path: str, stream: str, facts: Facts, blocks: Sequence[BoundBlock], sites: list[Site]) -> Group:
    shape, coords = _cells(facts)
    block, n = block_coords(blocks, (s.block for s in sites)), facts.tokens[stream]
    dims, shape = (*CELL, BLOCK), (*shape, len(block[BLOCK][1]))
    coords |= {**block, TOKEN: ((TOKEN,), np.arange(n)), CHANNEL: ((CHANNEL,), np.arange(facts.width))}
    attrs = {"long_name": MEANING["activation"]}
    dtype = "float32"  # float16 too: it would clip what matters
    if facts.dtype == "bfloat16":  # zarr has no bfloat16
        dtype, attrs = "uint16", {**attrs, "torch_dtype": "bfloat16"}
    arrays = {
        "activation": Array((*dims, TOKEN, CHANNEL), (*shape, n, facts.width), dtype, attrs),
        **_flags(dims, shape),
    }
    if stream == "img":
        coords |= {"row": ((TOKEN,), np.array(facts.grid[0])), "column": ((TOKEN,), np.array(facts.grid[1]))}
    else:
        coords["text_position"] = ((TOKEN,), np.arange(n))
        arrays["token_valid"] = Array(
            (SAMPLE, TOKEN), (shape[0], n), "bool", {"long_name": "whether the model was given this token"}
        )
    return Group(path, arrays, coords)


def _outputs(facts: Facts) -> Group:
    n = len(facts.prompts)
    packed = len(facts.latent) == 2
    latent = ("latent_token", "latent_channel") if packed else ("latent_channel", "latent_row", "latent_column")
    return Group(
        "outputs",
        {
            "image": Array((SAMPLE, "pixel_row", "pixel_column", "rgb"), (n, *facts.image, 3), "uint8",
                           {"long_name": "what the pipeline returned"}),
            "latent": Array((SAMPLE, *latent), (n, *facts.latent), attrs={"long_name": "final latent"}),
        },
        {
            SAMPLE: ((SAMPLE,), np.arange(n)),
            "prompt": ((SAMPLE,), list(facts.prompts)),
            "seed": ((SAMPLE,), np.array(facts.seeds)),
        },
    )  # fmt: skip
