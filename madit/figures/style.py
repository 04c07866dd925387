"""The one style of all figures, and how their axes are made."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE: list[str] = sns.color_palette("colorblind").as_hex()
GREY = "#6b6b6b"
RATIO = 100.0
"""The ratio above which `locate` calls a channel massive unless told otherwise; drawn as a line, never a result."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
_RATIO_LABEL = "mean |h| / median |h|"
_SIGMA_LABEL = "noise level σ (generation runs left to right)"
_RC = {
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "figure.titlesize": 12, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": "#dddddd", "legend.frameon": False, "svg.hashsalt": "madit",
    "savefig.dpi": 160,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """The one style of all figures, as a context that leaves matplotlib's settings as they were.

    >>> with style():
    ...     figure = Figure(figsize=(4, 3))
    """
    settings: Any = {**sns.axes_style("whitegrid"), **_RC}
    with mpl.rc_context(settings):
        yield


def styled(function: Callable) -> Callable:
    """Draw in `style`, whatever the settings of the moment."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with style():
            drawn = function(*args, **kwargs)
            for ax in drawn.axes if isinstance(drawn, Figure) else [drawn]:
                ax.tick_params(labelsize=9)  # ticks made at draw time would take the sizes of that moment
            return drawn

    return wrapper


def new_axes(ax: Axes | None, width: float = 6.5, height: float = 3.4) -> Axes:
    """`ax`, or where it is None the axes of a new figure of `width` x `height` inches."""
    return Figure(figsize=(width, height), layout="constrained").subplots() if ax is None else ax


def panels(n: int, columns: int, width: float, height: float, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A Figure of `n` panels of `width` x `height` inches; unused places are left empty."""
    columns = min(n, columns)
    rows = -(-n // columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()
    for ax in grid[n:]:
        ax.remove()
    return figure, list(grid[:n])


def wrap(text: str, width: int) -> str:
    """Break into at most five lines of `width` characters."""
    return "\n".join(textwrap.wrap(text, width, max_lines=5, placeholder=" …"))
