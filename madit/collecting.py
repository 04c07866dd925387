"""Takes the values of a batch's sites as the run visits them and lays them out as the arrays of a store."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from madit.axes import BLOCK, BRANCH, BRANCHES, KIND, STEP
from madit.calls import Call
from madit.errors import ActivationWarning, UnsupportedPipelineError
from madit.layouts import Facts, family_of
from madit.sites import Site
from madit.statistics import reduce_tokens, suspicious
from madit.store import Group


class Collector:
    """The sink of one batch.

    Args:
        n: samples in the batch.
        values: `"statistics"`, `"raw"` or `"both"`, for block outputs.
    """

    def __init__(self, n: int, values: str):
        self.n, self.values = n, values
        self.steps: dict[int, tuple[float, float]] = {}
        self.cells: dict[tuple[str, str], dict[tuple[int, str, int, str], np.ndarray]] = {}
        self.seen: dict[tuple[int, str, Site], int] = {}
        self.flags: list[tuple[int, str, Site]] = []
        self.dtype = ""

    def __call__(self, call: Call, site: Site, value: Tensor) -> None:
        """Reduce or copy one value, for each branch of the call."""
        self.steps[call.step] = (call.timestep, call.sigma)
        for branch, rows in call.rows.items():
            if self.seen.setdefault((call.step, branch, site), call.index) != call.index:
                raise UnsupportedPipelineError(
                    f"expected one call for each step and branch, got two at step {call.step}, branch {branch!r}: "
                    "this pipeline's calls cannot be told apart"
                )
            self._take(call.step, branch, site, value[rows])

    def _take(self, step: int, branch: str, site: Site, value: Tensor) -> None:
        group, cell = family_of(site), (step, branch, site.block, site.kind)
        if group == "modulation":
            self._keep(f"{group}/{site.stream}", site.kind, cell, value)
            return
        flagged = suspicious(value)
        if flagged.any():
            self.flags.append((step, branch, site))
        reduced = group != "statistics" or self.values in ("statistics", "both")
        if reduced:
            for name, statistic in reduce_tokens(value).items():
                self._keep(f"{group}/{site.stream}", name, cell, statistic)
            self._keep(f"{group}/{site.stream}", "flagged", cell, flagged)
        if group == "statistics":
            self.dtype = str(value.dtype).removeprefix("torch.")
            if self.values in ("raw", "both"):
                self._keep(f"activations/{site.stream}", "activation", cell, value)
                self._keep(f"activations/{site.stream}", "flagged", cell, flagged)

    def _keep(self, group: str, name: str, cell: tuple[int, str, int, str], value: Tensor) -> None:
        value = value.detach()
        if name == "activation" and value.dtype == torch.bfloat16:
            array = value.contiguous().view(torch.uint16).cpu().numpy().copy()
        elif value.dtype == torch.bool:
            array = value.cpu().numpy()
        else:
            array = value.float().cpu().numpy().copy()  # the model may write over the tensor
        self.cells.setdefault((group, name), {})[cell] = array

    def facts(self, expected: Facts, outputs: Mapping[str, np.ndarray]) -> Facts:
        """What was expected of the run, corrected by what it did."""
        timesteps, sigmas = list(expected.timesteps), list(expected.sigmas)
        for step, (timestep, sigma) in self.steps.items():
            timesteps[step], sigmas[step] = timestep, sigma
        present = {branch for _, branch, _ in self.seen}
        return dataclasses.replace(
            expected,
            timesteps=tuple(timesteps),
            sigmas=tuple(sigmas),
            branches=tuple(b for b in BRANCHES if b in present),
            image=outputs["image"].shape[1:3],
            latent=outputs["latent"].shape[1:],
            dtype=self.dtype or expected.dtype,
        )

    def assemble(self, groups: Sequence[Group]) -> dict[str, dict[str, np.ndarray]]:
        """The batch's values as the arrays of these groups; nothing where a site was not visited."""
        return {g.path: self._assemble(g) for g in groups if g.path != "outputs"}

    def _assemble(self, group: Group) -> dict[str, np.ndarray]:
        place = {
            dim: {label: i for i, label in enumerate(_labels(group.coords[dim][1]))}
            for dim in (STEP, BRANCH, BLOCK, KIND)
            if dim in group.coords
        }
        arrays = {name: array.empty(self.n) for name, array in group.arrays.items()}
        for name, array in arrays.items():
            if name == "token_valid":
                array[:] = True  # pipelines pad text to one length and the model reads the padding
            for cell, value in self.cells.pop((group.path, name), {}).items():
                labels = zip((STEP, BRANCH, BLOCK, KIND), cell, strict=True)
                at = tuple(place[dim][label] for dim, label in labels if dim in place)
                array[(slice(None), *at)] = value
                arrays["recorded"][:, at[0], at[1]] = True
        return arrays

    def warn(self) -> None:
        """Say if some value was not finite or was clipped."""
        if self.flags:
            step, branch, site = self.flags[0]
            warnings.warn(
                f"{len(self.flags)} states hold values that are not finite or are clipped in float16, the first at "
                f"{site}, step {step}, branch {branch}; they are marked in `flagged`; run in bfloat16 or float32",
                ActivationWarning,
                stacklevel=4,
            )


def _labels(values: Iterable) -> list:
    return [v.item() if isinstance(v, np.generic) else v for v in values]
