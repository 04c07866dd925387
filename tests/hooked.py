"""A second way to read a run: plain PyTorch hooks, with what each site is written out here by hand.

It shares no code with `madit.tracing` or the tables in `madit.arch`, and it counts calls by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

LEVELS = (0.01, 0.05, 0.10, 0.25, 0.50)


def blocks_of(transformer: Any) -> list[Any]:
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]


def read(pipeline: Any, run: Callable[[], Any]) -> tuple[list[dict[str, torch.Tensor]], Any]:
    """Values of every site by name, one dictionary for each call of the transformer, and what the run returned."""
    calls: list[dict[str, torch.Tensor]] = []

    def put(name: str, value: torch.Tensor) -> None:
        assert name not in calls[-1]
        calls[-1][name] = value.detach().clone()

    with ExitStack() as stack:

        def on(handle: Any) -> None:
            stack.callback(handle.remove)

        on(pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append({})))
        for i, block in enumerate(blocks_of(pipeline.transformer)):
            watch = _watch_single if type(block).__name__ == "FluxSingleTransformerBlock" else _watch_dual
            for handle in watch(i, block, put, calls):
                on(handle)
        result = run()
    return calls, result


def _ends(i: int, block: Any, put: Callable, calls: list) -> list[Any]:
    def before(module: Any, args: tuple, kwargs: dict) -> None:
        put(f"blocks.{i}.img.resid_pre", kwargs["hidden_states"])
        put(f"blocks.{i}.txt.resid_pre", kwargs["encoder_hidden_states"])

    def after(module: Any, args: tuple, output: Any) -> None:
        if output[0] is not None:
            put(f"blocks.{i}.txt.resid_post", output[0])
        put(f"blocks.{i}.img.resid_post", output[1])

    return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]


def _watch_dual(i: int, block: Any, put: Callable, calls: list) -> list[Any]:
    """Gates and the MLP's shift and scale as the AdaLN modules return them, without cutting their projection."""

    def adaln(stream: str) -> Callable:
        def hook(module: Any, args: tuple, output: Any) -> None:
            for name, value in zip(("gate_msa", "shift_mlp", "scale_mlp", "gate_mlp"), output[1:5], strict=True):
                put(f"blocks.{i}.{stream}.{name}", value)
            if len(output) == 7:
                put(f"blocks.{i}.{stream}.gate_msa2", output[6])

        return hook

    def gated(stream: str, kind: str, index: int | None) -> Callable:
        def hook(module: Any, args: tuple, output: Any) -> None:
            value = output if index is None else output[index]
            gate = calls[-1][f"blocks.{i}.{stream}.{kind.replace('update', 'gate')}"]
            put(f"blocks.{i}.{stream}.{kind}", gate[:, None, :] * value)

        return hook

    handles = [
        *_ends(i, block, put, calls),
        block.norm1.register_forward_hook(adaln("img")),
        block.attn.register_forward_hook(gated("img", "update_msa", 0)),
        block.ff.register_forward_hook(gated("img", "update_mlp", None)),
    ]
    if getattr(block, "attn2", None) is not None:
        handles.append(block.attn2.register_forward_hook(gated("img", "update_msa2", None)))
    if not getattr(block, "context_pre_only", False):
        handles += [
            block.norm1_context.register_forward_hook(adaln("txt")),
            block.attn.register_forward_hook(gated("txt", "update_msa", 1)),
            block.ff_context.register_forward_hook(gated("txt", "update_mlp", None)),
        ]
    return handles


def _watch_single(i: int, block: Any, put: Callable, calls: list) -> list[Any]:
    def adaln(module: Any, args: tuple, output: Any) -> None:
        put(f"blocks.{i}.img.gate", output[1])

    def both(module: Any, args: tuple, output: Any) -> None:
        update = calls[-1][f"blocks.{i}.img.gate"][:, None, :] * output
        n = calls[-1][f"blocks.{i}.txt.resid_pre"].shape[1]
        put(f"blocks.{i}.txt.update", update[:, :n])
        put(f"blocks.{i}.img.update", update[:, n:])

    return [
        *_ends(i, block, put, calls),
        block.norm.register_forward_hook(adaln),
        block.proj_out.register_forward_hook(both),
    ]


def statistics(h: torch.Tensor) -> dict[str, np.ndarray]:
    """The reductions of one row (token, channel) in numpy and float64; order statistics by sorting."""
    x = h.double().numpy()
    n, a = x.shape[0], np.abs(x)
    return {
        "mean": x.mean(axis=0),
        "mean_abs": a.mean(axis=0),
        "mean_square": (x**2).mean(axis=0),
        "max_abs": a.max(axis=0),
        "abs_quantile": np.stack([np.sort(a, axis=0)[int(p * n)] for p in LEVELS]),
        "median_abs": np.sort(a, axis=None)[a.size // 2],
    }
