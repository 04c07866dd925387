"""`ChannelSet`: massive channels with the evidence for each, the noun between locating and editing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from madit.axes import FORMAT_VERSION
from madit.errors import ConfigError, ModelMismatchError

if TYPE_CHECKING:
    import xarray as xr

MAX_JSON_BYTES = 64 * 2**20


class Record(BaseModel):
    """Base of madit's JSON documents: frozen, no unknown fields, non-finite numbers as null."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    def save(self, path: str | Path) -> Path:
        """Write as JSON; returns the path."""
        path = Path(path)
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path):
        """Read what `save` wrote; raises `ConfigError` with one line on anything else."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"expected a {cls.__name__} file, found none at {path}")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"expected a {cls.__name__} of at most {MAX_JSON_BYTES} bytes, {path} is larger")
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"expected a {cls.__name__} as JSON in {path}: {error}") from None
        return cls.parse(data, source=str(path))

    @classmethod
    def parse(cls, data: Any, source: str = "the data"):
        """Validate a decoded JSON document; raises `ConfigError` with one line."""
        if not isinstance(data, dict):
            raise ConfigError(f"expected a JSON object for a {cls.__name__} in {source}, got {type(data).__name__}")
        version = data.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ConfigError(
                f"expected format version {FORMAT_VERSION} or older in {source}, got {version}; update madit"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]).encode("unicode_escape").decode() or cls.__name__
            raise ConfigError(f"expected a valid {cls.__name__} in {source}: {where}: {first['msg']}") from None

    def replace(self, **changes: Any):
        """A copy with other values, validated again."""
        return type(self).model_validate({**self.model_dump(), **changes})


class ModelFingerprint(Record):
    """Which model a result belongs to: `config_hash` pins the architecture, `weights_hash` the weights."""

    name: str = ""
    revision: str = ""
    transformer: str
    config_hash: str
    weights_hash: str = ""


class ChannelEntry(Record):
    """One massive channel at one block's output, and how sure that is.

    `ratio`, `coverage`, `constancy` and `magnitude` are medians over the massive (sample, step) cells: mean |h| over
    median |h|, share of tokens above the cut, |mean| / standard deviation over tokens, and mean |h|. `persistence`
    is the share of samples that pass, averaged over the massive steps; `_low` / `_high` are bootstrap bounds over
    samples. `means` maps a branch to the mean of h at each step of the set's `sigma`.
    """

    block: int = Field(ge=0)
    stream: Literal["img", "txt"] = "img"
    channel: int = Field(ge=0)
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    coverage: float | None = None
    constancy: float | None = None
    persistence: float | None = None
    persistence_low: float | None = None
    persistence_high: float | None = None
    sign: Literal[-1, 0, 1] = 0
    magnitude: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    means: dict[str, tuple[float | None, ...]] = Field(default_factory=dict)


class ChannelSet(Record):
    """Massive channels of one model.

    `entries` has one row for each (block, stream, channel); `block` is the block whose output is massive, so an edit
    of the state entering block m uses the entries of block m - 1.

    >>> channels = ChannelSet.of({1: [7, 9]}, n_blocks=6, width=128)
    >>> channels.at(1)
    (7, 9)
    >>> channels.entering(2)
    (7, 9)
    """

    format_version: int = FORMAT_VERSION
    kind: Literal["madit.channels"] = "madit.channels"
    model: ModelFingerprint | None = None
    n_blocks: int = Field(ge=1)
    width: int = Field(ge=1)
    sigma: tuple[float, ...] = ()
    entries: tuple[ChannelEntry, ...] = ()
    criterion: dict[str, Any] = Field(default_factory=dict)
    evidence: dict[str, Any] = Field(default_factory=dict)

    def model_post_init(self, _: Any) -> None:
        """Check the entries against the model's size; raises `ConfigError`."""
        for e in self.entries:
            if e.block >= self.n_blocks or e.channel >= self.width:
                raise ConfigError(
                    f"expected blocks below {self.n_blocks} and channels below {self.width}, "
                    f"got block {e.block}, channel {e.channel}"
                )
            if any(len(m) != len(self.sigma) for m in e.means.values()):
                raise ConfigError(f"expected {len(self.sigma)} means for each branch of block {e.block}")

    @classmethod
    def of(cls, channels: Mapping[int, Iterable[int]], n_blocks: int, width: int, stream: str = "img") -> ChannelSet:
        """A set written by hand: block whose output is massive -> channels; no evidence."""
        entries = [
            ChannelEntry(block=b, stream=stream, channel=c)  # type: ignore[arg-type]
            for b in sorted(channels)
            for c in sorted(set(channels[b]))
        ]
        return cls(n_blocks=n_blocks, width=width, entries=tuple(entries))

    def __len__(self) -> int:
        return len(self.entries)

    def at(self, block: int, stream: str = "img") -> tuple[int, ...]:
        """Channels massive at the output of `block`, ascending."""
        return tuple(sorted(e.channel for e in self.entries if e.block == block and e.stream == stream))

    def entering(self, block: int, stream: str = "img") -> tuple[int, ...]:
        """Channels massive in the state entering `block`, that is at the output of the block before."""
        return self.at(block - 1, stream)

    def blocks(self, stream: str = "img") -> tuple[int, ...]:
        """Blocks at whose output some channel is massive, ascending."""
        return tuple(sorted({e.block for e in self.entries if e.stream == stream}))

    def select(self, blocks: Iterable[int] | None = None, channels: Iterable[int] | None = None) -> ChannelSet:
        """The entries of these blocks and channels only."""
        keep_blocks = None if blocks is None else set(blocks)
        keep_channels = None if channels is None else set(channels)
        entries = tuple(
            e
            for e in self.entries
            if (keep_blocks is None or e.block in keep_blocks) and (keep_channels is None or e.channel in keep_channels)
        )
        return self.model_copy(update={"entries": entries})

    def check(self, model: ModelFingerprint) -> None:
        """Refuse another architecture (`ModelMismatchError`), warn of other weights (`ModelMismatchWarning`)."""
        check_model(self.model, model, "these channels")

    def to_dataset(self) -> xr.Dataset:
        """All evidence as an xarray Dataset with one dimension `entry`; intervals as `_low` / `_high`.

        Coordinates `block`, `stream`, `channel` on `entry`. The means are left out: they are in `entries`.
        """
        import numpy as np
        import xarray as xr

        names = ("block", "stream", "channel")
        values = {k: [getattr(e, k) for e in self.entries] for k in ChannelEntry.model_fields if k != "means"}
        dtype = {"block": np.int64, "channel": np.int64, "sign": np.int64, "stream": object}
        data = {k: ("entry", np.array(v, dtype=dtype.get(k, np.float64))) for k, v in values.items()}
        return xr.Dataset(
            {k: v for k, v in data.items() if k not in names},
            coords={k: data[k] for k in names},
            attrs={"criterion": json.dumps(self.criterion), "evidence": json.dumps(self.evidence)},
        )


def check_model(made_for: ModelFingerprint | None, model: ModelFingerprint, what: str) -> None:
    """Refuse `what` on another architecture; warn where only the weights differ."""
    import warnings

    from madit.errors import ModelMismatchWarning

    if made_for is None:
        return
    if made_for.config_hash != model.config_hash:
        raise ModelMismatchError(
            f"expected {made_for.name or 'a model'} ({made_for.transformer}, config {made_for.config_hash[:12]}), got "
            f"{model.name or 'a model'} ({model.transformer}, config {model.config_hash[:12]}): {what} belong to "
            "another architecture; locate the channels on this model"
        )
    if made_for.weights_hash and model.weights_hash and made_for.weights_hash != model.weights_hash:
        warnings.warn(
            f"{what} were made on other weights ({made_for.name or 'unnamed'}); locate them again to be sure",
            ModelMismatchWarning,
            stacklevel=3,
        )
