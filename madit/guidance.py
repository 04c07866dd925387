"""Detail Guidance in a classic pipeline: steer away from what the model predicts without its massive channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from madit import arch, calls
from madit.configs import GuidanceConfig
from madit.dit import DiT, as_dit
from madit.edits import Argument, Edit, Means
from madit.errors import ConfigError, NothingEditedError, UnsupportedPipelineError
from madit.passes import bound, prediction, replay, shadow_transformer, take_rows, with_prediction
from madit.provenance import declared

PIPELINES = (
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
)
"""Pipelines whose guidance is linear in the predictions, without renormalisation, and whose calls madit can label."""


@contextmanager
def guide(model: Any, config: GuidanceConfig, *, partial: bool = True, shortcut: bool = True) -> Iterator[DiT]:
    """Run a pipeline under Detail Guidance; undone on exit, also after an exception.

    D^ = D(c) + w [D(c) - D_m(c)]                           without classifier-free guidance
    D^ = D(0) + g [D(c) - D(0)] + w [D(c) - D_m(c)]         with it, at scale g

    where D_m is the same network with `config.channels` of the state entering block m disrupted. w [D(c) - D_m(c)] is
    added to every prediction of the step (both halves of the batch, both calls of true classifier-free guidance, the
    skip-layer call), so that any guidance that is linear in them gives the formula without its scale being known.

    The degraded forward repeats the transformer's own forward on the conditional inputs, with the blocks before m
    returning what they returned already. It is no call of the transformer to anybody else: hooks on the blocks act in
    it, nnsight and recordings do not see it, and `transformer.output` in a trace is the prediction before guidance.

    Args:
        model: a `DiT` or a pipeline of `PIPELINES`.
        config: what to disrupt, and the scale w.
        partial: False repeats the blocks before m too. Bit-identical at equal batch shape; under batched
            classifier-free guidance the conditional rows are a smaller batch, and then both agree within the model's
            own batch-shape error.
        shortcut: False runs the degraded forward even where it cannot matter (w = 0, or rho = 1).

    Yields:
        The `DiT`.

    Raises:
        ModelMismatchError: if the config belongs to another architecture.
        UnsupportedPipelineError: if the pipeline is none of `PIPELINES`, or caches its blocks' outputs.
        NothingEditedError: on exit, if no call was guided.

    >>> from madit.zoo.small import small_sd3
    >>> pipeline = small_sd3()
    >>> config = GuidanceConfig(block=2, channels=(3, 5), scale=1.5)
    >>> with guide(pipeline, config):
    ...     image = pipeline("a red cat", num_inference_steps=2, max_sequence_length=8).images[0]

    Source: Detail Guidance, arXiv 2510.11538 (formulas); partial forward, arXiv 2607.02968.
    """
    dit = as_dit(model)
    _check(dit, config)
    with ExitStack() as stack:
        stack.enter_context(declared(dit, "guide", [config.model_dump(), partial, shortcut]))
        tracker = stack.enter_context(calls.track(dit.pipeline, dit.family))
        guidance = _Guidance(dit, config, tracker, partial, shortcut)
        before: Any = dit.blocks[config.block - 1].module
        for handle in (
            dit.transformer.register_forward_pre_hook(guidance.before, with_kwargs=True),
            before.register_forward_hook(guidance.capture),
            dit.transformer.register_forward_hook(guidance.after),
        ):
            stack.callback(handle.remove)
        yield dit
    if guidance.guided == 0:
        raise NothingEditedError(
            "expected at least one call of the transformer to be guided, none was: the pipeline did not run inside "
            f"the context, or no step of it lies in steps={config.steps}"
        )


class Degrader:
    """The degraded prediction D_m(c) of a transformer, by a second forward on a shadow of it.

    Args:
        family: the transformer's family.
        config: what to disrupt.
    """

    def __init__(self, family: arch.Family, config: GuidanceConfig):
        self.family, self.config = family, config
        self.edit = _edit(config)

    def __call__(
        self, transformer: nn.Module, inputs: dict[str, Any], sigma: float, cached: tuple | None = None
    ) -> Tensor:
        """Predict with the channels disrupted.

        Args:
            transformer: the model.
            inputs: arguments of its forward, conditional rows only.
            sigma: noise level, for calibration means.
            cached: what block m - 1 returned on the same rows; None repeats the blocks before m.
        """
        m = self.config.block
        clone = shadow_transformer(transformer)
        blocks = arch.bind(clone, self.family)
        if cached is not None:
            for block in blocks[: m - 1]:
                replay(block.module, _passing(block))  # type: ignore[arg-type]
            replay(blocks[m - 1].module, lambda *_, **__: cached)  # type: ignore[arg-type]
        edited: list[int] = []
        argument = Argument(blocks[m].module, blocks[m].table.inputs[self.config.stream])

        def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            edited.append(m)
            h = argument.get(args, kwargs)
            return argument.put(self.edit(h, {"degraded": slice(0, len(h))}, sigma), args, kwargs)

        blocks[m].module.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[attr-defined]
        rows = len(inputs[self.family.arguments["latent"]])
        with calls.branch("degraded", rows=rows):
            output = prediction(clone(**inputs))
        if not edited:
            raise NothingEditedError(f"expected the degraded forward to reach block {m}, it did not")
        return output


class _Guidance:
    """The hooks of one `guide` context."""

    def __init__(self, dit: DiT, config: GuidanceConfig, tracker: calls.CallTracker, partial: bool, shortcut: bool):
        self.dit, self.config, self.tracker, self.partial = dit, config, tracker, partial
        self.degrade = Degrader(dit.family, config)
        self.idle = shortcut and (config.scale == 0 or (config.mode == "scale" and config.factor == 1))
        self.guided = 0
        self._inputs: dict[str, Any] | None = None  # of the conditional call under way
        self._cached: tuple | None = None
        self._delta: tuple[int, Tensor] | None = None  # (step, D(c) - D_m(c))

    def _wanted(self, step: int) -> bool:
        return in_interval(self.config, step, len(self.dit.pipeline.scheduler.timesteps))

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the inputs of a conditional call, as they are before the forward pops from them."""
        call = self.tracker.current
        self._inputs = self._cached = None
        if call is not None and "cond" in call.rows and self._wanted(call.step) and not self.idle:
            self._inputs = bound(module, args, kwargs)

    def capture(self, module: nn.Module, args: tuple, output: tuple) -> None:
        """Keep what block m - 1 returns."""
        if self._inputs is not None and self.partial:
            self._cached = output

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Add w (D(c) - D_m(c)) to every row of the prediction."""
        call = self.tracker.current
        if call is None or not self._wanted(call.step):
            return None
        self.guided += 1
        if self.idle:
            return None
        value = prediction(output)
        wide = torch.promote_types(value.dtype, torch.float32)
        if self._inputs is not None:
            self._delta = call.step, self._difference(module, call, value.to(wide))
        if self._delta is None or self._delta[0] != call.step:
            raise UnsupportedPipelineError(
                f"expected the conditional call first in step {call.step}, got {', '.join(call.rows)}; "
                f"{type(self.dit.pipeline).__name__} orders its calls in a way that guide does not know"
            )
        guided = value.to(wide, copy=True)
        for rows in call.rows.values():
            guided[rows] += self.config.scale * self._delta[1]
        return with_prediction(output, guided.to(value.dtype))

    def _difference(self, module: nn.Module, call: calls.Call, value: Tensor) -> Tensor:
        inputs, cached, rows, n = self._inputs, self._cached, call.rows["cond"], len(value)
        self._inputs = self._cached = None
        assert inputs is not None
        if len(call.rows) > 1:
            inputs, cached = take_rows(inputs, rows, n), take_rows(cached, rows, n)
        sigma = call.timestep / self.dit.family.timestep_scale / 1000.0
        return value[rows] - self.degrade(module, inputs, sigma, cached).to(value.dtype)


def in_interval(config: GuidanceConfig, step: int, n: int) -> bool:
    """Whether step `step` of `n` is guided."""
    if config.steps is None:
        return True
    start, stop = (math.floor(fraction * n + 1e-9) for fraction in config.steps)  # 0.29 * 100 is 28.999...
    return start <= step < stop


def _edit(config: GuidanceConfig) -> Edit:
    means = None
    if config.mode == "mean":
        order = np.argsort(config.sigma)
        table = np.array(config.means, dtype=np.float64).T[order]
        means = Means(np.asarray(config.sigma)[order], {"degraded": table})
    tokens = None
    if config.tokens is not None:
        tokens = torch.tensor(config.tokens)
        if config.grid is not None:  # as a mask, which refuses a picture of another size
            mask = torch.zeros(config.grid[0] * config.grid[1], dtype=torch.bool)
            mask[tokens] = True
            tokens = mask
    return Edit(config.channels, mode=config.mode, factor=config.factor, means=means, tokens=tokens)


def _passing(block: arch.BoundBlock) -> Callable[..., tuple]:
    """A forward that hands its states on: what the blocks before m - 1 return is never used."""
    arguments = {stream: Argument(block.module, name) for stream, name in block.table.inputs.items()}
    streams = sorted(block.table.outputs, key=lambda s: block.table.outputs[s])

    def forward(*args: Any, **kwargs: Any) -> tuple:
        return tuple(arguments[s].get(args, kwargs) for s in streams)

    return forward


def _check(dit: DiT, config: GuidanceConfig) -> None:
    if not isinstance(config, GuidanceConfig):
        raise ConfigError(f"expected a GuidanceConfig, got {type(config).__name__}; GuidanceConfig.load reads a file")
    name = type(dit.pipeline).__name__
    if name not in PIPELINES:
        raise UnsupportedPipelineError(
            f"expected one of {', '.join(PIPELINES)}, got {name}: how it combines its predictions has not been checked"
        )
    config.check(dit.fingerprint)
    config.check_size(len(dit.blocks), dit.width)
    if getattr(dit.transformer, "is_cache_enabled", False):
        raise UnsupportedPipelineError(
            f"expected a transformer without block caching, {name} has a cache enabled; call disable_cache() first"
        )
