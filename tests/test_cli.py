"""The command gives what the functions give; each verb on a planted model."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import madit
from madit.cli import app

VERBS = ("demo", "doctor", "sites", "record", "locate", "attribute", "intervene", "generate", "evaluate", "report")
SHORT = ("--pipe-kwargs", '{"max_sequence_length": 8}')


def read(path: str) -> list[list[str]]:
    return list(csv.reader(Path(path).read_text().splitlines()))


def table(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def run(*args: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.mark.parametrize("verb", [*((v,) for v in VERBS), ("export", "channels"), ("export", "guidance")])
def test_help_has_an_example_of_the_verb(verb: tuple[str, ...]) -> None:
    text = " ".join(run(*verb, "--help").output.split())
    assert f"Example: madit {' '.join(verb)}" in text


def test_sites_are_the_models_own(in_workspace: Path) -> None:
    lines = run("sites", "model").output.split()
    assert lines == madit.DiT.from_pretrained("model").sites()
    assert "blocks.3.img.resid_post" in lines


def test_doctor_passes_a_sound_model(in_workspace: Path) -> None:
    output = run("doctor", "model", *SHORT).output
    assert "FAILED" not in output
    assert output.count("ok") >= 8


def test_record_then_locate_finds_what_was_planted(in_workspace: Path) -> None:
    run(
        "record", "--model", "model", "--prompts", "a cat", "--prompts", "a dog", "--seeds", "0-1", "--store",
        "new.zarr", "--num-inference-steps", "2", "--guidance-scale", "1.0", *SHORT,
    )  # fmt: skip
    tree = madit.open_run("new.zarr")
    statistics = tree["/statistics/img"]
    assert dict(statistics.sizes)["sample"] == 4
    assert list(statistics.branch.values) == ["cond"]
    assert list(statistics.prompt.values) == ["a cat", "a cat", "a dog", "a dog"]
    output = run("locate", "new.zarr", "--out", "found.json").output
    assert "massive channels" in output
    found = madit.ChannelSet.load("found.json")
    assert {b: found.at(b) for b in found.blocks()} == {1: (7, 20), 2: (7, 20), 3: (7, 20)}


def test_locate_passes_its_options_on(in_workspace: Path) -> None:
    run("locate", "run.zarr", "--ratio", "1e6", "--out", "none.json")
    assert len(madit.ChannelSet.load("none.json")) == 0
    run("locate", "run.zarr", "--top-k", "1", "--out", "top.json")
    assert all(len(madit.ChannelSet.load("top.json").at(b)) == 1 for b in (1, 2, 3))


def test_record_design_then_attribute(in_workspace: Path) -> None:
    levels = '{"latent": 2, "timestep": 2, "pooled_text": 2, "text_tokens": 2}'
    run(
        "record", "--model", "model", "--prompts", "a cat", "--prompts", "a dog", "--prompts", "a red circle",
        "--store", "f.zarr", "--design", "matched", "--levels", levels, *SHORT,
    )  # fmt: skip
    assert madit.open_run("f.zarr").attrs["kind"] == "factorial"
    run("attribute", "f.zarr", "--channels", "channels.json", "--out", "effects.csv")


def test_attribute_writes_what_the_function_gives(in_workspace: Path) -> None:
    run("attribute", "factorial.zarr", "--channels", "channels.json", "--out", "effects.csv")
    effects = madit.attribute(madit.open_run("factorial.zarr"), madit.ChannelSet.load("channels.json"))
    rows = table("effects.csv")
    for row in rows:
        cell = effects.sel(block=int(row["block"]), channel=int(row["channel"]), factor=row["factor"])
        assert float(row["total"]) == pytest.approx(float(cell.total))
    n_known = int(effects.total.notnull().sum())
    assert len(rows) == n_known


def test_intervene_writes_pictures_that_differ(in_workspace: Path) -> None:
    output = run(
        "intervene", "--model", "model", "--prompts", "a cat", "--channels", "channels.json", "--blocks", "2",
        "--num-inference-steps", "2", "--out", "edit", *SHORT,
    ).output  # fmt: skip
    name = "prompt000-seed0.png"
    clean, edited = (np.asarray(Image.open(Path("edit", kind, name))) for kind in ("clean", "edited"))
    assert not np.array_equal(clean, edited)
    assert "high-band" not in output or "edited" in output


@pytest.mark.parametrize("control", ["random", "norm_matched", "all_blocks"])
def test_intervene_with_a_control(in_workspace: Path, control: str) -> None:
    run(
        "intervene", "--model", "model", "--prompts", "a cat", "--channels", "channels.json", "--blocks", "2",
        "--num-inference-steps", "2", "--control", control, "--out", "control", *SHORT,
    )  # fmt: skip
    assert len(list(Path("control").rglob("*.png"))) == 2


def test_generate_with_a_scale_of_zero_is_generate(in_workspace: Path) -> None:
    common = ("generate", "a cat", "--model", "model", "--num-inference-steps", "2", "--seeds", "3", *SHORT)
    run("export", "guidance", "--channels", "channels.json", "--block", "2", "--scale", "0", "--out", "zero.json")
    for name, guidance in (("plain", None), ("zero", "zero.json"), ("half", "dg.json")):
        run(*common, "--out", name, *(("--guidance", guidance) if guidance else ()))
    plain, zero, half = (np.asarray(Image.open(f"{n}/prompt000-seed3.png")) for n in ("plain", "zero", "half"))
    assert np.array_equal(plain, zero)
    assert not np.array_equal(plain, half)
    row = json.loads(Path("half/pictures.jsonl").read_text())
    assert row == {"file": "prompt000-seed3.png", "prompt": "a cat", "seed": 3}


def test_export_channels_as_a_table(in_workspace: Path) -> None:
    run("export", "channels", "--store", "run.zarr", "--out", "sub/channels.csv")
    rows = table("sub/channels.csv")
    expected = madit.ChannelSet.load("channels.json")
    assert [(int(r["block"]), int(r["channel"])) for r in rows] == [(e.block, e.channel) for e in expected.entries]
    assert float(rows[0]["ratio"]) == pytest.approx(expected.entries[0].ratio)


def test_export_guidance_as_document_and_as_guider(in_workspace: Path) -> None:
    common = ("export", "guidance", "--channels", "channels.json", "--block", "2", "--scale", "0.5")
    run(*common, "--factor", "0.25", "--out", "quarter.json")
    config = madit.GuidanceConfig.load("quarter.json")
    channels = madit.ChannelSet.load("channels.json")
    assert config == madit.GuidanceConfig.from_channels(channels, block=2, scale=0.5, factor=0.25)
    run(*common, "--out", "guider")
    guider = madit.DetailGuidance.from_pretrained("guider")
    assert guider.guidance == madit.GuidanceConfig.load("dg.json")


def test_evaluate_writes_what_the_function_gives(in_workspace: Path) -> None:
    rng = np.random.default_rng(0)
    for folder, noise in (("a", 40), ("b", 10)):
        Path(folder).mkdir()
        for i in range(3):
            pixels = 128 + noise * rng.standard_normal((32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(f"{folder}/{i}.png")
    run("evaluate", "--images", "a", "--reference", "b", "--out", "metrics.csv")
    written = {row[0]: float(row[1]) for row in read("metrics.csv")}
    expected = madit.evaluate(Path("a"), reference=Path("b"))
    assert written["log2_power_ratio"] == pytest.approx(float(expected.log2_power_ratio))
    assert written["log2_power_ratio"] > 2


def test_report_is_one_page(in_workspace: Path) -> None:
    run("report", "run.zarr", "--channels", "channels.json", "--factorial", "factorial.zarr", "--out", "page/r.html")
    page = Path("page/r.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert not re.search(r'(src|href)="https?://', page)


def test_module_runs_as_the_command() -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "madit", "--help"], capture_output=True, text=True, check=True)
    assert all(re.search(rf"^  {verb} ", done.stdout, re.M) for verb in (*VERBS, "export"))
