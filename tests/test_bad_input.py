"""Bad input gets one line that says what was expected, what came and what to do: in Python and on the command line."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import madit
from madit import errors
from madit.cli import app
from madit.zoo import small

SHORT = {"max_sequence_length": 8}


def refused(*args: str) -> str:
    """The one line that a command says before it stops with exit code 2."""
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 2, result.output + repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("madit: ")
    assert "Traceback" not in result.output
    return lines[0]


def says(error: BaseException, *words: str) -> None:
    """One line that has all of these words."""
    text = str(error)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.fixture
def dit(pipelines: dict[str, Any]) -> madit.DiT:
    return madit.DiT(pipelines["sd3"])


@pytest.fixture
def channels() -> madit.ChannelSet:
    return madit.ChannelSet.of({1: [5, 20]}, n_blocks=4, width=32)


# Models


class PixArtTransformer2DModel(torch.nn.Module):
    """A family that madit has no table for."""


def test_unknown_family_is_named_with_what_to_do() -> None:
    pipeline = namedtuple("Pipeline", "transformer")(PixArtTransformer2DModel())
    with pytest.raises(errors.UnknownFamilyError) as caught:
        madit.DiT(pipeline)
    says(caught.value, "expected", "PixArtTransformer2DModel", "SD3Transformer2DModel", "madit/arch/")
    assert isinstance(caught.value, TypeError)


def test_a_pipeline_without_a_transformer_is_refused() -> None:
    with pytest.raises(errors.UnknownFamilyError, match="object"):
        madit.DiT(object())


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "./empty"])
def test_missing_model(in_workspace: Path, name: str) -> None:
    Path("empty").mkdir()
    line = refused("sites", name)
    assert name in line
    assert "shapes" in line


def test_bad_device_and_dtype(in_workspace: Path) -> None:
    assert "no-such-device" in refused("doctor", "model", "--device", "no-such-device")
    assert "float7" in refused("doctor", "model", "--dtype", "float7")


# Configs and channel sets


def test_config_for_another_architecture_is_refused(channels: madit.ChannelSet, pipelines: dict[str, Any]) -> None:
    model = madit.DiT(pipelines["flux"]).fingerprint
    config = madit.GuidanceConfig.from_channels(channels.replace(model=model), block=2, scale=1.0)
    with pytest.raises(errors.ModelMismatchError) as caught, madit.guide(pipelines["sd3"], config):
        pass
    says(caught.value, "expected", "FluxTransformer2DModel", "SD3Transformer2DModel", "locate")


def test_channels_of_another_architecture_are_refused(dit: madit.DiT, pipelines: dict[str, Any]) -> None:
    other = madit.ChannelSet.of({1: [5]}, n_blocks=4, width=32).replace(model=madit.DiT(pipelines["flux"]).fingerprint)
    with pytest.raises(errors.ModelMismatchError), madit.intervene(dit, other, blocks=[2]):
        pass


def test_other_weights_are_warned_of(channels: madit.ChannelSet, pipelines: dict[str, Any]) -> None:
    other = madit.DiT(small.small_sd3(seed=1))
    config = madit.GuidanceConfig.from_channels(
        channels.replace(model=madit.DiT(pipelines["sd3"]).fingerprint), block=2, scale=1.0
    )
    with pytest.warns(errors.ModelMismatchWarning, match="other weights"), madit.guide(other, config):
        other.pipeline("a cat", num_inference_steps=1, output_type="latent", **SHORT)


def test_block_without_channels_is_refused(channels: madit.ChannelSet) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        madit.GuidanceConfig.from_channels(channels, block=3, scale=1.0)
    says(caught.value, "block 3", "[2]")


@pytest.mark.parametrize("cls", [madit.ChannelSet, madit.GuidanceConfig])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"null", b'{"kind": "madit.other"}', b"\xff\xfe", b"[" * 100_000, pickle.dumps({"a": 1})],
    ids=["empty", "list", "cut", "null", "other", "bytes", "deep", "pickle"],
)
def test_malformed_document(tmp_path: Path, cls: Any, content: bytes) -> None:
    path = tmp_path / "document.json"
    path.write_bytes(content)
    with pytest.raises(errors.ConfigError) as caught:
        cls.load(path)
    says(caught.value, "expected", cls.__name__, str(path))


@pytest.mark.parametrize("cls", [madit.ChannelSet, madit.GuidanceConfig])
def test_missing_and_newer_document(tmp_path: Path, cls: Any) -> None:
    with pytest.raises(errors.ConfigError, match="found none"):
        cls.load(tmp_path / "none.json")
    newer = tmp_path / "newer.json"
    newer.write_text(json.dumps({"format_version": 99}))
    with pytest.raises(errors.ConfigError, match=r"99.*update madit"):
        cls.load(newer)


def test_malformed_documents_on_the_command_line(in_workspace: Path) -> None:
    Path("bad.json").write_text("{")
    assert "bad.json" in refused("attribute", "factorial.zarr", "--channels", "bad.json")
    assert "bad.json" in refused("generate", "a cat", "--model", "model", "--guidance", "bad.json")
    assert "none.json" in refused("report", "run.zarr", "--channels", "none.json")


# Sites and edits


@pytest.mark.parametrize(
    "name", ["blocks.9.img.resid_post", "blocks.3.txt.resid_post", "blocks.1.img.gate", "nonsense"]
)
def test_a_site_that_does_not_exist(dit: madit.DiT, tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.SiteError) as caught:
        madit.record(dit, ["a cat"], store=str(tmp_path / "s.zarr"), sites=[name], pipe_kwargs=SHORT)
    says(caught.value, "expected", name)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("block", [0, 4, -1])
def test_a_block_that_cannot_be_edited(dit: madit.DiT, channels: madit.ChannelSet, block: int) -> None:
    with pytest.raises(errors.SiteError, match="from 1 to 3"), madit.intervene(dit, channels, blocks=[block]):
        pass


def test_an_edit_that_touched_nothing(dit: madit.DiT, channels: madit.ChannelSet) -> None:
    with pytest.raises(errors.NothingEditedError, match="never was"), madit.intervene(dit, channels, blocks=[2]):
        pass
    with (
        pytest.raises(errors.NothingEditedError, match="steps"),
        madit.intervene(dit, channels, blocks=[2], steps=[7]),
    ):
        dit.pipeline("a cat", num_inference_steps=1, output_type="latent", **SHORT)
    with pytest.raises(errors.NothingEditedError, match=r"\[2\]"), madit.intervene(dit, channels, blocks=[3]):
        pass


def test_guidance_that_touched_nothing(dit: madit.DiT, channels: madit.ChannelSet) -> None:
    config = madit.GuidanceConfig.from_channels(channels, block=2, scale=1.0)
    with pytest.raises(errors.NothingEditedError), madit.guide(dit, config):
        pass


def test_edits_on_the_command_line(in_workspace: Path) -> None:
    common = ("intervene", "--model", "model", "--prompts", "a cat", "--num-inference-steps", "1")
    short = ("--pipe-kwargs", json.dumps(SHORT))
    assert "block 0" in refused(*common, "--channels", "channels.json", "--blocks", "0", *short)
    assert "--blocks" in refused(*common, "--channels", "channels.json", "--blocks", "two", *short)
    assert "--channels" in refused(*common, "--blocks", "2", *short)
    assert "--pipe-kwargs" in refused(*common, "--channels", "channels.json", "--blocks", "2", "--pipe-kwargs", "{")


# Prompts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", ""),
        ("blank.txt", "\n \n"),
        ("empty.jsonl", ""),
        ("empty.csv", "prompt\n"),
        ("no.csv", "text\na\n"),
    ],
)
def test_empty_prompt_file(dit: madit.DiT, tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(errors.PromptError) as caught:
        madit.record(dit, path, store=str(tmp_path / "s.zarr"), pipe_kwargs=SHORT)
    says(caught.value, "expected", name)
    assert not (tmp_path / "s.zarr").exists()
    assert name in refused("record", "--model", "none", "--prompts", str(path), "--store", str(tmp_path / "s.zarr"))


def test_missing_prompt_file_and_empty_prompt(tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "s.zarr"))
    assert "none.txt" in refused("record", "--model", "none", "--prompts", str(tmp_path / "none.txt"), *store)
    assert "empty" in refused("record", "--model", "none", "--prompts", " ", *store)
    assert "--seeds" in refused("record", "--model", "none", "--prompts", "a cat", "--seeds", "one", *store)


# Stores


def test_a_store_that_is_not_ours(tmp_path: Path) -> None:
    import xarray as xr

    (tmp_path / "folder").mkdir()
    xr.Dataset({"a": ("x", [1, 2])}).to_zarr(tmp_path / "foreign.zarr", zarr_format=3, consolidated=False)
    for name in ("none.zarr", "folder", "foreign.zarr"):
        with pytest.raises(errors.StoreError) as caught:
            madit.open_run(str(tmp_path / name))
        says(caught.value, "expected", name)
        assert name in refused("locate", str(tmp_path / name))


def test_a_store_of_a_newer_format(workspace: Path, tmp_path: Path) -> None:
    store = tmp_path / "newer.zarr"
    shutil.copytree(workspace / "run.zarr", store)
    root = store / "zarr.json"
    root.write_text(root.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(errors.StoreError, match=r"99.*update madit"):
        madit.open_run(str(store))
    assert "99" in refused("report", str(store))


def test_stores_of_the_wrong_kind(in_workspace: Path) -> None:
    assert "factorial" in refused("locate", "factorial.zarr")
    assert "factorial" in refused("attribute", "run.zarr", "--channels", "channels.json")
    assert "factorial" in refused("report", "factorial.zarr")


def test_a_store_with_other_settings_is_not_written_over(dit: madit.DiT, tmp_path: Path) -> None:
    store = str(tmp_path / "run.zarr")
    madit.record(dit, ["a cat"], store=store, num_inference_steps=1, pipe_kwargs=SHORT)
    with pytest.raises(errors.StoreExistsError, match="num_inference_steps"):
        madit.record(dit, ["a cat"], store=store, num_inference_steps=2, pipe_kwargs=SHORT)


def test_not_enough_disk_is_seen_before_the_first_step(
    dit: madit.DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10, 10))
    steps: list[int] = []
    monkeypatch.setattr(dit.pipeline.scheduler, "step", lambda *_, **__: steps.append(1))
    with pytest.raises(errors.DiskSpaceError) as caught:
        madit.record(dit, ["a cat"], store=str(tmp_path / "s.zarr"), num_inference_steps=2, pipe_kwargs=SHORT)
    says(caught.value, "bytes free", "fewer")
    assert steps == []
    assert not (tmp_path / "s.zarr").exists()
    assert isinstance(caught.value, OSError)


def test_nonfinite_activations_are_recorded_and_said(tmp_path: Path) -> None:
    pipeline = small.small_sd3()
    with torch.no_grad():
        pipeline.transformer.transformer_blocks[1].ff.net[2].bias[3] = float("inf")
    with pytest.warns(errors.ActivationWarning, match="finite"):
        madit.record(
            madit.DiT(pipeline), ["a cat"], store=str(tmp_path / "s.zarr"), num_inference_steps=1, pipe_kwargs=SHORT
        )


# Criteria


def test_a_coverage_that_the_store_cannot_answer(workspace: Path) -> None:
    with pytest.raises(errors.CriterionError) as caught:
        madit.locate(madit.open_run(str(workspace / "run.zarr")), coverage=0.42)
    says(caught.value, "0.42", "0.01", "0.05")
    assert "0.42" in refused("locate", str(workspace / "run.zarr"), "--coverage", "0.42")


def test_parameters_that_make_no_sense(in_workspace: Path) -> None:
    assert "ratio" in refused("locate", "run.zarr", "--ratio", "-1")
    assert "--scale" in refused("export", "guidance", "--channels", "channels.json", "--block", "2", "--out", "a.json")
    assert "block 0" in refused(
        "export", "guidance", "--channels", "channels.json", "--block", "0", "--scale", "1", "--out", "a.json"
    )
    assert ".json or .csv" in refused("export", "channels", "--store", "run.zarr", "--out", "a.xlsx")
    assert "--design" in refused(
        "record", "--model", "model", "--prompts", "a cat", "--store", "s.zarr", "--levels", '{"latent": 2}'
    )


# The command


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("evaluate", "--images", str(tmp_path / "empty"))
    assert "none" in refused("evaluate", "--images", str(tmp_path / "none"))


def test_verbs_and_options_that_do_not_exist() -> None:
    assert "nonsense" in refused("nonsense")
    assert "--nonsense" in refused("locate", "run.zarr", "--nonsense")
    assert "--help" in refused("record")
    assert "command" in refused("export").lower()


def test_a_path_that_cannot_be_written(in_workspace: Path) -> None:
    Path("file").write_text("")
    assert "file" in refused("export", "channels", "--store", "run.zarr", "--out", "file/a.json")


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MADIT_DEBUG", "1")
    result = CliRunner().invoke(app, ["locate", "none.zarr"])
    assert isinstance(result.exception, errors.StoreError)


def test_every_error_is_also_a_builtin() -> None:
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.MaditError)]
    for kind in kinds:
        if kind is not errors.MaditError:
            assert any(b in (ValueError, TypeError, OSError, RuntimeError, FileExistsError) for b in kind.__mro__)
