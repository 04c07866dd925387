"""`record_factorial`: single forwards over every combination of latent, timestep, pooled text and text tokens.

The inputs of a diffusion transformer can be set independently of each other, so what drives a channel has a causal
answer: a full factorial design, of which `attribute` computes the variance shares.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from madit import store, tracing
from madit.axes import BLOCK, CHANNEL, FACTORS, MEANING
from madit.calls import Call
from madit.dit import DiT, as_dit
from madit.errors import ConfigError, PromptError
from madit.layouts import Coords, block_coords
from madit.progress import progress
from madit.prompts import PromptSet, load_prompts
from madit.provenance import about, common_settings, plain
from madit.sites import Site
from madit.statistics import reduce_tokens

if TYPE_CHECKING:
    import xarray as xr

DESIGNS = ("matched", "label")
LEVELS = {"latent": 8, "timestep": 6, "pooled_text": 6, "text_tokens": 6}
GUIDANCE_RANGE = (1.0, 7.0)
"""Range of the embedded guidance that a design's levels divide evenly."""

_KEPT = ("mean", "mean_abs", "median_abs")


def record_factorial(
    dit: Any,
    prompts: PromptSet | str | Path | Iterable[str],
    store: str | Path,
    design: str = "matched",
    levels: Mapping[str, int] | None = None,
    seed: int = 0,
    pipe_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 4,
    num_inference_steps: int = 20,
    guidance_scale: float = 4.0,
) -> xr.DataTree:
    """Run the transformer on every combination of input levels and store its block outputs' token means.

    z = (1 - sigma) x0 + sigma eps, with sigma the cell's own (`design="matched"`) or one for all cells while only the
    timestep argument varies (`"label"`, off the manifold on which the model was trained; |sigma_z - sigma_t| is
    stored). A latent level is a pair (x0, eps): x0 is the final latent that the pipeline makes of a prompt which no
    text level uses, where there are enough prompts. Pooled text and text tokens come from the first prompts, each set
    on its own; sigmas are spread evenly over the steps of the schedule that makes x0.

    Args:
        dit: a `DiT` or a pipeline.
        prompts: at least as many as the text factor with more levels; further ones make the latents.
        store: folder or URL of the zarr store.
        design: `"matched"` or `"label"`.
        levels: factor -> number of levels (default 8 latents, 6 of each other); a factor left out has one level.
            `"guidance"` (Flux, embedded) divides `GUIDANCE_RANGE`. A factor that the model lacks is left out.
        seed: of the latents, x0 and eps.
        pipe_kwargs: further arguments of the pipeline.
        batch_size: cells that run together.
        num_inference_steps: steps that make x0.
        guidance_scale: of the pipeline that makes x0; on Flux also the embedded guidance, where that is no factor.

    Returns:
        The store, opened by `open_run`: `/statistics/img` with dims (latent, timestep, pooled_text, text_tokens[,
        guidance], block, channel).

    Raises:
        PromptError: too few prompts.
        ConfigError: an unknown design or factor, or a level count below 1.
        StoreExistsError: the store holds another recording.
        DiskSpaceError: the result would not fit on the disk.

    >>> tree = record_factorial(dit, prompts, "factorial.zarr", levels={"latent": 2, "timestep": 3})
    2 latent x 3 timestep x 1 pooled_text x 1 text_tokens = 6 forwards of the transformer
    """
    plan = _plan(dit, prompts, design, levels, seed, batch_size, num_inference_steps, guidance_scale, pipe_kwargs)
    return plan.run(store)


@dataclass
class _Plan:
    """A factorial recording with its arguments checked."""

    dit: DiT
    prompts: PromptSet
    design: str
    levels: dict[str, int]
    seed: int
    batch_size: int
    steps: int
    guidance: float
    kwargs: dict[str, Any]
    template: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What two recordings must share to be one."""
        return {
            **common_settings(self.dit, self.prompts),
            "design": self.design,
            "levels": self.levels,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "pipe_kwargs": {name: plain(value) for name, value in sorted(self.kwargs.items())},
        }

    def run(self, path: str | Path) -> xr.DataTree:
        """Record the latent levels that are not there yet."""
        settings = self.settings()
        writer = store.resume(path, settings, "factorial")
        if writer is not None and writer.complete:
            return store.open_run(path)
        shape = " x ".join(f"{n} {factor}" for factor, n in self.levels.items())
        total = int(np.prod(list(self.levels.values())))
        print(f"{shape} = {total} forwards of the transformer", flush=True)
        group = store.Group("statistics/img", self._arrays(), self._coords({}), {})
        store.check_space(path, sum(a.nbytes for a in group.arrays.values()))
        with self.dit.quiet():
            axes = self._axes()
        if writer is None:
            group = store.Group("statistics/img", self._arrays(), self._coords(axes), self._attrs(axes))
            dtype = str(self.dit.transformer.dtype).removeprefix("torch.")
            writer = store.create(path, [group], "factorial", settings, about(self.dit, self.prompts, dtype))
        n = self.levels["latent"]
        with progress("recording", (n - len(writer.done)) * (total // n)) as advance:
            for latent in range(n):
                if latent not in writer.done:
                    writer.append(latent, latent, {"statistics/img": self._level(axes, latent, advance)})
        writer.finish()
        return store.open_run(path)

    def _axes(self) -> dict[str, Any]:
        """The values of each factor's levels."""
        n = self.levels
        self.template = self._capture(self.prompts[0], max(n["timestep"], self.steps))
        scheduler = self.dit.pipeline.scheduler
        timesteps = torch.as_tensor(scheduler.timesteps).cpu()
        sigmas = torch.as_tensor(scheduler.sigmas).cpu()[: len(timesteps)].float()
        keep = np.unique(sigmas.numpy(), return_index=True)[1][::-1]  # two-call solvers visit a sigma twice
        keep = keep[np.linspace(0, len(keep) - 1, n["timestep"]).round().astype(int)]
        dtype = self._given("timestep").dtype
        axes = {
            "sigma": sigmas[keep.copy()].tolist(),
            # cast, then scaled, as pipelines do it: bf16 rounds the scheduler's timestep
            "timestep": timesteps[keep.copy()].to(dtype) / round(1 / self.dit.family.timestep_scale),
            "guidance": np.linspace(*GUIDANCE_RANGE, n.get("guidance", 1)).tolist(),
            "latent": [],
        }
        k = max(n.get("pooled_text", 1), n.get("text_tokens", 1))
        texts = [self._capture(prompt, 2) for prompt in self.prompts[:k]]
        for factor in ("pooled_text", "text_tokens"):
            axes[factor] = [t[self.dit.family.arguments[factor]] for t in texts] if factor in n else []
        held_out = self.prompts[k:] or self.prompts[:]
        axes["latent_prompt"] = [held_out[i % len(held_out)] for i in range(n["latent"])]
        axes["latent_seed"] = [self.seed + i for i in range(n["latent"])]
        return axes

    def _capture(self, prompt: str, steps: int) -> dict[str, Any]:
        """The first call's arguments for one prompt, cut to its conditional row."""
        call, arguments = tracing.first_call(self.dit, **self._run_kwargs(prompt, steps, self.seed))
        row = call.rows["cond"]
        names = set(self.dit.family.arguments.values())
        return {k: v[row] if k in names and v is not None else v for k, v in arguments.items()}

    def _run_kwargs(self, prompt: str, steps: int, seed: int) -> dict[str, Any]:
        generator = torch.Generator("cpu").manual_seed(seed)
        return {
            "prompt": [prompt],
            "generator": [generator],
            "num_inference_steps": steps,
            "guidance_scale": self.guidance,
            **self.kwargs,
        }

    def _given(self, factor: str) -> Tensor:
        return self.template[self.dit.family.arguments[factor]]

    def _latent(self, prompt: str, seed: int) -> tuple[Tensor, Tensor]:
        """One latent level: the final latent of a prompt, and noise."""
        with self.dit.quiet():
            x0 = self.dit.pipeline(**self._run_kwargs(prompt, self.steps, seed), output_type="latent").images
        noise = torch.Generator("cpu").manual_seed(seed + 2**31)  # not the noise that x0 came from
        return x0, torch.randn(x0.shape, generator=noise).to(x0)

    def _level(self, axes: dict[str, Any], latent: int, advance: Any) -> dict[str, np.ndarray]:
        """All cells of one latent level."""
        x0, eps = self._latent(axes["latent_prompt"][latent], axes["latent_seed"][latent])
        arrays = {name: array.empty(1) for name, array in self._arrays().items()}
        factors = [factor for factor in self.levels if factor != "latent"]
        sites = [Site(b.index, "img", "resid_post") for b in self.dit.blocks if "img" in b.streams()]
        cells = list(itertools.product(*(range(self.levels[factor]) for factor in factors)))
        for batch in _chunks(cells, self.batch_size):
            arguments = self._arguments(axes, x0, eps, [dict(zip(factors, cell, strict=True)) for cell in batch])

            def sink(call: Call, site: Site, value: Tensor, batch: Sequence = batch) -> None:
                for name, values in reduce_tokens(value, levels=()).items():
                    if name in arrays:
                        for cell, row in zip(batch, values.cpu().numpy(), strict=True):
                            arrays[name][(0, *cell, site.block)] = row

            call = Call(0, 0, float("nan"), float("nan"), {"cond": slice(0, len(batch))})
            tracing.visit_forward(self.dit, sites, sink, call, arguments)
            for _ in batch:
                advance()
        return arrays

    def _arguments(self, axes: dict[str, Any], x0: Tensor, eps: Tensor, cells: list[dict[str, int]]) -> dict[str, Any]:
        """Arguments of one forward over several cells."""
        names, rows = self.dit.family.arguments, {}
        sigma = [axes["sigma"][self._sigma_level(cell)] for cell in cells]
        rows["latent"] = [((1 - s) * x0.float() + s * eps.float()).to(x0) for s in sigma]
        rows["timestep"] = [axes["timestep"][cell["timestep"]].reshape(1).to(x0.device) for cell in cells]
        for factor in ("pooled_text", "text_tokens"):
            if factor in self.levels:
                rows[factor] = [axes[factor][cell[factor]] for cell in cells]
        if "guidance" in self.levels:
            like = self._given("guidance")
            rows["guidance"] = [torch.full_like(like, axes["guidance"][cell["guidance"]]) for cell in cells]
        elif names.get("guidance") in self.template and self._given("guidance") is not None:
            rows["guidance"] = [self._given("guidance")] * len(cells)
        given = {k: dict(v) if isinstance(v, dict) else v for k, v in self.template.items()}  # SD3 pops from one
        return {**given, **{names[factor]: torch.cat(values) for factor, values in rows.items()}}

    def _sigma_level(self, cell: dict[str, int]) -> int:
        return cell["timestep"] if self.design == "matched" else self.levels["timestep"] // 2

    def _arrays(self) -> dict[str, store.Array]:
        shape = (*self.levels.values(), len(self.dit.blocks))
        dims = (*self.levels, BLOCK)
        wide = {
            name: store.Array((*dims, CHANNEL), (*shape, self.dit.width), attrs={"long_name": MEANING[name]})
            for name in ("mean", "mean_abs")
        }
        return {**wide, "median_abs": store.Array(dims, shape, attrs={"long_name": MEANING["median_abs"]})}

    def _coords(self, axes: dict[str, Any]) -> Coords:
        if not axes:
            return {}
        coords: Coords = {factor: ((factor,), np.arange(n)) for factor, n in self.levels.items()}
        coords |= block_coords(self.dit.blocks, range(len(self.dit.blocks)))
        coords[CHANNEL] = ((CHANNEL,), np.arange(self.dit.width))
        coords["latent_prompt"] = (("latent",), axes["latent_prompt"])
        coords["latent_seed"] = (("latent",), np.array(axes["latent_seed"]))
        coords["sigma"] = (("timestep",), np.array(axes["sigma"]))
        coords["timestep_value"] = (("timestep",), axes["timestep"].float().numpy().astype(float))
        for factor in ("pooled_text", "text_tokens"):
            if factor in self.levels:
                coords[f"{factor}_prompt"] = ((factor,), list(self.prompts[: self.levels[factor]]))
        if "guidance" in self.levels:
            coords["guidance_value"] = (("guidance",), np.array(axes["guidance"]))
        if self.design == "label":
            gap = np.abs(np.array(axes["sigma"]) - self._latent_sigma(axes))
            coords["sigma_gap"] = (("timestep",), gap)
        return coords

    def _latent_sigma(self, axes: dict[str, Any]) -> float:
        return float(axes["sigma"][self._sigma_level({})])

    def _attrs(self, axes: dict[str, Any]) -> dict[str, Any]:
        attrs: dict[str, Any] = {"design": self.design}
        return attrs if self.design == "matched" else {**attrs, "latent_sigma": self._latent_sigma(axes)}


def _plan(
    dit: Any,
    prompts: Any,
    design: str,
    levels: Mapping[str, int] | None,
    seed: int,
    batch_size: int,
    steps: int,
    guidance: float,
    pipe_kwargs: Mapping[str, Any] | None,
) -> _Plan:
    dit, prompts, kwargs = as_dit(dit), load_prompts(prompts), dict(pipe_kwargs or {})
    if design not in DESIGNS:
        raise ConfigError(f"expected a design of {DESIGNS}, got {design!r}")
    asked = dict(LEVELS if levels is None else levels)
    for factor, n in asked.items():
        if factor not in FACTORS or not isinstance(n, int) or n < 1:
            raise ConfigError(f"expected levels like {LEVELS}, factors among {FACTORS}; got {factor!r}: {n!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"expected batch_size as a whole number of at least 1, got {batch_size!r}")
    has = [f for f in FACTORS if f in dit.family.arguments]
    if "guidance" in has and not ("guidance" in asked and dit.transformer.config.get("guidance_embeds")):
        has.remove("guidance")
    counts = {factor: asked.get(factor, 1) for factor in has}
    needed = max(counts.get("pooled_text", 1), counts.get("text_tokens", 1))
    if len(prompts) < needed:
        raise PromptError(f"expected at least {needed} prompts for the text levels, got {len(prompts)}")
    return _Plan(dit, prompts, design, counts, seed, batch_size, steps, guidance, kwargs)


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for i in range(0, len(items), size):
        yield items[i : i + size]
