"""`record`: run a pipeline over prompts and seeds and keep what its sites held."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from madit import layouts, store, tracing
from madit.axes import BRANCHES
from madit.collecting import Collector
from madit.dit import DiT, as_dit
from madit.errors import ConfigError, SiteError
from madit.factorial import record_factorial
from madit.progress import progress
from madit.prompts import PromptSet, load_prompts
from madit.provenance import about, common_settings, plain
from madit.sites import GATES, Site

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Estimate", "estimate", "record", "record_factorial", "select_sites"]

_OURS = {
    "prompt": "the argument `prompts`",
    "generator": "the argument `seeds`",
    "latents": "the argument `seeds`",
    "num_inference_steps": "the argument `num_inference_steps`",
    "guidance_scale": "the argument `guidance_scale`",
    "output_type": "the store's `/outputs`, which holds images and latents",
    "return_dict": "the store",
    "callback_on_step_end": "`dit.pipeline` itself: record uses the callback to keep the final latents",
    "callback_on_step_end_tensor_inputs": "`dit.pipeline` itself",
}
_PER_PROMPT = ("negative_prompt", "negative_prompt_2", "negative_prompt_3", "prompt_2", "prompt_3")


@dataclass(frozen=True)
class Estimate:
    """What a recording will take, before compression.

    Attributes:
        bytes_per_image: bytes per sample.
        bytes: bytes in all.
        samples: number of (prompt, seed) pairs.
        groups: bytes of each group of the store.
    """

    bytes_per_image: int
    bytes: int
    samples: int
    groups: dict[str, int]


def record(
    dit: Any,
    prompts: PromptSet | str | Path | Iterable[str],
    store: str | Path,
    seeds: Sequence[int] = (0,),
    num_inference_steps: int = 20,
    guidance_scale: float = 4.0,
    batch_size: int = 1,
    sites: Iterable[str] | None = None,
    values: str = "statistics",
    pipe_kwargs: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Run the pipeline for every prompt and seed and store what its sites held, at each step, branch and block.

    Each sample has a CPU generator of its own, so that results do not depend on batching. A run that was cut off goes
    on at its first unfinished batch when called again with the same arguments; a finished one is opened as it is.

    Args:
        dit: a `DiT` or a pipeline.
        prompts: texts, a `PromptSet`, or the path of a `.txt`, `.jsonl` or `.csv` file.
        store: folder or URL of the zarr store.
        seeds: one sample is recorded for each prompt and seed.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance of SD3, embedded guidance of Flux (there, true classifier-free
            guidance is `true_cfg_scale` and `negative_prompt` in `pipe_kwargs`).
        batch_size: samples that run together, and what a crash can cost.
        sites: names or patterns (`"blocks.*.txt.resid_post"`); None means the image stream's block outputs and AdaLN
            gates and the embedding.
        values: `"statistics"` over tokens, `"raw"` activations of block outputs, or `"both"`.
        pipe_kwargs: further arguments of the pipeline (`height`, `negative_prompt`, `skip_guidance_layers`, ...).

    Returns:
        The store, opened by `open_run`.

    Raises:
        PromptError: no prompts.
        SiteError: a site that the model does not have.
        ConfigError: an argument that `record` sets itself, or one that makes no sense.
        StoreExistsError: the store holds a run with other settings.
        DiskSpaceError: the run would not fit on the disk.

    >>> tree = record(dit, ["a red circle"], store="run.zarr", num_inference_steps=4)
    >>> tree["statistics/img"]["mean_abs"].sel(branch="cond").dims
    ('sample', 'step', 'block', 'channel')
    """
    job = _job(dit, prompts, seeds, num_inference_steps, guidance_scale, batch_size, sites, values, pipe_kwargs)
    return job.run(store)


def estimate(
    dit: Any,
    prompts: PromptSet | str | Path | Iterable[str],
    seeds: Sequence[int] = (0,),
    num_inference_steps: int = 20,
    guidance_scale: float = 4.0,
    batch_size: int = 1,
    sites: Iterable[str] | None = None,
    values: str = "statistics",
    pipe_kwargs: Mapping[str, Any] | None = None,
) -> Estimate:
    """How much `record` with the same arguments would write; runs the pipeline up to its first transformer call."""
    job = _job(dit, prompts, seeds, num_inference_steps, guidance_scale, batch_size, sites, values, pipe_kwargs)
    return job.estimate()


def select_sites(dit: DiT, sites: Iterable[str] | None) -> list[Site]:
    """Sites by name or pattern, in forward order; None is the default choice.

    Raises:
        SiteError: if a name or pattern fits no site of this model.
    """
    everything = dit.sites()
    if sites is None:
        endings = tuple(f".img.{kind}" for kind in ("resid_post", *GATES))
        chosen = {n for n in everything if n.endswith(endings) or n == "blocks.0.img.resid_pre"}
    else:
        chosen = set()
        for pattern in [sites] if isinstance(sites, str) else sites:
            found = fnmatch.filter(everything, str(pattern))
            if not found and not set(str(pattern)) & set("*?["):
                dit.site(str(pattern))  # says what is wrong with the name
            if not found:
                raise SiteError(f"expected a pattern that fits a site of {dit.name}, got {pattern!r}; see dit.sites()")
            chosen |= set(found)
    if not chosen:
        raise SiteError("expected at least one site, got none; leave `sites` out for the default")
    return [Site.parse(name) for name in everything if name in chosen]


def _job(
    dit: Any,
    prompts: Any,
    seeds: Any,
    steps: int,
    guidance: float,
    batch_size: int,
    sites: Any,
    values: str,
    pipe_kwargs: Any,
) -> _Job:
    dit, prompts, kwargs = as_dit(dit), load_prompts(prompts), dict(pipe_kwargs or {})
    seeds = [seeds] if isinstance(seeds, int) else [int(s) for s in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"expected at least one seed, none twice; got {seeds}")
    for name, number in (("num_inference_steps", steps), ("batch_size", batch_size)):
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"expected {name} as a whole number of at least 1, got {number!r}")
    if values not in ("statistics", "raw", "both"):
        raise ConfigError(f"expected values 'statistics', 'raw' or 'both', got {values!r}")
    for name in kwargs:
        if name in _OURS:
            raise ConfigError(f"expected pipe_kwargs without `{name}`; use {_OURS[name]}")
    if kwargs.pop("num_images_per_prompt", 1) != 1:
        raise ConfigError("expected num_images_per_prompt 1: a sample is one prompt and one seed; use several `seeds`")
    for name in _PER_PROMPT:
        if not isinstance(kwargs.get(name, ""), str | None):
            raise ConfigError(f"expected one text for `{name}`, got {type(kwargs[name]).__name__}")
    return _Job(dit, prompts, seeds, steps, guidance, batch_size, select_sites(dit, sites), values, kwargs)


@dataclass
class _Job:
    """A recording with its arguments checked."""

    dit: DiT
    prompts: PromptSet
    seeds: list[int]
    steps: int
    guidance: float
    batch_size: int
    sites: list[Site]
    values: str
    kwargs: dict[str, Any]

    @property
    def samples(self) -> list[tuple[str, int]]:
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def settings(self) -> dict[str, Any]:
        """What two runs must share to be one."""
        return {
            **common_settings(self.dit, self.prompts),
            "seeds": self.seeds,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "batch_size": self.batch_size,
            "sites": [str(site) for site in self.sites],
            "values": self.values,
            "pipe_kwargs": {name: plain(value) for name, value in sorted(self.kwargs.items())},
        }

    def run_kwargs(self, samples: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Arguments of the pipeline for one batch."""
        n = len(samples)
        several = {k: [v] * n if k in _PER_PROMPT and v is not None else v for k, v in self.kwargs.items()}
        return {
            "prompt": [prompt for prompt, _ in samples],
            "generator": [torch.Generator("cpu").manual_seed(seed) for _, seed in samples],
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            **several,
        }

    def estimate(self) -> Estimate:
        """Sizes from the first call's arguments, before anything has run."""
        groups = {g.path: sum(a.nbytes for a in g.arrays.values()) for g in self.groups(self.first_facts())}
        n, total = len(self.samples), sum(groups.values())
        return Estimate(total // n, total, n, groups)

    def run(self, path: str | Path) -> xr.DataTree:
        """Record what is not there yet."""
        settings = self.settings()
        writer = store.resume(path, settings, "run")
        if writer is not None and writer.complete:
            return store.open_run(path)
        batches = [self.samples[i : i + self.batch_size] for i in range(0, len(self.samples), self.batch_size)]
        todo = [i for i in range(len(batches)) if writer is None or i not in writer.done]
        expected = self.first_facts()
        size = sum(a.nbytes for g in self.groups(expected) for a in g.arrays.values()) // len(self.samples)
        store.check_space(path, size * sum(len(batches[i]) for i in todo))
        with self.dit.quiet(), progress("recording", len(todo) * len(expected.sigmas)) as advance:
            for i in todo:
                collector, outputs = self.run_batch(batches[i], advance)
                facts = collector.facts(expected, outputs)
                groups = self.groups(facts)
                if writer is None:
                    writer = store.create(path, groups, "run", settings, about(self.dit, self.prompts, facts.dtype))
                writer.append(i, i * self.batch_size, {**collector.assemble(groups), "outputs": outputs})
                collector.warn()
        assert writer is not None
        writer.finish()
        return store.open_run(path)

    def groups(self, facts: layouts.Facts) -> list[store.Group]:
        """What the store holds."""
        return layouts.run_groups(facts, self.dit.blocks, self.sites, self.values)

    def run_batch(self, samples: Sequence[tuple[str, int]], advance: Any) -> tuple[Collector, dict[str, np.ndarray]]:
        """Run the pipeline on one batch under the tracer."""
        collector = Collector(len(samples), self.values)
        final: dict[str, torch.Tensor] = {}

        def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            final.update(tensors)
            advance()
            return {}

        kwargs = self.run_kwargs(samples)
        result = tracing.visit(self.dit, self.sites, collector, **kwargs, callback_on_step_end=keep)
        return collector, {
            "image": np.stack([np.asarray(image.convert("RGB")) for image in result.images]),
            "latent": final["latents"].float().cpu().numpy(),
        }

    def first_facts(self) -> layouts.Facts:
        """Sizes and labels as far as the arguments of the first call tell."""
        dit, pipeline = self.dit, self.dit.pipeline
        with dit.quiet():
            call, arguments = tracing.first_call(dit, **self.run_kwargs(self.samples[:1]))
        branches = set(call.rows)
        if self.kwargs.get("skip_guidance_layers") is not None and "uncond" in branches:
            branches.add("skip")
        if dit.family.cfg == "two_calls" and (self.kwargs.get("true_cfg_scale") or 1.0) > 1:
            branches.add("uncond")
        latent, text = (arguments[dit.family.arguments[name]] for name in ("latent", "text_tokens"))
        grid = token_grid(dit, arguments)
        timesteps = torch.as_tensor(pipeline.scheduler.timesteps).float().cpu()
        pixels = getattr(pipeline, "default_sample_size", 0) * getattr(pipeline, "vae_scale_factor", 1)
        return layouts.Facts(
            prompts=tuple(prompt for prompt, _ in self.samples),
            seeds=tuple(seed for _, seed in self.samples),
            timesteps=tuple((timesteps * dit.family.timestep_scale).tolist()),
            sigmas=tuple(torch.as_tensor(pipeline.scheduler.sigmas).float().cpu()[: len(timesteps)].tolist()),
            branches=tuple(b for b in BRANCHES if b in branches),
            tokens={"img": len(grid[0]), "txt": text.shape[1]},
            grid=grid,
            width=dit.width,
            image=(self.kwargs.get("height") or pixels, self.kwargs.get("width") or pixels),
            latent=tuple(latent.shape[1:]),
            dtype=str(dit.transformer.dtype).removeprefix("torch."),
        )


def token_grid(dit: DiT, arguments: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Row and column of each image token, from the arguments of a call."""
    if dit.family.packed:
        ids = arguments["img_ids"]
        ids = (ids[0] if ids.ndim == 3 else ids).long()
        return ids[:, 1].tolist(), ids[:, 2].tolist()
    shape = arguments[dit.family.arguments["latent"]].shape[-2:]
    rows, columns = (n // dit.transformer.config.patch_size for n in shape)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return row.flatten().tolist(), column.flatten().tolist()
