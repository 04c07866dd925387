"""One zarr v3 store per run: create, append a batch, resume, open; the only module that imports zarr.

Every array has the unit of resume (a sample, or a latent level) as its leading dimension and one shard for each, so a
batch is whole shards and nothing else. After a batch's shards a marker with their keys, lengths and checksums is
written to `.madit/` inside the store's folder: outside the zarr hierarchy (a dot folder without metadata, which
consolidated readers never see), yet moved, copied and zipped with it, so a run can be resumed after a move. What has
no marker is not there.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import fsspec
import google_crc32c
import numpy as np
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import ZipStore

from madit.axes import FORMAT_VERSION
from madit.errors import DiskSpaceError, StoreError, StoreExistsError

BF16_NAN = 0x7FC0
"""What a missing value of a bf16 array coded as uint16 reads: NaN, where zarr's own default would read 0."""

MARKERS = ".madit"
_CREATING = f"{MARKERS}/creating.json"
_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Array:
    """One array of a store; `dims[0]` is the unit of resume."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fill(self) -> Any:
        """What reads where nothing was written."""
        kind = np.dtype(self.dtype).kind
        return {"f": float("nan"), "b": False}.get(kind, BF16_NAN if "torch_dtype" in self.attrs else 0)

    @property
    def nbytes(self) -> int:
        """Size before compression."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def chunks(self) -> tuple[int, ...]:
        """Inner chunks: dimensions after the first become 1, from the left, until a chunk is small enough."""
        shape = [1, *self.shape[1:]]
        for axis in range(1, len(shape) - 1):
            if np.prod(shape, dtype=np.int64) * np.dtype(self.dtype).itemsize <= _CHUNK_BYTES:
                break
            shape[axis] = 1
        return tuple(shape)

    def empty(self, n: int) -> np.ndarray:
        """An array of `n` units, nothing in it."""
        return np.full((n, *self.shape[1:]), self.fill, dtype=self.dtype)


@dataclass(frozen=True)
class Group:
    """One group of a store: arrays, and the coordinates (name -> (dims, values)) that sit beside them."""

    path: str
    arrays: Mapping[str, Array]
    coords: Mapping[str, tuple[tuple[str, ...], Any]] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)


class Files:
    """The files of a store by key, on any filesystem that fsspec knows."""

    def __init__(self, path: str | Path):
        self.fs, self.root = fsspec.core.url_to_fs(str(path))
        self.root = self.root.rstrip("/")

    def exists(self, key: str = "") -> bool:
        """Whether there is a file or folder at this key."""
        return self.fs.exists(self._at(key))

    def find(self, prefix: str = "") -> list[str]:
        """Keys below a prefix, sorted."""
        start = len(self.root) + 1
        return sorted(name[start:] for name in self.fs.find(self._at(prefix))) if self.exists(prefix) else []

    def read(self, key: str) -> bytes:
        """The bytes at a key."""
        return self.fs.cat_file(self._at(key))

    def write(self, key: str, data: bytes) -> None:
        """Write whole or not at all, where the filesystem can rename."""
        self.fs.makedirs(self._at(key).rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(self._at(key) + ".partial", data)
        self.fs.mv(self._at(key) + ".partial", self._at(key))

    def size(self, key: str) -> int:
        """Number of bytes at a key; -1 if there is nothing."""
        return self.fs.size(self._at(key)) if self.exists(key) else -1

    def remove(self, key: str = "") -> None:
        """Remove a file, a folder, or the whole store."""
        self.fs.rm(self._at(key), recursive=True)

    def _at(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root


class Writer:
    """Appends batches to a store; made by `create` or `resume`."""

    def __init__(self, path: str | Path, groups: Sequence[str]):
        self.path, self.groups, self.files = str(path), list(groups), Files(path)
        self.done = {int(Path(key).stem.removeprefix("batch-")) for key in self._markers() if self._holds(key)}

    @property
    def complete(self) -> bool:
        """Whether the run was finished."""
        return bool(zarr.open_group(self.path, mode="r").attrs.get("complete"))

    def append(self, batch: int, start: int, data: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write batch number `batch`: for each group and array, the values of the units from `start` on.

        Raises:
            StoreError: if a value's shape is not what the store was made for.
        """
        keys: list[str] = []
        # an all-zero chunk must be written too: a missing one means a missing value
        with zarr.config.set({"array.write_empty_chunks": True}):
            root = zarr.open_group(self.path, mode="r+")
            for group, arrays in data.items():
                for name, values in arrays.items():
                    array: Any = root[f"{group}/{name}"]
                    if array.shape[1:] != values.shape[1:] or start + len(values) > array.shape[0]:
                        raise StoreError(
                            f"expected {group}/{name} of shape (n, {', '.join(map(str, array.shape[1:]))}) in "
                            f"{self.path}, got {values.shape}; record other models and sizes to another store"
                        )
                    array[start : start + len(values)] = values
                    for i in range(start, start + len(values)):
                        keys += self.files.find(f"{group}/{name}/c/{i}")
        entries = {key: [len(raw := self.files.read(key)), google_crc32c.value(raw)] for key in keys}
        self.files.write(f"{MARKERS}/batch-{batch:06d}.json", json.dumps(entries).encode())
        self.done.add(batch)

    def finish(self) -> None:
        """Mark the run as finished."""
        root = zarr.open_group(self.path, mode="r+", use_consolidated=False)
        root.attrs["complete"] = True
        _consolidate(root)

    def _markers(self) -> list[str]:
        return [key for key in self.files.find(MARKERS) if key.rpartition("/")[2].startswith("batch-")]

    def _holds(self, marker: str) -> bool:
        if marker.endswith(".partial"):
            return False
        entries = json.loads(self.files.read(marker))
        return all(self.files.size(key) == length for key, (length, _) in entries.items())


def create(
    path: str | Path, groups: Sequence[Group], kind: str, settings: Mapping[str, Any], attrs: Mapping[str, Any]
) -> Writer:
    """Make a store with all metadata and coordinates and no values; `attrs` go to the root beside the settings."""
    files = Files(path)
    files.write(_CREATING, b"{}")  # until it is gone, the store is rubble of ours that may be cleared away
    root = zarr.open_group(str(path), mode="a", zarr_format=3)
    for group in groups:
        node = root.create_group(group.path, attributes={**group.attrs, "coordinates": " ".join(group.coords)})
        for name, array in group.arrays.items():
            unit, chunk = (1, *array.shape[1:]), array.chunks()
            node.create_array(
                name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=chunk,
                shards=None if chunk == unit else unit,
                fill_value=array.fill,
                compressors=ZstdCodec(level=1, checksum=True),
                attributes=dict(array.attrs),
                dimension_names=array.dims,
            )
        for name, (dims, values) in group.coords.items():
            values = np.asarray(values)
            dtype: Any = values.dtype
            if values.dtype.kind in "UO":  # fixed-width strings are not in zarr v3
                dtype, values = str, values.astype(object)
            node.create_array(name, shape=values.shape, dtype=dtype, dimension_names=dims)[...] = values
    about = {"kind": kind, "settings": json.dumps(settings), "groups": [g.path for g in groups], "complete": False}
    root.attrs.update({"format_version": FORMAT_VERSION, **about, **attrs})
    _consolidate(root)
    files.remove(_CREATING)
    return Writer(path, [g.path for g in groups])


def resume(path: str | Path, settings: Mapping[str, Any], kind: str) -> Writer | None:
    """The writer of a store made with the same settings; None where there is no store yet.

    Raises:
        StoreExistsError: if the store holds a run with other settings; names the first that differs.
        StoreError: if something else is there, or a store of a newer format, or the path is a zip file.
    """
    if str(path).endswith(".zip"):
        raise StoreError(f"expected a folder or a URL to record to, got {path}: zip the store afterwards")
    files = Files(path)
    if not files.exists() or not files.find():
        return None
    if files.exists(_CREATING):  # a run was killed while it made this store: there is no value in it
        files.remove()
        return None
    attrs = _attributes(str(path), path)
    if attrs["kind"] != kind:
        raise StoreExistsError(f"expected a {kind!r} store in {path}, got {attrs['kind']!r}; choose another path")
    there, here = json.loads(attrs["settings"]), json.loads(json.dumps(settings))
    for name in [*here, *(n for n in there if n not in here)]:
        if there.get(name) != here.get(name):
            raise StoreExistsError(
                f"expected the settings of the run in {path}, got another `{name}`: {_short(there.get(name))} there, "
                f"{_short(here.get(name))} here; choose another store or the same settings"
            )
    return Writer(path, attrs["groups"])


def open_run(path: str | Path) -> xr.DataTree:
    """Open a store lazily, with Dask: a local folder, a zip of one, or a URL (`memory://`, `s3://`).

    Values are read when computed, a shard of one sample at a time; raw bf16 activations come as float32, exactly.

    Args:
        path: where `record` or `record_factorial` wrote.

    Returns:
        A DataTree with the groups `/statistics/<stream>`, `/embedding/<stream>`, `/modulation/<stream>`, `/outputs`,
        and others if they were recorded; `tree.attrs` has the settings and the model.

    Raises:
        StoreError: if there is no store, it is not madit's, or its format is newer than this version reads.

    >>> tree = open_run("run.zarr")
    >>> tree["statistics/img"]["mean_abs"].dims
    ('sample', 'step', 'branch', 'block', 'channel')
    """
    source = _source(path)
    attrs = _attributes(source, path)
    if not attrs.get("complete"):
        warnings.warn(
            f"{path} holds an unfinished run: `recorded` says what is there; record again to resume", stacklevel=2
        )
    root = zarr.open_group(source, mode="r")
    tree = {group: _open_group(root[group], group) for group in attrs["groups"]}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **tree})


def check_space(path: str | Path, needed: int) -> None:
    """Raise `DiskSpaceError` where a local disk has less than `needed` bytes free; other stores are not asked."""
    files = Files(path)
    if "file" not in (files.fs.protocol if isinstance(files.fs.protocol, tuple) else (files.fs.protocol,)):
        return
    folder = Path(files.root)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"expected {needed} bytes free for {path} ({needed / 2**30:.2f} GiB), got {free} ({free / 2**30:.2f} GiB); "
            "record fewer sites, samples or steps, statistics instead of raw values, or to another disk"
        )


def verify(path: str | Path) -> list[str]:
    """Compare every shard of a local or remote store with its batch's marker; returns what is wrong, one line each."""
    _attributes(_source(path), path)
    files, problems = Files(path), []
    for marker in files.find(MARKERS):
        for key, (length, checksum) in json.loads(files.read(marker)).items():
            if not files.exists(key):
                problems.append(f"{key} is missing")
            elif len(raw := files.read(key)) != length or google_crc32c.value(raw) != checksum:
                problems.append(f"{key} differs from what was written")
    return problems


def _source(path: str | Path) -> Any:
    text = str(path)
    if not text.endswith(".zip"):
        return text
    if not Path(text).is_file():
        raise StoreError(f"expected a store, found none at {path}")
    if not zipfile.is_zipfile(text):
        raise StoreError(f"expected a zip of a madit store, got {path}: it is no zip file")
    return ZipStore(text, mode="r")


def _attributes(source: Any, path: str | Path) -> dict[str, Any]:
    if isinstance(source, str) and not Files(source).exists():
        raise StoreError(f"expected a store, found none at {path}; madit.record writes one")
    try:
        attrs = dict(zarr.open_group(source, mode="r").attrs)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        raise StoreError(f"expected a madit store, got {path}: there is no zarr group (zip a store's contents, "
                         "not the folder around them)") from None  # fmt: skip
    version = attrs.get("format_version")
    if not isinstance(version, int) or attrs.get("kind") not in ("run", "factorial"):
        raise StoreError(f"expected a madit store, got a zarr group of something else at {path}")
    if version > FORMAT_VERSION:
        raise StoreError(f"expected store format {FORMAT_VERSION} or older, got {version} in {path}; update madit")
    return attrs


def _open_group(group: Any, path: str) -> xr.Dataset:
    attrs, coords, data = dict(group.attrs), {}, {}
    names = attrs.pop("coordinates", "").split()
    for name, array in group.arrays():
        dims = array.metadata.dimension_names
        if name in names:
            values = np.asarray(array[...])
            coords[name] = (dims, values.astype(object) if values.dtype.kind == "T" else values)  # plain str
            continue
        # a name of its own: Dask would otherwise hash the store
        lazy = da.from_array(array, chunks=array.shards or array.chunks, name=f"{path}/{name}-{uuid.uuid4().hex}")
        if array.attrs.get("torch_dtype") == "bfloat16":
            lazy = lazy.map_blocks(decode_bf16, dtype=np.float32)
        data[name] = (dims, lazy, dict(array.attrs))
    return xr.Dataset(data, coords=coords, attrs=attrs)


def decode_bf16(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of bf16 (uint16) as float32; exact.

    >>> float(decode_bf16(np.array(0x3FC0, dtype=np.uint16)))
    1.5
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _consolidate(root: zarr.Group) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        warnings.filterwarnings("ignore", message=f"Object at {MARKERS} is not recognized")
        zarr.consolidate_metadata(root.store)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
