"""Turn a finished training run into an embedded model: `python -m madit.workflows.publish shapes RUN`.

Writes the pipeline folder with fp16 weights, `facts.json`, `training.jsonl`, and the model card with samples and loss
curve. The card states what rounding the weights to fp16 does to the pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from madit import zoo
from madit.dit import DiT
from madit.evaluation import compare, evaluate
from madit.figures import image_grid, style
from madit.recording import record
from madit.workflows import conditions
from madit.zoo import training
from madit.zoo.classifiers import load_classifiers

DESCRIPTIONS = {
    "shapes": "a 3.5 M parameter SD3 trained on captioned textured shapes; nothing planted",
    "shapes-detail": "a constructed positive control: its local detail was made to hang on planted channels",
}
NOTES = {
    "shapes": (
        "Trained from scratch by flow matching; nothing was planted and nothing was selected for massive activations. "
        "What it shows, at 3.5 M parameters and 32x32 pixels, need not hold for large models."
    ),
    "shapes-detail": (
        "Two channels were planted at a constant value in a snapshot of `shapes`, and the model was then fine-tuned so "
        "that with these channels set to zero in the state entering one block it predicts the blurred picture. It "
        "validates the instruments: it is never evidence for a claim about massive activations in trained models."
    ),
}


def publish(name: str, run: Path, folder: Path | None = None) -> Path:
    """Write the embedded model `name` from the training run `run`; returns its folder."""
    folder = zoo.path(name) if folder is None else folder
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(run / "pipeline", folder)
    shutil.copy(run / "log.jsonl", folder / "training.jsonl")
    for file in folder.rglob("*.safetensors"):
        halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
        file.chmod(0o644)
    planting = run / "planting.json"
    planted = json.loads(planting.read_text()) if planting.exists() else {}
    facts: dict[str, Any] = {
        "description": DESCRIPTIONS[name],
        "notes": NOTES[name],
        "constructed": bool(planted),
        "seed": 0,
        "steps": json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"],
    }
    if planted:
        facts |= {"channels": planted["channels"], "planted_block": planted["block"], "block": planted["block"] + 1}
        facts |= {"magnitude": planted["magnitude"], "base": planted["base"]}
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    if not planted:
        along_training(run).to_netcdf(folder / "along_training.nc", engine="scipy")
    numbers = _card_numbers(run / "pipeline", folder)
    (folder / "facts.json").write_text(json.dumps(facts | {"measured": numbers}, indent=2) + "\n")
    _loss_curve(folder)
    (folder / "README.md").write_text(_card(name, facts, numbers))
    return folder


def along_training(run: Path, n: int = 8, steps: int = 10) -> xr.Dataset:
    """Statistics of every block output at the snapshots of a training run, for the question when channels grow.

    Returns:
        Dataset over (training_step, step, block, channel), means over `n` samples of the conditional branch: `mean`,
        `mean_abs`, `abs_quantile` (level 0.05 over tokens: 95 % of the tokens exceed it); and `median_abs` without
        channel.
    """
    samples = conditions.shapes_samples(n, seed=1)
    pipeline = training.build_pipeline()
    found = []
    for file in sorted((run / "snapshots").glob("*.pt")):
        training.install(pipeline, torch.load(file, weights_only=True))
        with tempfile.TemporaryDirectory() as folder:
            tree = record(
                DiT(pipeline), list(samples.prompts), f"{folder}/run.zarr", num_inference_steps=steps,
                guidance_scale=samples.guidance_scale, batch_size=n,
            )  # fmt: skip
            data = tree["statistics/img"].to_dataset().sel(branch="cond")
            kept = data[["mean", "mean_abs", "abs_quantile", "median_abs"]].sel(quantile=0.05, method="nearest")
            found.append(kept.mean("sample").compute().expand_dims(training_step=[int(file.stem)]))
    statistics = xr.concat(found, dim="training_step").drop_vars(["branch", "block_fqn", "block_kind", "quantile"])
    return statistics.assign_attrs(samples=n, guidance_scale=samples.guidance_scale)


def _card_numbers(full: Path, half: Path, n: int = 200) -> dict[str, Any]:
    """Accuracies of the shipped weights, and what fp16 rounding changes, on `n` samples at guidance scale 1 and 2."""
    samples = conditions.shapes_samples(n, batch=25)
    pictures = {}
    for key, folder in (("fp32", full), ("fp16", half)):
        dit = DiT(zoo.load_pipeline(str(folder), torch_dtype=torch.float32))
        pictures[key] = conditions.generate(dit, samples, conditions.Condition(key))
    real = np.rint(255 * samples.real).astype(np.uint8)
    judges = load_classifiers()
    table = compare(pictures, real, judges, samples.labels, baseline="fp32", paired=False)
    difference = np.abs(pictures["fp32"].astype(int) - pictures["fp16"].astype(int))
    on_real = evaluate(real, classifiers=judges, labels=samples.labels)
    with style():
        grid = image_grid({"real": real, "generated": pictures["fp16"]}, samples.prompts)
        grid.savefig(half / "samples.png", dpi=110)
    names = ("semantics", "texture")
    return {
        "n": n,
        "guidance_scale": samples.guidance_scale,
        "accuracy": {k: round(float(table.accuracy.sel(condition="fp16", factor=k)), 3) for k in names},
        "accuracy_fp32": {k: round(float(table.accuracy.sel(condition="fp32", factor=k)), 3) for k in names},
        "accuracy_on_real": {k: round(float(on_real.accuracy.sel(factor=k)), 3) for k in names},
        "fp16_mean_difference": round(float(difference.mean()), 3),
        "fp16_largest_difference": int(difference.max()),
    }


def _loss_curve(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    latest = {row["step"]: row["loss"] for row in rows}  # a resumed run repeats some steps
    with style():
        figure = Figure(figsize=(6, 3), layout="constrained")
        ax = figure.subplots()
        ax.plot(list(latest), list(latest.values()), lw=1)
        ax.set(xlabel="optimiser step", ylabel="training loss", yscale="log")
        figure.savefig(folder / "loss.png", dpi=110)


def _card(name: str, facts: dict[str, Any], numbers: dict[str, Any]) -> str:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))
    return template.render(name=name, facts=facts, numbers=numbers)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=zoo.names())
    parser.add_argument("run", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(publish(args.name, args.run))


if __name__ == "__main__":
    main()
