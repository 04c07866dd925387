"""LayerNorms that keep a clean forward's statistics, so that an edit cannot act through their gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from madit.dit import DiT
from madit.edits import Argument
from madit.errors import UnsupportedPipelineError
from madit.passes import bound, shadow_transformer


class FrozenNorms:
    """Image-stream LayerNorms from one block on, and the final one, with the clean run's statistics.

    y[n] = (x[n] - mean(x_clean[n])) / sqrt(var(x_clean[n]) + eps)

    with mean and biased variance over channels, per token. Each call of the transformer first runs a clean forward on
    a shadow of it (`madit.passes`), which records them.

    Args:
        dit: the model.
        first: first block whose norms are frozen.
        rows: the rows edited in the current call; where there are none, nothing is frozen.
    """

    def __init__(self, dit: DiT, first: int, rows: Callable[[], dict[str, slice]]):
        self.dit, self.first, self.rows = dit, first, rows
        self.recording = False
        self._clean: dict[str, tuple[Tensor, Tensor]] = {}
        self._image_tokens = 0
        self._handles: list[Any] = []

    def __enter__(self) -> FrozenNorms:
        transformer, family = self.dit.transformer, self.dit.family
        self._handles.append(transformer.register_forward_pre_hook(self._before, with_kwargs=True))
        for block in self.dit.blocks[self.first :]:
            module: Any = block.module
            self._handles.append(
                module.register_forward_pre_hook(
                    self._counting(Argument(module, block.table.inputs["img"])), with_kwargs=True
                )
            )
            for name in block.table.norms:
                hook = self._norm(f"{block.fqn}.{name}", joint=name in block.table.joint_norms)
                self._handles.append(module.get_submodule(name).register_forward_hook(hook))
        final = transformer.get_submodule(family.final_norm)
        self._handles.append(final.register_forward_hook(self._norm(family.final_norm, joint=False)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clean.clear()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record the clean statistics of the call that is about to start."""
        self._clean.clear()
        rows = self.rows()
        if not rows:
            return
        self.recording = True
        try:
            with torch.no_grad():
                shadow_transformer(module)(**bound(module, args, kwargs))
        finally:
            self.recording = False

    def _counting(self, argument: Argument) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._image_tokens = argument.get(args, kwargs).shape[1]

        return hook

    def _norm(self, name: str, joint: bool) -> Callable[..., Tensor | None]:
        def hook(norm: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            rows = {} if self.recording else self.rows()
            if "degraded" in rows:
                raise UnsupportedPipelineError(
                    'expected layernorm="live" inside guide, whose degraded forward has no clean forward of its own; '
                    'got "frozen"'
                )
            if not self.recording and not rows:
                return None
            text = args[0].shape[1] - self._image_tokens if joint else 0
            x = args[0][:, text:].float()
            if self.recording:
                variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
                self._clean[name] = mean, (variance + norm.eps).rsqrt()  # type: ignore[operator]
                return None
            mean, gain = self._clean[name]
            frozen = (x - mean) * gain
            if norm.weight is not None:
                frozen = frozen * norm.weight
            if norm.bias is not None:
                frozen = frozen + norm.bias
            frozen = frozen.to(output.dtype)
            return torch.cat([output[:, :text], frozen], dim=1)

        return hook
