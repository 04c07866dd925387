"""Stores: round trips, resuming, and what other paths get."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from madit import store
from madit.errors import DiskSpaceError, StoreError, StoreExistsError
from madit.store import Array, Group, check_space, create, decode_bf16, open_run, resume, verify

SETTINGS = {"seeds": [0], "steps": 3}
GROUP = Group(
    "statistics/img",
    {
        "mean": Array(("sample", "step", "channel"), (3, 2, 4), attrs={"long_name": "mean over tokens of h"}),
        "bits": Array(("sample", "channel"), (3, 4), "uint16", {"torch_dtype": "bfloat16"}),
        "recorded": Array(("sample", "step"), (3, 2), "bool"),
        "image": Array(("sample", "rgb"), (3, 3), "uint8"),
    },
    {
        "sample": (("sample",), np.arange(3)),
        "prompt": (("sample",), ["a", "ein Käfer, viel länger", ""]),
        "sigma": (("step",), np.array([1.0, 0.5])),
    },
    {"design": "matched"},
)


def values(n: int, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {
        "statistics/img": {
            "mean": rng.normal(size=(n, 2, 4)).astype(np.float32),
            "bits": rng.integers(0, 0x7F80, (n, 4)).astype(np.uint16),
            "recorded": np.ones((n, 2), bool),
            "image": rng.integers(0, 256, (n, 3)).astype(np.uint8),
        }
    }


def write(path: Path | str, batches: int = 2) -> store.Writer:
    writer = create(path, [GROUP], "run", SETTINGS, {"dtype": "float32"})
    for i, (start, n) in enumerate([(0, 2), (2, 1)][:batches]):
        writer.append(i, start, values(n, seed=i))
    if batches == 2:
        writer.finish()
    return writer


@pytest.fixture(params=["folder", "memory", "zip"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        path = f"memory://{tmp_path.name}.zarr"
        write(path)
        return path
    write(tmp_path / "run.zarr")
    if request.param == "folder":
        return str(tmp_path / "run.zarr")
    return shutil.make_archive(str(tmp_path / "run"), "zip", tmp_path / "run.zarr")


def test_what_was_written_is_read(written: str) -> None:
    tree = open_run(written)
    data = tree["statistics/img"]
    assert data["mean"].chunks is not None  # lazy
    for start, n, seed in ((0, 2, 0), (2, 1, 1)):
        for name, truth in values(n, seed)["statistics/img"].items():
            got = data[name].values[start : start + n]
            np.testing.assert_array_equal(got, decode_bf16(truth) if name == "bits" else truth)
    assert data["prompt"].values.tolist() == ["a", "ein Käfer, viel länger", ""]
    assert data["sigma"].dims == ("step",)
    assert data["mean"].attrs == {"long_name": "mean over tokens of h"}
    assert data.attrs == {"design": "matched"}
    assert tree.attrs["dtype"] == "float32"
    assert json.loads(tree.attrs["settings"]) == SETTINGS


def test_xarray_alone_reads_it_too(tmp_path: Path) -> None:
    write(tmp_path / "run.zarr")
    plain = xr.open_datatree(tmp_path / "run.zarr", engine="zarr")["statistics/img"]
    ours = open_run(tmp_path / "run.zarr")["statistics/img"]
    np.testing.assert_array_equal(plain["mean"].values, ours["mean"].values)
    assert set(plain.coords) == set(ours.coords)


def test_every_bf16_bit_pattern_survives(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16).reshape(1, -1)
    group = Group(
        "activations/img", {"a": Array(("sample", "channel"), bits.shape, "uint16", {"torch_dtype": "bfloat16"})}
    )
    writer = create(tmp_path / "run.zarr", [group], "run", {}, {})
    writer.append(0, 0, {"activations/img": {"a": bits}})
    writer.finish()
    got = open_run(tmp_path / "run.zarr")["activations/img"]["a"].values
    truth = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(got.view(np.uint32), truth.view(np.uint32))


def test_what_was_not_written_reads_as_missing_never_as_zero(tmp_path: Path) -> None:
    write(tmp_path / "run.zarr", batches=1)
    with pytest.warns(UserWarning, match="unfinished run"):
        data = open_run(tmp_path / "run.zarr")["statistics/img"]
    assert data["recorded"].values[:, 0].tolist() == [True, True, False]
    for name in ("mean", "bits"):
        assert np.isnan(data[name].values[2]).all()
        assert np.isfinite(data[name].values[:2]).all()


def test_zeros_are_written_too(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    writer = create(path, [GROUP], "run", SETTINGS, {})
    writer.append(0, 0, {"statistics/img": {n: np.zeros_like(v) for n, v in values(2)["statistics/img"].items()}})
    assert (path / "statistics/img/image/c/0").exists()
    assert (path / "statistics/img/recorded/c/1").exists()


def test_one_unit_is_whole_files(tmp_path: Path) -> None:
    """No batch shares a file with another, so what a crash spoils is its own."""
    big = Group("activations/img", {"a": Array(("sample", "step", "token", "channel"), (3, 4, 600, 1000))})
    assert big.arrays["a"].chunks() == (1, 1, 600, 1000)
    writer = create(tmp_path / "run.zarr", [big], "run", {}, {})
    data = np.random.default_rng(0).normal(size=(1, 4, 600, 1000)).astype(np.float32)
    writer.append(1, 1, {"activations/img": {"a": data}})
    files = [k for k in store.Files(tmp_path / "run.zarr").find("activations/img/a") if "/c/" in k]
    assert files == ["activations/img/a/c/1/0/0/0"]
    with pytest.warns(UserWarning, match="unfinished"):
        got = open_run(tmp_path / "run.zarr")["activations/img"]["a"]
    np.testing.assert_array_equal(got[1].values, data[0])


def test_resume_knows_the_batches_with_a_marker(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    assert resume(path, SETTINGS, "run") is None
    write(path, batches=1)
    writer = resume(path, SETTINGS, "run")
    assert writer is not None
    assert (writer.done, writer.complete) == ({0}, False)
    (path / "statistics/img/mean/c/1/0/0").unlink()  # a lost shard loses its batch
    assert resume(path, SETTINGS, "run").done == set()  # type: ignore[union-attr]


def test_a_store_moved_before_it_is_finished_resumes(tmp_path: Path) -> None:
    write(tmp_path / "run.zarr", batches=1)
    shutil.move(tmp_path / "run.zarr", tmp_path / "moved.zarr")
    writer = resume(tmp_path / "moved.zarr", SETTINGS, "run")
    assert writer is not None
    writer.append(1, 2, values(1, seed=1))
    writer.finish()
    assert open_run(tmp_path / "moved.zarr")["statistics/img"]["recorded"].all()


def test_rubble_of_a_store_that_was_being_made_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    store.Files(path).write(store._CREATING, b"{}")
    zarr.open_group(path, mode="a").create_group("statistics")
    assert resume(path, SETTINGS, "run") is None
    assert not path.exists()


def test_other_settings_are_refused_naming_the_first(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    write(path)
    with pytest.raises(StoreExistsError, match=r"another `seeds`: \[0\] there, \[1\] here"):
        resume(path, {"seeds": [1], "steps": 4}, "run")
    with pytest.raises(StoreExistsError, match="another `extra`: null there"):
        resume(path, {**SETTINGS, "extra": 1}, "run")
    with pytest.raises(StoreExistsError, match="expected a 'factorial' store"):
        resume(path, SETTINGS, "factorial")


def test_values_of_another_shape_are_refused(tmp_path: Path) -> None:
    writer = create(tmp_path / "run.zarr", [GROUP], "run", SETTINGS, {})
    with pytest.raises(StoreError, match=r"expected statistics/img/mean of shape \(n, 2, 4\)"):
        writer.append(0, 0, {"statistics/img": {"mean": np.zeros((1, 2, 5), np.float32)}})


def test_paths_that_hold_no_store_of_ours(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("mine")
    zarr.open_group(tmp_path / "foreign.zarr", mode="w", attributes={"a": 1})
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr/zarr.json").write_text("{")
    for name, message in {
        "none.zarr": "found none at",
        "none.zip": "found none at",
        "text.zip": "zip of a madit store",
        "folder": "no zarr group",
        "broken.zarr": "no zarr group",
        "foreign.zarr": "something else",
    }.items():
        with pytest.raises(StoreError, match=message) as caught:
            open_run(tmp_path / name)
        assert "\n" not in str(caught.value)
    for name in ("folder", "foreign.zarr", "broken.zarr"):
        with pytest.raises(StoreError):
            resume(tmp_path / name, SETTINGS, "run")
    assert (tmp_path / "folder/file").read_text() == "mine"
    with pytest.raises(StoreError, match="folder or a URL"):
        resume(tmp_path / "run.zip", SETTINGS, "run")
    with pytest.raises(StoreError, match="found none"):
        open_run("memory://nothing.zarr")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run.zarr")
    root = zarr.open_group(tmp_path / "run.zarr", mode="r+", use_consolidated=False)
    root.attrs["format_version"] = 99
    store._consolidate(root)
    with pytest.raises(StoreError, match=r"got 99 .* update madit"):
        open_run(tmp_path / "run.zarr")


def test_verify_finds_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    write(path)
    assert verify(path) == []
    shard = path / "statistics/img/mean/c/0/0/0"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    (path / "statistics/img/image/c/2/0").unlink()
    assert verify(path) == [
        "statistics/img/mean/c/0/0/0 differs from what was written",
        "statistics/img/image/c/2/0 is missing",
    ]


def test_space_is_checked_on_local_disks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    check_space(tmp_path / "deep/er/run.zarr", 1000)
    with pytest.raises(DiskSpaceError, match=r"expected 1001 bytes free .* got 1000"):
        check_space(tmp_path / "deep/er/run.zarr", 1001)
    check_space("memory://run.zarr", 10**15)
    assert fsspec.filesystem("memory").exists("run.zarr") is False
