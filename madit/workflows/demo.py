"""`madit demo`: the whole flow on the embedded models, with controls, and one HTML report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from madit import figures, zoo
from madit.attribution import attribute
from madit.channels import ChannelSet
from madit.configs import GuidanceConfig
from madit.dit import DiT
from madit.factorial import LEVELS
from madit.location import locate
from madit.progress import progress
from madit.recording import record, record_factorial
from madit.workflows import conditions
from madit.workflows.conditions import BASELINE, Condition, Samples
from madit.workflows.report import ModelResults, write_report
from madit.workflows.tables import markdown

MODELS = ("shapes-detail", "shapes")
SCALES = (0.1, 0.25, 0.5)
MORE_CFG = 1.5
_HEADLINE = ("accuracy:texture", "accuracy:semantics", "high_band_power", "detail_distance", "excess_noise",
             "layout_correlation")  # fmt: skip
_RECORDED = 12  # samples whose statistics are recorded; the first is recorded raw as well


@dataclass(frozen=True)
class Found:
    """The channels that the later steps act on.

    Attributes:
        channels: what `locate` found, or the largest one where it found nothing.
        block: block whose entering state is edited.
        note: what a reader must know of how they were chosen.
    """

    channels: ChannelSet
    block: int
    note: str = ""


def demo(
    out: str | Path = "out/demo",
    models: Sequence[str] = MODELS,
    samples: int = 48,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Record, locate, attribute, intervene, export guidance, generate and report, on each of `models`.

    Args:
        out: folder for the stores, channel sets, guidance configs, pictures, tables and `report.html`.
        models: embedded models of the shapes set.
        samples: pictures for each condition.
        seed: of the prompts, the pictures and the controls.
        say: takes a line of text.

    Returns:
        The path of the report.

    >>> demo("out/demo", samples=8)  # doctest: +SKIP
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    how = conditions.shapes_samples(samples, seed, guidance_scale=1.0)  # without CFG, guidance stands alone
    for line in _plan(out, models, how):
        say(line)
    begun = time.monotonic()
    results = []
    for name in models:
        say(f"\n{name}: {zoo.facts(name)['description']}")
        results.append(_study(name, out / name, how, seed, say))
    page = write_report(
        out / "report.html",
        *results,
        title="madit demo: massive activations, what drives them, and what they are worth",
        summary=_SUMMARY,
        provenance={"samples": samples, "seed": seed, "steps": how.steps, "guidance_scale": how.guidance_scale},
        command=f"madit demo --samples {samples} --seed {seed} --out {out}",
    )
    say(f"\nReport: {page} ({_megabytes(out):.0f} MB in {out}, {time.monotonic() - begun:.0f} s)")
    return page


_SUMMARY = (
    "The same flow ran on every model below: record its residual stream, locate channels that are massive at nearly "
    "every image token, attribute their value to the model's inputs, set them to zero at one block with controls, and "
    "use them for Detail Guidance.",
    "Detail is judged on both sides: the distance of the high-band power from that of real pictures. Texture accuracy "
    "is read by a classifier, as is semantics (shape, colour, size and position, all right at once). Layout is that "
    "of the baseline.",
)


def _plan(out: Path, models: Sequence[str], how: Samples) -> list[str]:
    n = len(how.prompts)
    forwards = math.prod(LEVELS.values())
    runs = 6 + len(SCALES) + 2
    dit = DiT.from_pretrained(models[0])
    warm = Condition(BASELINE)
    few = conditions.shapes_samples(4, guidance_scale=how.guidance_scale)
    conditions.generate(dit, few, warm)
    start = time.monotonic()
    conditions.generate(dit, few, warm)
    each = (time.monotonic() - start) / 4
    # The edits, the degraded forwards and the recordings add about a half.
    seconds = len(models) * (1.5 * n * runs * each + forwards * each / how.steps + 20)
    return [
        f"madit demo: {' and '.join(models)}, on CPU, no network.",
        f"For each: record {_RECORDED} generations, locate, {forwards} single forwards for attribution, "
        f"{runs} conditions of {n} pictures ({how.steps} steps), report.",
        f"Expected: about {max(1, round(seconds / 60))} minutes on this machine, and under 60 MB in {out}.",
    ]


def _study(name: str, out: Path, how: Samples, seed: int, say: Callable[[str], None]) -> ModelResults:
    from madit.zoo.classifiers import load_classifiers

    dit = DiT.from_pretrained(name)
    tree = _record(dit, out, how)
    found = _locate(tree, name)
    found.channels.save(out / "channels.json")
    say(f"  located: {_listed(found)}")
    effects = _attribute(dit, out, found, seed)
    effects.to_dataframe().dropna(subset="total").to_csv(out / "effects.csv")
    config = GuidanceConfig.from_channels(found.channels, block=found.block, scale=SCALES[0])
    chosen = [
        Condition(BASELINE),
        *conditions.disruptions(dit, found.channels, found.block, seed),
        *conditions.guidances(dit, config, SCALES, MORE_CFG, seed),
    ]
    pictures = {}
    with progress(f"  {name}: pictures", len(chosen) * len(how.prompts)) as advance:
        for condition in chosen:
            pictures[condition.name] = conditions.generate(dit, how, condition, advance)
    np.savez_compressed(out / "pictures.npz", **pictures)
    table = conditions.tabulate(pictures, how, load_classifiers(), seed)
    table.to_dataframe().to_csv(out / "metrics.csv")
    distance = {w: float(table.detail_distance.sel(condition=conditions.guided(w))) for w in SCALES}
    best = min(SCALES, key=lambda w: distance[w])
    plain = float(table.detail_distance.sel(condition=BASELINE))
    config.replace(scale=best).save(out / "dg.json")
    say(f"  exported {out / 'dg.json'}: channels {list(config.channels)} entering block {config.block}, scale {best:g}")
    controls = [c.name for c in chosen if c.control]
    (out / "metrics.md").write_text(markdown(table, controls, _HEADLINE), encoding="utf-8")
    real = np.rint(255 * how.real).astype(np.uint8)
    shown = {"real": real, **{k: v for k, v in pictures.items() if k not in controls}}
    with figures.style():
        figures.channel_profile(tree, found.channels).savefig(out / "channels.png", dpi=110)
        figures.image_grid(shown, how.prompts).savefig(out / "pictures.png", dpi=110)
    return ModelResults(
        name,
        notes=zoo.facts(name)["notes"],
        constructed=zoo.facts(name)["constructed"],
        run=tree,
        channels=found.channels,
        effects=effects,
        images=shown,
        captions=how.prompts,
        metrics=table,
        controls=controls,
        findings=[
            *([found.note] if found.note else []),
            f"Of the scales tried, w = {best:g} comes nearest to real pictures in high-band power: distance "
            f"{distance[best]:.2f}, without guidance {plain:.2f}. It was chosen on these samples, so this is no test.",
        ],
        provenance={"edited block": found.block, "channels": list(config.channels)},
    )


def _record(dit: DiT, out: Path, how: Samples) -> xr.DataTree:
    prompts = list(how.prompts[:_RECORDED])
    arguments = {"num_inference_steps": how.steps, "guidance_scale": how.guidance_scale}
    tree = record(dit, prompts, out / "run.zarr", batch_size=4, **arguments)
    raw = record(dit, prompts[:1], out / "raw.zarr", values="raw", **arguments)
    return tree.assign({"activations": raw["activations"]})


def _locate(tree: xr.DataTree, name: str) -> Found:
    """The massive channels by the default criterion; where there are none, the largest one, and that is said."""
    channels = locate(tree)
    declared = zoo.facts(name).get("block")
    if len(channels):
        block = declared if declared is not None else _middle(channels)
        return Found(channels, block)
    largest = locate(tree, top_k=1)
    note = (
        f"No channel of {name} is massive at the default ratio of 100, so nothing here tests the literature's claim on "
        "a massive activation. The largest channel by ratio stands in for the edits and the guidance below."
    )
    return Found(largest, declared if declared is not None else _middle(largest), note)


def _middle(channels: ChannelSet) -> int:
    """The block nearest to 0.65 of the depth whose entering state has some of the channels; a starting point only."""
    wanted = round(0.65 * channels.n_blocks)
    entered = [b + 1 for b in channels.blocks() if b + 1 < channels.n_blocks]
    return min(entered, key=lambda b: abs(b - wanted))


def _attribute(dit: DiT, out: Path, found: Found, seed: int) -> xr.Dataset:
    texts = conditions.shapes_samples(24, seed + 1).prompts
    tree = record_factorial(dit, list(texts), out / "factorial.zarr", seed=seed, batch_size=36)
    return attribute(tree, found.channels, seed=seed)


def _listed(found: Found) -> str:
    places = sorted({(e.channel, e.block) for e in found.channels.entries})
    by_channel = {c: [b for channel, b in places if channel == c] for c, _ in places}
    words = [f"channel {c} at the output of blocks {blocks}" for c, blocks in by_channel.items()]
    return "; ".join(words) + (" (largest by ratio: none is massive)" if found.note else "")


def _megabytes(folder: Path) -> float:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
