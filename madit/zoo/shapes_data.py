"""Captioned textured shapes: the training set of the embedded models.

A picture is one filled shape on a grey ground. Its *semantics* (shape, colour, size, position) and its
*local detail* (texture kind, orientation and period) are independent labels, so that a loss of detail can be told
from a loss of meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.20, 0.20),
    "green": (0.20, 0.80, 0.25),
    "blue": (0.25, 0.35, 0.95),
    "yellow": (0.95, 0.90, 0.25),
    "magenta": (0.90, 0.30, 0.85),
    "cyan": (0.25, 0.85, 0.90),
}
RADII = {"small": 5.5, "large": 8.5}
POSITIONS = {
    "center": (16.0, 16.0),
    "top left": (10.0, 10.0),
    "top right": (10.0, 22.0),
    "bottom left": (22.0, 10.0),
    "bottom right": (22.0, 22.0),
}


@dataclass(frozen=True)
class Texture:
    """One texture: `period` is in pixels (0: none); `phrase` is how a caption names it."""

    kind: str
    orientation: str
    period: int
    phrase: str


TEXTURES = (
    Texture("plain", "none", 0, "plain fill"),
    Texture("stripes", "horizontal", 4, "horizontal stripes"),
    Texture("stripes", "vertical", 4, "vertical stripes"),
    Texture("stripes", "diagonal", 4, "diagonal stripes"),
    Texture("checks", "none", 4, "checks"),
    Texture("dots", "none", 4, "dots"),
    Texture("stripes", "horizontal", 2, "fine horizontal stripes"),
    Texture("stripes", "vertical", 2, "fine vertical stripes"),
)

FACTORS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(RADII),
    "position": tuple(POSITIONS),
    "texture": tuple(t.phrase for t in TEXTURES),
}
SEMANTICS = ("shape", "colour", "size", "position")
DETAIL = ("texture",)

_DARK = 0.30  # brightness of the dark half of a texture, as a share of the bright half
_row, _column = np.mgrid[0:SIZE, 0:SIZE]


def _patterns() -> np.ndarray:
    """The texture masks, (texture, row, column) in {0, 1}, with a phase fixed to the image grid."""
    y, x = _row, _column
    masks = [
        np.ones_like(y),
        (y // 2) % 2,
        (x // 2) % 2,
        ((x + y) // 2) % 2,
        ((x // 2) + (y // 2)) % 2,
        1 - ((x % 4) < 2) * ((y % 4) < 2),
        y % 2,
        x % 2,
    ]
    return np.stack(masks).astype(np.float32)


_PATTERNS = _patterns()


def n_combinations() -> int:
    """How many different label combinations there are."""
    return int(np.prod([len(v) for v in FACTORS.values()]))


def sample_labels(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Draw `n` independent label rows; each value is an index into `FACTORS[name]`."""
    return {name: rng.integers(len(values), size=n) for name, values in FACTORS.items()}


def labels_from_index(index: np.ndarray) -> dict[str, np.ndarray]:
    """Labels of the combinations numbered `index` (0 <= index < n_combinations())."""
    shape = tuple(len(v) for v in FACTORS.values())
    return dict(zip(FACTORS, np.unravel_index(np.asarray(index), shape), strict=True))


def caption(shape: str, colour: str, size: str, position: str, texture: str) -> str:
    """The full caption of one label row.

    >>> caption("circle", "red", "large", "top left", "dots")
    'a large red circle with dots at the top left'
    """
    return f"a {size} {colour} {shape} with {texture} at the {position}"


def captions(labels: dict[str, np.ndarray], rng: np.random.Generator | None = None, drop: float = 0.0) -> list[str]:
    """Captions of label rows; with `rng`, size, texture and position are each left out with probability `drop`."""
    n = len(next(iter(labels.values())))
    keep = rng.random((n, 3)) >= drop if rng is not None else np.ones((n, 3), bool)
    out = []
    for i in range(n):
        word = {name: FACTORS[name][int(labels[name][i])] for name in FACTORS}
        size = f"{word['size']} " if keep[i, 0] else ""
        texture = f" with {word['texture']}" if keep[i, 1] else ""
        position = f" at the {word['position']}" if keep[i, 2] else ""
        out.append(f"a {size}{word['colour']} {word['shape']}{texture}{position}")
    return out


def _signed_distance(shape: np.ndarray, y: np.ndarray, x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Signed distance (pixels, negative inside) to each row's shape; y, x: (n, row, column), r: (n, 1, 1)."""
    box = np.maximum(np.abs(x), np.abs(y)) - 0.88 * r
    arm = np.minimum(np.maximum(np.abs(x) - r, np.abs(y) - 0.42 * r), np.maximum(np.abs(y) - r, np.abs(x) - 0.42 * r))
    slope = np.sqrt(5.0)
    triangle = np.maximum((2 * np.abs(x) - y - r) / slope, y - 0.85 * r)
    candidates = np.stack([np.hypot(x, y) - r, box, triangle, arm])
    return np.take_along_axis(candidates, shape[None, :, None, None], axis=0)[0]


def render(labels: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw label rows as pictures, (n, 3, 32, 32) float32 in [0, 1].

    `rng` draws what captions do not name: the grey of the ground, one pixel of jitter in position, half a pixel in
    size and a little in colour.
    """
    n = len(labels["shape"])
    centre = np.array(list(POSITIONS.values()))[labels["position"]] + rng.uniform(-1, 1, (n, 2))
    radius = np.array(list(RADII.values()))[labels["size"]] + rng.uniform(-0.5, 0.5, n)
    colour = np.array(list(COLOURS.values()))[labels["colour"]] + rng.uniform(-0.05, 0.05, (n, 3))
    ground = rng.uniform(0.05, 0.30, n)
    y = _row[None] - centre[:, 0, None, None]
    x = _column[None] - centre[:, 1, None, None]
    mask = np.clip(0.5 - _signed_distance(labels["shape"], y, x, radius[:, None, None]), 0, 1)
    paint = _DARK + (1 - _DARK) * _PATTERNS[labels["texture"]]
    picture = (
        mask[:, None] * (colour[:, :, None, None] * paint[:, None]) + (1 - mask[:, None]) * ground[:, None, None, None]
    )
    return np.clip(picture, 0, 1).astype(np.float32)
