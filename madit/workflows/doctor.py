"""Check a checkpoint by behaviour: does madit read and edit it where it says it does?

Every check compares madit with plain PyTorch hooks on the same model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madit.arch import BoundBlock
from madit.channels import ChannelSet
from madit.dit import DiT, as_dit
from madit.intervention import intervene
from madit.recording import record

FACTOR = 0.5
"""Every second channel is scaled by this: scaling all of them would hide behind the next LayerNorm."""

RELATIVE_TOLERANCE = 1e-5
"""For means over tokens in float32, relative to the largest magnitude: the order of the sum differs."""

Forward = Callable[[], Tensor]
States = dict[tuple[int, str], Tensor]


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    passed: bool
    detail: str

    @property
    def verdict(self) -> str:
        """`ok` or `FAILED`."""
        return "ok" if self.passed else "FAILED"


def doctor(
    model: Any, prompt: str = "a red circle", seed: int = 0, pipe_kwargs: Mapping[str, Any] | None = None
) -> list[Check]:
    """Check that madit reads and edits this model where it says.

    Checks: the transformer repeats itself; blocks run once each in the order of `dit.blocks`; an edit of the state
    entering each block changes the output and nothing before that block, in both streams; `intervene` gives what a
    plain hook gives; what `record` wrote equals statistics from plain hooks; each block's state is the one before
    plus its updates; and afterwards the model is as it was.

    Args:
        model: a `DiT` or a pipeline.
        prompt: what to run.
        seed: of the sample.
        pipe_kwargs: arguments of the pipeline (`height`, `max_sequence_length`, ...).

    Returns:
        One `Check` for each finding; about 4 forward passes for each block, and two runs of 2 steps.

    >>> all(check.passed for check in doctor(DiT.from_pretrained("shapes")))
    True
    """
    dit = as_dit(model)
    run = {"num_inference_steps": 2, "guidance_scale": 4.0, **dict(pipe_kwargs or {})}
    forward = _captured_forward(dit, prompt, seed, run)
    clean, states, order = _observe(dit, forward)
    again, _, _ = _observe(dit, forward)
    in_order = order == list(range(len(dit.blocks)))
    checks = [
        Check("repeatable", torch.equal(clean, again), "two forward passes on the same inputs agree in every bit"),
        Check(
            "order",
            in_order,
            f"{len(order)} blocks ran, each once, in order" if in_order else f"blocks ran in the order {order}",
        ),
    ]
    checks += [_edits(dit, forward, clean, states, stream) for stream in ("img", "txt")]
    checks.append(_interventions(dit, forward, clean))
    checks += _recordings(dit, prompt, seed, run)
    checks.append(Check("undone", torch.equal(clean, forward()), "afterwards the model gives what it gave before"))
    return checks


def site_table(dit: DiT) -> list[tuple[int, str, str, str]]:
    """Index, module, kind and site kinds of each block, for printing."""
    rows = []
    for block in dit.blocks:
        streams = sorted({site.stream for site in block.sites()})
        kinds = [f"{s}: {' '.join(site.kind for site in block.sites() if site.stream == s)}" for s in streams]
        rows.append((block.index, block.fqn, block.table.kind, "\n".join(kinds)))
    return rows


def _captured_forward(dit: DiT, prompt: str, seed: int, run: Mapping[str, Any]) -> Forward:
    """A function that repeats the pipeline's first call of the transformer."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    handle = dit.transformer.register_forward_pre_hook(lambda m, a, k: calls.append((a, dict(k))), with_kwargs=True)
    try:
        _run(dit, prompt, seed, run)
    finally:
        handle.remove()
    args, kwargs = calls[0]

    @torch.no_grad()
    def forward() -> Tensor:
        fresh = {k: dict(v) if isinstance(v, dict) else v for k, v in kwargs.items()}  # SD3 pops from a dict of these
        return dit.transformer(*args, **{**fresh, "return_dict": False})[0].clone()

    return forward


def _run(dit: DiT, prompt: str, seed: int, run: Mapping[str, Any]) -> None:
    with dit.quiet():
        dit.pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="latent", **run)


def _module(dit: DiT, block: BoundBlock) -> torch.nn.Module:
    return dit.transformer.get_submodule(block.fqn)


def _observe(dit: DiT, forward: Forward) -> tuple[Tensor, States, list[int]]:
    """The output, the states entering every block by plain hooks, and the order in which blocks ran."""
    states: States = {}
    order: list[int] = []

    def hook(block: BoundBlock) -> Callable[..., None]:
        def read(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            order.append(block.index)
            for stream, name in block.table.inputs.items():
                states[block.index, stream] = kwargs[name].detach().clone()

        return read

    with _hooks(_module(dit, b).register_forward_pre_hook(hook(b), with_kwargs=True, prepend=True) for b in dit.blocks):
        return forward(), states, order


@contextmanager
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def _edited(dit: DiT, block: BoundBlock, stream: str) -> Iterator[None]:
    """Scale every second channel of the state entering a block, by a plain hook."""
    name = block.table.inputs[stream]

    def edit(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        state = kwargs[name].clone()
        state[..., ::2] *= FACTOR
        return args, {**kwargs, name: state}

    with _hooks(iter([_module(dit, block).register_forward_pre_hook(edit, with_kwargs=True)])):
        yield


def _edits(dit: DiT, forward: Forward, clean: Tensor, states: States, stream: str) -> Check:
    silent, early = [], []
    for block in dit.blocks:
        with _edited(dit, block, stream):
            output, seen, _ = _observe(dit, forward)
        if torch.equal(output, clean):
            silent.append(block.index)
        if any(not torch.equal(seen[key], states[key]) for key in states if key[0] < block.index):
            early.append(block.index)
    detail = f"an edit entering each of {len(dit.blocks)} blocks changes the output and nothing before it"
    if silent or early:
        detail = f"edits entering {silent or 'no'} blocks changed nothing, {early or 'none'} changed something before"
    return Check(f"edits, {stream}", not (silent or early), detail)


def _interventions(dit: DiT, forward: Forward, clean: Tensor) -> Check:
    wrong = []
    channels = range(0, dit.width, 2)
    for block in dit.blocks[1:]:
        chosen = ChannelSet.of({block.index - 1: channels}, n_blocks=len(dit.blocks), width=dit.width)
        with intervene(dit, chosen, blocks=[block.index], mode="scale", factor=FACTOR):
            ours = forward()
        with _edited(dit, block, "img"):
            plain = forward()
        if not torch.equal(ours, plain):
            wrong.append(block.index)
    detail = "intervene and a plain hook give the same bits at every block"
    return Check("intervene", not wrong, f"differs from a plain hook at blocks {wrong}" if wrong else detail)


def _recordings(dit: DiT, prompt: str, seed: int, run: Mapping[str, Any]) -> list[Check]:
    """Record a run and compare it with what plain hooks on the blocks see in another."""
    outputs = _plain_outputs(dit, prompt, seed, run)
    names = [str(s) for b in dit.blocks for s in b.sites() if s.stream == "img" and _recorded(s.kind)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {k: v for k, v in run.items() if k not in ("num_inference_steps", "guidance_scale")}
        chosen = {k: v for k, v in run.items() if k in ("num_inference_steps", "guidance_scale")}
        store = str(Path(folder) / "doctor.zarr")
        tree = record(dit, [prompt], store=store, seeds=(seed,), sites=names, pipe_kwargs=settings, **chosen)
        statistics = tree["/statistics/img"].to_dataset().load()
        updates = tree["/updates/img"].to_dataset().load()
    return [_same_statistics(dit, statistics, outputs), _ledger(dit, statistics, updates)]


def _recorded(kind: str) -> bool:
    return kind == "resid_post" or kind.startswith("update")


def _plain_outputs(dit: DiT, prompt: str, seed: int, run: Mapping[str, Any]) -> dict[int, list[Tensor]]:
    """Image-stream output of each block in each call of a run."""
    outputs: dict[int, list[Tensor]] = {b.index: [] for b in dit.blocks}

    def hook(block: BoundBlock) -> Callable[..., None]:
        return lambda m, a, output: outputs[block.index].append(output[block.table.outputs["img"]].detach().clone())

    with _hooks(_module(dit, b).register_forward_hook(hook(b)) for b in dit.blocks):
        _run(dit, prompt, seed, run)
    return outputs


def _same_statistics(dit: DiT, statistics: Any, outputs: dict[int, list[Tensor]]) -> Check:
    """Compare means and maxima over tokens, cell by cell."""
    guided = dit.family.cfg == "batched" and bool(getattr(dit.pipeline, "do_classifier_free_guidance", False))
    branches = ["uncond", "cond"] if guided else ["cond"]
    worst, cells = 0.0, 0
    for index, calls in outputs.items():
        for step, state in enumerate(calls):
            for row, branch in enumerate(branches):
                h = state[row].float().cpu()
                cell = statistics.isel(sample=0).sel(step=step, branch=branch, block=index)
                scale = float(h.abs().max())
                for name, truth in (("mean", h.mean(0)), ("max_abs", h.abs().amax(0))):
                    gap = float((torch.from_numpy(cell[name].values) - truth).abs().max()) / scale
                    worst, cells = max(worst, gap), cells + 1
    detail = f"means and maxima in {cells} cells differ by {worst:.1e} of the largest magnitude"
    return Check("record", worst <= _tolerance(dit), detail)


def _tolerance(dit: DiT) -> float:
    """Batch shapes are equal, but a second run of a GPU kernel need not be; a half-precision state has its rounding."""
    eps = torch.finfo(dit.transformer.dtype).eps
    return max(RELATIVE_TOLERANCE, eps if eps > torch.finfo(torch.float32).eps else 0.0)


def _ledger(dit: DiT, statistics: Any, updates: Any) -> Check:
    """Conservation: mean of a block's output minus that of the one before = sum of the means of its updates."""
    written = updates["mean"].sum("kind", skipna=True).sel(block=statistics.block.values[1:])
    change = statistics["mean"].diff("block")
    scale = float(abs(statistics["max_abs"]).max())
    gap = float(abs(change - written).max()) / scale
    return Check(
        "updates", gap <= 10 * _tolerance(dit), f"state = state before + updates, within {gap:.1e} of the largest"
    )
