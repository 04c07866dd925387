"""One edit of the residual stream as a value: which channels become what, at which rows and tokens.

`intervene` and `guide` both edit states through this, so that their edits are the same arithmetic.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from madit.channels import ChannelSet
from madit.errors import ConfigError, SiteError

MODES = ("scale", "mean", "add")
Mode = Literal["scale", "mean", "add"]


@dataclass(frozen=True)
class Means:
    """Calibration means of some channels against the noise level, per branch.

    Attributes:
        sigma: noise levels, ascending; shape (level,).
        values: branch -> means, shape (level, channel), NaN where a level has none.
    """

    sigma: np.ndarray
    values: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, channels: ChannelSet, block: int, stream: str) -> Means:
        """Means of the channels massive in the state entering `block`.

        Raises:
            ConfigError: if the set carries no means there (a set written by hand, or random controls).
        """
        names = channels.entering(block, stream)
        entries = {e.channel: e for e in channels.entries if e.block == block - 1 and e.stream == stream}
        branches = set.intersection(*(set(entries[c].means) for c in names)) if names else set()
        if not branches or not channels.sigma:
            raise ConfigError(
                f'expected calibration means for mode="mean" in the channels entering block {block}, found none; '
                "use the set that locate returned, they are in its entries"
            )
        order = np.argsort(channels.sigma)
        columns = {b: np.array([entries[c].means[b] for c in names], dtype=np.float64).T for b in branches}
        return cls(np.asarray(channels.sigma)[order], {b: v[order] for b, v in columns.items()})

    def at(self, sigma: float, branch: str) -> Float[np.ndarray, " channel"]:
        """Means at one noise level, linear in sigma between the calibrated levels and constant beyond them."""
        if branch not in self.values:
            raise ConfigError(
                f"expected calibration means of branch {branch!r}, got those of {sorted(self.values)}; "
                f"record that branch, or edit with branch={sorted(self.values)[0]!r}"
            )
        table = self.values[branch]
        known = [~np.isnan(column) for column in table.T]
        if not all(k.any() for k in known):
            raise ConfigError(f"expected a calibration mean for every channel of branch {branch!r}, some have none")
        return np.array([np.interp(sigma, self.sigma[k], column[k]) for k, column in zip(known, table.T, strict=True)])


@dataclass(frozen=True)
class Edit:
    """What happens to the state entering one block.

    h'[n, c] = factor h[n, c]                    (`scale`)
    h'[n, c] = mean(c; sigma, branch)            (`mean`)
    h'[n, c] = h[n, c] + r u[c]                  (`add`), r^2 = mean_n sum_k ((1 - factor) h[n, k])^2

    where k runs over `matched`, the channels whose removed norm is matched, and u is a unit vector.

    Attributes:
        channels: channels of the residual stream, shape (channel,).
        tokens: token indices, or a boolean mask over the token grid; None for all.
        direction: u, for `add`; shape (channel,).
    """

    channels: tuple[int, ...]
    mode: Mode = "scale"
    factor: float = 0.0
    means: Means | None = None
    matched: tuple[int, ...] = ()
    direction: tuple[float, ...] = ()
    tokens: Tensor | None = field(default=None, compare=False)

    def __call__(
        self, h: Float[Tensor, "batch token width"], rows: Mapping[str, slice], sigma: float
    ) -> Float[Tensor, "batch token width"]:
        """The edited state; `h` itself is left as it is.

        Args:
            h: residual stream.
            rows: branch -> the rows of the batch to edit.
            sigma: noise level of the call.
        """
        out = h.clone()
        index = torch.tensor(self.channels, device=h.device)
        tokens = token_index(self.tokens, h.shape[1]).to(h.device)[:, None]
        for branch, where in rows.items():
            out[where][:, tokens, index] = self._new(h[where], h[where][:, tokens, index], branch, sigma)
        return out

    def _new(self, h: Tensor, old: Tensor, branch: str, sigma: float) -> Tensor:
        if self.mode == "scale":
            # Not 0 * h: an infinite activation would become NaN.
            return torch.zeros_like(old) if self.factor == 0 else old * self.factor
        if self.mode == "mean":
            assert self.means is not None
            return torch.as_tensor(self.means.at(sigma, branch)).to(old)
        removed = (1 - self.factor) * h[..., list(self.matched)].float()
        norm = removed.square().sum(-1).mean(-1).sqrt()[:, None, None]
        return old + (norm * torch.tensor(self.direction, device=h.device)).to(old.dtype)


def token_index(tokens: Tensor | None, n: int) -> Int[Tensor, " token"]:
    """Indices of the tokens to edit among `n`; raises `SiteError` where they do not fit."""
    if tokens is None:
        return torch.arange(n)
    if tokens.dtype == torch.bool:
        if tokens.numel() != n:
            raise SiteError(
                f"expected a token mask with one value for each of {n} tokens, got shape {tuple(tokens.shape)}"
            )
        return tokens.flatten().nonzero().flatten()
    if int(tokens.max()) >= n:
        raise SiteError(f"expected token indices below {n}, got {int(tokens.max())}")
    return tokens


def as_tokens(tokens: Any) -> Tensor | None:
    """Check a token argument; None for all, else a boolean mask or indices, row by row over the image grid."""
    if tokens is None:
        return None
    tensor = torch.as_tensor(np.asarray(tokens)).cpu()
    if tensor.dtype == torch.bool:
        if not bool(tensor.any()):
            raise ConfigError("expected a token mask with at least one token, got none set")
        return tensor
    if tensor.is_floating_point() or tensor.is_complex() or tensor.ndim != 1 or tensor.numel() == 0:
        raise ConfigError(
            f"expected tokens as a boolean mask over the grid or as a list of indices, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    if int(tensor.min()) < 0:
        raise ConfigError(f"expected token indices from 0, got {int(tensor.min())}")
    return tensor.unique()


def as_channels(channels: Any, blocks: Iterable[int], n_blocks: int, width: int, stream: str) -> ChannelSet:
    """A `ChannelSet` as it is; a mapping through `ChannelSet.of`; a list as the channels of every edited block."""
    if isinstance(channels, ChannelSet):
        return channels
    if not isinstance(channels, Mapping):
        channels = [int(c) for c in channels]
        channels = {block - 1: channels for block in blocks}
    return ChannelSet.of(channels, n_blocks=n_blocks, width=width, stream=stream)


class Argument:
    """One argument of a module's forward, read and replaced in a pre-hook's (args, kwargs)."""

    def __init__(self, module: Any, name: str):
        self.name = name
        self.place = list(inspect.signature(type(module).forward).parameters).index(name) - 1  # less self

    def get(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The value that the call passes."""
        return kwargs[self.name] if self.name in kwargs else args[self.place]

    def put(self, value: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The call with another value."""
        if self.name in kwargs:
            return args, {**kwargs, self.name: value}
        return (*args[: self.place], value, *args[self.place + 1 :]), kwargs
