"""How the command speaks: one line on bad input, warnings as one line, tables; and what the options' texts mean."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from madit.errors import ConfigError, MaditError
from madit.prompts import PromptSet, load_prompts

if TYPE_CHECKING:
    from madit.dit import DiT

BAD_INPUT = 2
"""Exit code of anything that the user can mend."""

_UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer brings or depends on, by its release


class Verbs(TyperGroup):
    """A group of commands that answers bad input with one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; `MADIT_DEBUG=1` shows the traceback instead of the line."""
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            try:
                return super().invoke(ctx)
            except (MaditError, OSError) as error:
                if os.environ.get("MADIT_DEBUG"):
                    raise
                fail(str(error))
            except _UsageError as error:
                where = error.ctx.command_path if getattr(error, "ctx", None) else "madit"
                fail(f"{error.format_message()} `{where} --help` has an example.")


def fail(message: str) -> None:
    """Say what is wrong in one line and stop with exit code 2."""
    typer.echo(f"madit: {one_line(message)}", err=True)
    raise typer.Exit(BAD_INPUT)


def one_line(message: str) -> str:
    """A message with its line breaks and runs of blanks made single blanks."""
    return " ".join(str(message).split())


def _warn(message: Warning | str, category: type[Warning], *where: Any, **kwargs: Any) -> None:
    if issubclass(category, UserWarning):  # others speak to developers
        typer.echo(f"madit: warning: {one_line(str(message))}", err=True)


def load(model: str, device: str | None = None, dtype: str | None = None) -> DiT:
    """Load a model for a command: an embedded name, a diffusers folder or a hub id.

    Args:
        model: as for `DiT.from_pretrained`.
        device: torch device; None: CUDA where there is one.
        dtype: name of a torch dtype; None: as stored.

    Raises:
        ConfigError: where there is no such model, or no such dtype.
        UnknownFamilyError: for a model without an adapter.
    """
    import torch

    from madit import zoo
    from madit.dit import DiT

    kwargs: dict[str, Any] = {}
    if dtype is not None:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"expected a torch dtype such as float32 or bfloat16, got {dtype!r}")
        kwargs["torch_dtype"] = getattr(torch, dtype)
    quiet_libraries()
    try:
        dit = DiT.from_pretrained(model, **kwargs)
    except MaditError:
        raise
    except (OSError, ValueError) as error:  # what diffusers and the hub raise where there is no such model
        reason = one_line(str(error)).split(". ")[0]
        raise ConfigError(
            f"expected an embedded model ({', '.join(zoo.names())}), a diffusers folder or a hub id that can be "
            f"loaded, got {model!r}: {reason}"
        ) from error
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        dit.pipeline.to(place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"expected a torch device of this machine, got {place!r}: {error}") from error
    return dit


def quiet_libraries() -> None:
    """Without the progress bars and the advice of diffusers and transformers: a command has its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def prompts_of(prompts: Iterable[str]) -> PromptSet:
    """The prompts of all files and texts given, in order.

    Raises:
        PromptError: if a file is missing, empty or malformed, or a text is empty.
    """
    sets = [load_prompts(given) for given in prompts]
    return sets[0] if len(sets) == 1 else PromptSet(tuple(prompt for one in sets for prompt in one))


def integers(text: str | None, option: str) -> list[int] | None:
    """Whole numbers from `0,2,5` or `0-3` (both ends included), or None for no text.

    >>> integers("0,4-6", "--blocks")
    [0, 4, 5, 6]
    """
    if text is None:
        return None
    result: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            result += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise ConfigError(f"expected whole numbers for {option}, like 0,2,5 or 0-3; got {text!r}") from None
    return result


def fractions(text: str | None, option: str) -> tuple[float, float] | None:
    """Two numbers from `0,0.6`, or None for no text.

    >>> fractions("0,0.6", "--steps")
    (0.0, 0.6)
    """
    if text is None:
        return None
    try:
        start, stop = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"expected two fractions for {option}, like 0,0.6; got {text!r}") from None
    return start, stop


def mapping(text: str | None, option: str) -> dict[str, Any]:
    """A JSON object given as an option; empty for no text."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"expected a JSON object for {option}, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"expected a JSON object for {option}, got {text!r}")
    return value


def ready(path: Path) -> Path:
    """A path whose folder exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table; numbers in short form, NaN and None as a dash."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(_cell(value) for value in row))
    Console().print(grid)


def interval(low: float | None, high: float | None) -> str:
    """An interval in one cell.

    >>> interval(160.6, 167.9)
    '161-168'
    """
    return "-" if low is None or high is None else f"{low:.3g}-{high:.3g}"


def _cell(value: Any) -> str:
    if value is None or value != value:  # NaN
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_metrics(metrics: Any) -> None:
    """Print what `evaluate` or `compare` returned, a row for each condition and metric."""
    from madit.evaluation import METRICS

    conditions = [str(c) for c in metrics.condition.values] if "condition" in metrics.dims else [""]
    rows = []
    for condition in conditions:
        of = metrics.sel(condition=condition) if condition else metrics
        rows += [
            (condition, METRICS[name][0], float(of[name]), float(of[f"{name}_low"]), float(of[f"{name}_high"]))
            for name in METRICS
            if name in of and of[name].ndim == 0
        ]
    table("metrics", ("", "metric", "mean", "low", "high"), rows)
