"""`GuidanceConfig`: Detail Guidance as a document, the noun between locating and guiding."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, ValidationError

from madit.axes import FORMAT_VERSION
from madit.channels import ChannelSet, ModelFingerprint, Record, check_model
from madit.errors import ConfigError, ModelMismatchError

SCHEMA = Path(__file__).parent / "schemas" / "guidance.json"
"""The published JSON Schema; `python -m madit.configs` writes it."""


class GuidanceConfig(Record):
    """Detail Guidance: which channels are disrupted where, and how strongly to steer away from the result.

    D^ = D + scale (D(c) - D_m(c))

    where D is what the pipeline predicts (with classifier-free guidance or without), D(c) the conditional prediction
    and D_m(c) that of the same network with `channels` of the state entering block m = `block` disrupted.

    Attributes:
        model: the model it was made for; another architecture is refused, other weights are warned of.
        block: m, from 1.
        channels: disrupted channels of the residual stream, ascending.
        scale: w; 0 is no guidance. There is no default: it must be tuned on the model (`madit tune`).
        factor: rho in h' = rho h, for mode "scale"; 0 sets to zero, 1 is no guidance.
        mode: "scale", or "mean" for the calibration mean.
        means: for "mean", one row per channel with one value per level of `sigma` (null where there is none).
        sigma: noise levels of `means`.
        steps: guided part of the run as fractions (start, stop) of its number of steps n: step i is guided if
            floor(start n) <= i < floor(stop n). None for all.
        tokens: disrupted image tokens, row by row over the grid; None for all.
        grid: rows and columns of the image-token grid that `tokens` were chosen on, if known.
        stream: always "img".
        evidence: where the channels come from.

    Raises:
        ValueError: (pydantic's) if a field is malformed; `load` and `from_channels` raise `ConfigError`.

    >>> channels = ChannelSet.of({3: [7]}, n_blocks=6, width=128)
    >>> GuidanceConfig.from_channels(channels, block=4, scale=2.0).channels
    (7,)

    Source: arXiv 2510.11538, the guidance formulas with and without classifier-free guidance.
    """

    format_version: int = Field(default=FORMAT_VERSION, ge=1, le=FORMAT_VERSION)
    kind: Literal["madit.guidance"] = "madit.guidance"
    model: ModelFingerprint | None = None
    block: int = Field(ge=1)
    channels: tuple[int, ...] = Field(min_length=1)
    scale: FiniteFloat
    factor: FiniteFloat = 0.0
    mode: Literal["scale", "mean"] = "scale"
    means: tuple[tuple[FiniteFloat | None, ...], ...] = ()
    sigma: tuple[FiniteFloat, ...] = ()
    steps: tuple[FiniteFloat, FiniteFloat] | None = None
    tokens: tuple[int, ...] | None = None
    grid: tuple[int, int] | None = None
    stream: Literal["img"] = "img"
    evidence: dict[str, Any] = Field(default_factory=dict)

    def model_post_init(self, _: Any) -> None:
        """Check what depends on several fields."""
        if list(self.channels) != sorted(set(self.channels)) or self.channels[0] < 0:
            raise ValueError(f"expected channels ascending from 0 without repeats, got {self.channels}")
        if self.steps is not None and not 0.0 <= self.steps[0] < self.steps[1] <= 1.0:
            raise ValueError(f"expected steps as fractions 0 <= start < stop <= 1 of the run, got {self.steps}")
        if self.tokens is not None and (
            list(self.tokens) != sorted(set(self.tokens)) or min(self.tokens, default=-1) < 0
        ):
            raise ValueError("expected at least one token, ascending from 0 without repeats; null for all")
        if self.grid is not None and (min(self.grid) < 1 or max(self.tokens or (0,)) >= self.grid[0] * self.grid[1]):
            raise ValueError(f"expected tokens inside the grid {self.grid}")
        if self.mode == "scale" and (self.means or self.sigma):
            raise ValueError('expected means and sigma with mode "mean" only')
        if self.mode == "mean":
            self._check_means()

    def _check_means(self) -> None:
        if not self.sigma or len(self.means) != len(self.channels):
            raise ValueError(f'expected a row of means for each of {len(self.channels)} channels, mode is "mean"')
        if any(len(row) != len(self.sigma) or all(v is None for v in row) for row in self.means):
            raise ValueError(f"expected {len(self.sigma)} means in each row, one per sigma, not all null")

    @classmethod
    def from_channels(
        cls,
        channels: ChannelSet,
        block: int,
        scale: float,
        factor: float = 0.0,
        mode: Literal["scale", "mean"] = "scale",
        steps: tuple[float, float] | None = None,
        tokens: Any = None,
    ) -> GuidanceConfig:
        """Make a config from the image channels massive in the state entering `block`.

        Args:
            channels: what `locate` returned, or a set by hand.
            block: block m whose entering state is disrupted; channels are those at the output of block m - 1.
            scale: w.
            factor: rho.
            mode: "scale", or "mean" for the conditional branch's calibration means that the set carries.
            steps: fractions (start, stop) of the run.
            tokens: None, a boolean mask over the token grid, or indices.

        Raises:
            ConfigError: if no channel is massive there, naming the blocks that have some, or an argument is malformed.
        """
        names = channels.entering(block)
        if not names:
            having = [b + 1 for b in channels.blocks()]
            raise ConfigError(
                f"expected image channels massive in the state entering block {block}, the set has none there; "
                f"blocks with some: {having or 'none'}"
            )
        entries = [channels.select(blocks=[block - 1], channels=[c]).entries for c in names]
        found = [next(e for e in group if e.stream == "img") for group in entries]
        if mode == "mean" and any("cond" not in e.means for e in found):
            raise ConfigError('expected calibration means of branch "cond" for mode "mean", the set carries none')
        index, grid = _tokens(tokens)
        evidence = [e.model_dump(exclude={"means"}, exclude_none=True) for e in found]
        data = {
            "model": channels.model,
            "block": block,
            "channels": names,
            "scale": scale,
            "factor": factor,
            "mode": mode,
            "means": [e.means["cond"] for e in found] if mode == "mean" else (),
            "sigma": channels.sigma if mode == "mean" else (),
            "steps": steps,
            "tokens": index,
            "grid": grid,
            "evidence": {"criterion": channels.criterion, "entries": evidence},
        }
        try:
            return cls(**data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "config"
            raise ConfigError(f"expected a valid guidance config: {where}: {first['msg']}") from None

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of the document (draft 2020-12)."""
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **cls.model_json_schema(),
            "title": "madit guidance config",
        }

    def check(self, model: ModelFingerprint) -> None:
        """Refuse another architecture (`ModelMismatchError`), warn of other weights (`ModelMismatchWarning`)."""
        check_model(self.model, model, "this config's channels")

    def check_size(self, n_blocks: int, width: int) -> None:
        """Refuse a model that lacks the block or a channel, which a config by hand may name."""
        if self.block >= n_blocks or self.channels[-1] >= width:
            raise ModelMismatchError(
                f"expected a block below {n_blocks} and channels below {width}, got block {self.block} and channel "
                f"{self.channels[-1]}; make the config on this model"
            )


def _tokens(tokens: Any) -> tuple[tuple[int, ...] | None, tuple[int, int] | None]:
    """Token indices and, of a 2-dimensional mask, the grid."""
    if tokens is None:
        return None, None
    import numpy as np

    array = np.asarray(list(tokens) if isinstance(tokens, Iterable) else tokens)
    if array.dtype == bool:
        rows_columns = (int(array.shape[0]), int(array.shape[1])) if array.ndim == 2 else None
        return tuple(int(i) for i in np.flatnonzero(array)), rows_columns
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"expected tokens as a boolean mask or a list of indices, got {array.dtype} {array.shape}")
    return tuple(sorted({int(i) for i in array})), None


def write_schema(path: Path = SCHEMA) -> Path:
    """Write the published JSON Schema; returns the path."""
    path.write_text(json.dumps(GuidanceConfig.json_schema(), indent=2) + "\n")
    return path


if __name__ == "__main__":
    write_schema()
