"""What madit.store relies on in zarr and xarray; when one of these fails, an upstream release changed it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr


def test_zarr_has_no_bfloat16(tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError)):
        zarr.create_array(tmp_path / "a", shape=(2,), dtype="bfloat16")


def test_a_chunk_of_the_fill_value_is_not_written_unless_asked(tmp_path: Path) -> None:
    for asked in (False, True):
        path = tmp_path / f"{asked}"
        with zarr.config.set({"array.write_empty_chunks": asked}):
            array = zarr.create_array(path, shape=(2, 2), chunks=(1, 2), dtype="uint8", fill_value=0)
            array[:] = 0
        assert (path / "c/0/0").exists() is asked


def test_a_deleted_chunk_reads_as_the_fill_value_without_a_word(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(2,), chunks=(1,), dtype="uint16", fill_value=0x7FC0)
    array[:] = 5
    (tmp_path / "a/c/1").unlink()
    assert zarr.open_array(tmp_path / "a", mode="r")[:].tolist() == [5, 0x7FC0]


def test_a_dot_folder_is_no_member_of_a_consolidated_group(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path / "a", mode="w", zarr_format=3)
    root.create_group("inside")
    (tmp_path / "a/.madit").mkdir()
    (tmp_path / "a/.madit/batch.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(root.store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(zarr.open_group(tmp_path / "a", mode="r").group_keys()) == ["inside"]


def test_a_damaged_chunk_raises(tmp_path: Path) -> None:
    from zarr.codecs import ZstdCodec

    array = zarr.create_array(
        tmp_path / "a", shape=(1000,), chunks=(1000,), dtype="float32", compressors=ZstdCodec(level=1, checksum=True)
    )
    array[:] = np.random.default_rng(0).normal(size=1000)
    path = tmp_path / "a/c/0"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(RuntimeError, match=r"(?i)zstd|checksum|corrupt"):
        array[:]
