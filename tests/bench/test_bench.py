"""What recording and guidance cost on a small pipeline: counted exactly, timed for information (`make bench`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import madit

STEPS = 6
RUN = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "max_sequence_length": 8, "output_type": "latent"}


@contextmanager
def counted(dit: madit.DiT) -> Iterator[list[int]]:
    """How often each block computes while the context is open."""
    counts = [0] * len(dit.blocks)

    def counter(index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    modules = [dit.transformer.get_submodule(b.fqn).attn for b in dit.blocks]
    handles = [m.register_forward_hook(counter(i)) for i, m in enumerate(modules)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def timed(what: str, run: Callable[[], Any]) -> float:
    run()
    begun = time.perf_counter()
    run()
    seconds = time.perf_counter() - begun
    print(f"\n{what:32s}{seconds:8.3f} s")
    return seconds


def test_recording_runs_the_model_once(pipelines: dict[str, Any], tmp_path: Path) -> None:
    dit = madit.DiT(pipelines["sd3"])
    timed("pipeline", lambda: dit.pipeline("a cat", **RUN))
    names = iter(range(10))

    def record() -> None:
        madit.record(
            dit, ["a cat"], store=str(tmp_path / f"{next(names)}.zarr"), num_inference_steps=STEPS,
            pipe_kwargs={"max_sequence_length": 8},
        )  # fmt: skip

    timed("record, statistics", record)
    with counted(dit) as counts:
        record()
    assert max(counts) <= STEPS + 1  # one more call to size the store


def test_guidance_recomputes_only_what_lies_behind_the_block(pipelines: dict[str, Any]) -> None:
    dit = madit.DiT(pipelines["sd3"])
    channels = madit.ChannelSet.of({1: [7, 20]}, n_blocks=len(dit.blocks), width=dit.width)
    config = madit.GuidanceConfig.from_channels(channels, block=2, scale=0.5)
    with madit.guide(dit, config):
        timed("guided", lambda: dit.pipeline("a cat", **RUN))
        with counted(dit) as counts:
            dit.pipeline("a cat", **RUN)
    assert counts == [STEPS, STEPS, 2 * STEPS, 2 * STEPS]
