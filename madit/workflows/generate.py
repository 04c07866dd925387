"""Draw prompts with a model and keep the pictures with what made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from madit.dit import as_dit
from madit.prompts import PromptSet


def generate(
    model: Any,
    prompts: PromptSet | Iterable[str],
    seeds: Iterable[int] = (0,),
    out: str | Path | None = None,
    run: Mapping[str, Any] | None = None,
    tick: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """One picture for each (prompt, seed), prompts outermost; each sample has its own CPU generator.

    Args:
        model: a `DiT` or a pipeline; edits and guidance that are open on it apply.
        prompts: what to draw.
        seeds: one picture of each prompt for each.
        out: folder for `prompt000-seed0.png`, ... and `pictures.jsonl` (file, prompt, seed); None: nothing is written.
        run: arguments of the pipeline (`num_inference_steps`, `guidance_scale`, `height`, ...).
        tick: called after each picture.

    Returns:
        PIL pictures.

    >>> pictures = generate("shapes", ["a large red circle"], run={"num_inference_steps": 2})
    >>> pictures[0].size
    (32, 32)
    """
    import torch

    from madit.dit import DiT

    dit = DiT.from_pretrained(model) if isinstance(model, (str, Path)) else as_dit(model)
    pictures, rows = [], []
    for i, prompt in enumerate(prompts):
        for seed in seeds:
            with dit.quiet():
                generator = torch.Generator("cpu").manual_seed(seed)
                result = dit.pipeline(prompt, generator=generator, output_type="pil", **dict(run or {}))
            pictures.append(result.images[0])
            rows.append({"file": f"prompt{i:03d}-seed{seed}.png", "prompt": prompt, "seed": seed})
            tick()
    if out is not None:
        _write(Path(out), pictures, rows)
    return pictures


def _write(folder: Path, pictures: list[Any], rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture, row in zip(pictures, rows, strict=True):
        picture.save(folder / row["file"])
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
