"""Site names: `blocks.{i}.{stream}.{kind}`, a place where the forward pass is read or edited."""

from __future__ import annotations

import re
from dataclasses import dataclass

from madit.axes import STREAMS
from madit.errors import SiteError

RESIDUALS = ("resid_pre", "resid_post")
UPDATES = ("update_msa", "update_msa2", "update_mlp", "update")
GATES = ("gate_msa", "gate_msa2", "gate_mlp", "gate")
MODULATION = (
    "shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp",
    "shift_msa2", "scale_msa2", "gate_msa2", "shift", "scale", "gate",
)  # fmt: skip
KINDS = (*RESIDUALS, *UPDATES, *MODULATION)
_PATTERN = re.compile(r"blocks\.(\d+)\.([a-z]+)\.([a-z0-9_]+)")


@dataclass(frozen=True, order=True)
class Site:
    """One place in the forward pass.

    Args:
        block: index of the block in forward order over all stacks.
        stream: `"img"` or `"txt"`.
        kind: `resid_pre`, `resid_post`, a residual update (`update_*`) or an AdaLN parameter (`gate_*`, ...).

    >>> str(Site(3, "img", "resid_post"))
    'blocks.3.img.resid_post'
    >>> Site.parse("blocks.3.img.resid_post").block
    3
    """

    block: int
    stream: str
    kind: str

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise SiteError(f"expected a stream of {STREAMS}, got {self.stream!r}")
        if self.kind not in KINDS:
            raise SiteError(f"expected a site kind of {', '.join(KINDS)}; got {self.kind!r}")

    def __str__(self) -> str:
        return f"blocks.{self.block}.{self.stream}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> Site:
        """Read a site's name; raises `SiteError` if it is not one."""
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise SiteError(f"expected a site like 'blocks.3.img.resid_post', got {name!r}; dit.sites() lists them")
        return cls(int(match[1]), match[2], match[3])
