"""Labels for every call of the transformer: which step, noise level and branch its batch rows belong to.

A step can call the transformer several times (skip-layer guidance, true CFG, Detail Guidance) and a scheduler can
visit a noise level twice (Heun), so calls are not counted as steps: `step` counts the scheduler's own updates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from madit.arch import Family


@dataclass(frozen=True)
class Call:
    """One call of the transformer.

    Attributes:
        index: number of the call within the tracked run, from 0.
        step: index into the scheduler's timesteps.
        timestep: what the transformer received, in its own unit.
        sigma: noise level.
        rows: branch -> rows of the batch.
    """

    index: int
    step: int
    timestep: float
    sigma: float
    rows: dict[str, slice]


# A context variable and not a tracker's field, because several trackers can follow one pipeline (a recording inside a
# guided run) and all must see the label.
_FORCED: ContextVar[tuple[str, int | None] | None] = ContextVar("madit_branch", default=None)


@contextmanager
def branch(name: str, rows: int | None = None) -> Iterator[None]:
    """Label the forwards made inside as `name`, for every tracker; they do not count towards the step's own calls.

    Args:
        name: one of `axes.BRANCHES`.
        rows: their batch size, needed where they bypass the transformer's hooks.
    """
    token = _FORCED.set((name, rows))
    try:
        yield
    finally:
        _FORCED.reset(token)


class CallTracker:
    """Follows a pipeline's calls; `current` is the call under way or the last one."""

    def __init__(self, pipeline: Any, family: Family):
        self.pipeline, self.family = pipeline, family
        self.step = self.count = self.in_step = 0
        self._call: Call | None = None
        self._inner: Call | None = None  # the last call under a forced label

    def branch(self, name: str, rows: int | None = None) -> AbstractContextManager[None]:
        """As `calls.branch`."""
        return branch(name, rows)

    @property
    def forced_branch(self) -> str | None:
        """The label that calls now get whatever they look like."""
        forced = _FORCED.get()
        return None if forced is None else forced[0]

    @property
    def current(self) -> Call | None:
        """The call under way, or the last one; None before the first."""
        forced = _FORCED.get()
        if forced is None:
            return self._call
        name, rows = forced
        if rows is not None and self._call is not None:
            return replace(self._call, rows={name: slice(0, rows)})
        return self._inner

    def restart(self) -> None:
        """Forget the run so far: the next call is the first of a new run."""
        self.step = self.count = self.in_step = 0
        self._call = self._inner = None

    def label(self, args: tuple, kwargs: dict[str, Any]) -> Call:
        """Label the call whose arguments these are."""
        names = self.family.arguments
        latent = kwargs[names["latent"]] if names["latent"] in kwargs else args[0]
        timestep = kwargs.get(names["timestep"])
        received = float(torch.as_tensor(timestep).flatten()[0]) if timestep is not None else float("nan")
        step = self.step + (getattr(self.pipeline.scheduler, "begin_index", None) or 0)  # image-to-image starts later
        return Call(self.count, step, received, self._sigma(step, received), self._rows(kwargs, latent.shape[0]))

    def _sigma(self, step: int, received: float) -> float:
        sigmas = getattr(self.pipeline.scheduler, "sigmas", None)
        if sigmas is not None and step < len(sigmas):
            return float(sigmas[step])
        return received / self.family.timestep_scale / 1000.0

    def _rows(self, kwargs: dict[str, Any], n: int) -> dict[str, slice]:
        if self.forced_branch is not None:
            return {self.forced_branch: slice(0, n)}
        if kwargs.get("skip_layers") is not None:
            return {"skip": slice(0, n)}
        if self.family.cfg == "batched":
            guided = bool(getattr(self.pipeline, "do_classifier_free_guidance", False))
            return {"uncond": slice(0, n // 2), "cond": slice(n // 2, n)} if guided else {"cond": slice(0, n)}
        return {"cond" if self.in_step == 0 else "uncond": slice(0, n)}

    def _before(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = self.label(args, kwargs)
        if self.forced_branch is not None:
            self._inner = call
            return
        self._call, self._inner = call, None
        self.count += 1
        self.in_step += 1

    def _stepped(self) -> None:
        self.step += 1
        self.in_step = 0


@contextmanager
def track(pipeline: Any, family: Family) -> Iterator[CallTracker]:
    """Follow the transformer's calls while the context is open; undone on exit.

    A new run of the pipeline starts again at step 0: `set_timesteps` of the scheduler marks it.
    """
    tracker = CallTracker(pipeline, family)
    scheduler = pipeline.scheduler
    handle = pipeline.transformer.register_forward_pre_hook(tracker._before, with_kwargs=True, prepend=True)
    outer = {name: scheduler.__dict__.get(name) for name in ("step", "set_timesteps")}
    step, set_timesteps = scheduler.step, scheduler.set_timesteps

    @functools.wraps(step)  # pipelines read the signature
    def stepped(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        tracker._stepped()
        return result

    @functools.wraps(set_timesteps)
    def restarted(*args: Any, **kwargs: Any) -> Any:
        tracker.restart()
        return set_timesteps(*args, **kwargs)

    scheduler.step, scheduler.set_timesteps = stepped, restarted
    try:
        yield tracker
    finally:
        handle.remove()
        for name, value in outer.items():
            if value is None:
                delattr(scheduler, name)
            else:
                setattr(scheduler, name, value)
