"""Detail Guidance as a guider of diffusers' modular pipelines; the only user of diffusers' `BaseGuidance`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from madit import arch
from madit.configs import GuidanceConfig
from madit.dit import DiT
from madit.errors import ConfigError
from madit.guidance import Degrader, in_interval
from madit.passes import bound


class DetailGuidance(BaseGuidance):
    """Detail Guidance, with classifier-free guidance or without.

    D^ = D(c) + w [D(c) - D_m(c)]                           guidance_scale = 1
    D^ = D(0) + g [D(c) - D(0)] + w [D(c) - D_m(c)]         guidance_scale = g

    The degraded prediction D_m(c) is the transformer's own forward with the blocks before m returning what they
    returned for the conditional one.

    Args:
        guidance: a `GuidanceConfig` as a dictionary; `from_config` takes the config itself.
        guidance_scale: g of classifier-free guidance; 1 is none.
        enabled: False leaves the conditional prediction alone.

    Raises:
        ConfigError: if `guidance` is no guidance config; at the call, if classifier-free guidance is asked for and
            the pipeline got no negative prompt.
        UnknownFamilyError: at the call, if the pipeline's transformer has no adapter.
        ModelMismatchError: at the call, if the config belongs to another architecture.

    >>> config = GuidanceConfig(block=2, channels=(3, 5), scale=1.5)
    >>> guider = DetailGuidance.from_config(config, guidance_scale=4.0)
    >>> guider.guidance.scale
    1.5

    `save_pretrained` writes a folder of its own, which `from_pretrained` reads. A pipeline's `save_pretrained` leaves
    third-party guiders out, so load it with `pipe.update_components(guider=DetailGuidance.from_pretrained(folder))`.

    Source: arXiv 2510.11538 (formulas); partial forward, arXiv 2607.02968.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_degraded"]  # noqa: RUF012  (diffusers wants a list)

    @register_to_config
    def __init__(self, guidance: dict[str, Any], guidance_scale: float = 1.0, enabled: bool = True):
        super().__init__(0.0, 1.0, enabled)
        self.guidance = GuidanceConfig.parse(dict(guidance), source="DetailGuidance")
        self.guidance_scale = guidance_scale
        self._checked: nn.Module | None = None
        self._degrader: Degrader | None = None
        self._cached: tuple | None = None
        self._undo: list[Any] = []

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a guider of a `GuidanceConfig`; what `save_pretrained` wrote works too.

        Args:
            config: a `GuidanceConfig`, or a guider's own configuration.
            return_unused_kwargs: as in diffusers.
            **kwargs: `guidance_scale`, `enabled`.
        """
        if isinstance(config, GuidanceConfig):
            config = {"guidance": config.model_dump(mode="json")}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def is_conditional(self) -> bool:
        """Whether the batch under way is conditional; the degraded one is."""
        return self._predictions()[self._count_prepared - 1] != "pred_uncond"

    @property
    def num_conditions(self) -> int:
        """Number of forwards of this step."""
        return len(self._predictions())

    def _predictions(self) -> list[str]:
        """Names of this step's forwards, in order; the degraded one comes after the conditional one it starts from."""
        names = ["pred_cond"]
        if self._enabled and not math.isclose(self.guidance_scale, 1.0):
            names.append("pred_uncond")
        config, n = self.guidance, self._num_inference_steps
        idle = config.scale == 0 or (config.mode == "scale" and config.factor == 1)
        if self._enabled and not idle and (n is None or in_interval(config, self._step, n)):
            names.append("pred_degraded")
        return names

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Start a step; clears what an exception may have left of the last one."""
        self._clear()
        super().set_state(step, num_inference_steps, timestep)  # type: ignore[arg-type]

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The inputs of each forward: conditional, unconditional, and conditional again for the degraded one."""
        names = self._predictions()
        if "pred_uncond" in names and not any(isinstance(value, tuple) for value in data.values()):
            raise ConfigError(
                f"expected a negative prompt for guidance_scale={self.guidance_scale}, the pipeline got none; pass "
                'negative_prompt="", or guidance_scale=1.0 for Detail Guidance alone'
            )
        return [self._prepare_batch(data, int(name == "pred_uncond"), name) for name in names]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Before each forward: keep block m - 1's output of the conditional one, degrade the last."""
        super().prepare_models(denoiser)
        names = self._predictions()
        if "pred_degraded" not in names:
            return
        self._check(denoiser)
        name = names[self._count_prepared - 1]
        if name == "pred_cond":
            assert self._degrader is not None
            block: Any = arch.bind(denoiser, self._degrader.family)[self.guidance.block - 1].module
            self._undo.append(block.register_forward_hook(self._capture).remove)
        elif name == "pred_degraded":
            self._degrade_next(denoiser)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """After each forward."""
        self._undo_all()
        if self._count_prepared == self.num_conditions:
            self._cached = None

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_degraded: Tensor | None = None
    ) -> GuiderOutput:
        """Combine the predictions of one step."""
        wide = torch.promote_types(pred_cond.dtype, torch.float32)
        cond = pred = pred_cond.to(wide)
        if pred_uncond is not None:
            pred = pred_uncond.to(wide) + self.guidance_scale * (cond - pred_uncond.to(wide))
        if pred_degraded is not None:
            pred = pred + self.guidance.scale * (cond - pred_degraded.to(wide))
        return GuiderOutput(pred=pred.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _check(self, denoiser: nn.Module) -> None:
        if self._checked is denoiser:
            return
        dit = DiT(SimpleNamespace(transformer=denoiser), name=type(denoiser).__name__)
        self.guidance.check(dit.fingerprint)
        self.guidance.check_size(len(dit.blocks), dit.width)
        self._checked, self._degrader = denoiser, Degrader(dit.family, self.guidance)

    def _capture(self, module: nn.Module, args: tuple, output: tuple) -> None:
        self._cached = output

    def _degrade_next(self, denoiser: nn.Module) -> None:
        """Let the denoiser's next forward be the degraded one, and that one only."""
        outer = vars(denoiser).get("forward")
        degrader, cached = self._degrader, self._cached
        sigma = float(self._timestep) / 1000.0
        assert degrader is not None

        def restore() -> None:
            vars(denoiser).pop("forward", None)
            if outer is not None:
                vars(denoiser)["forward"] = outer

        def degraded(*args: Any, **kwargs: Any) -> Any:
            self._undo_all()
            inputs = bound(denoiser, args, kwargs)
            output = degrader(denoiser, inputs, sigma, cached)
            return Transformer2DModelOutput(sample=output) if inputs.get("return_dict", True) else (output,)

        vars(denoiser)["forward"] = degraded
        self._undo.append(restore)

    def _undo_all(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _clear(self) -> None:
        self._undo_all()
        self._cached = None
