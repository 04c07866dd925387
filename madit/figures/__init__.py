"""Figures of what madit records and computes: xarray in, a matplotlib Axes (or a Figure of several) out.

Colours are seaborn's colour-blind-safe palette, and lines differ by dash or marker too, so that a grey print still
reads. Figures are made without pyplot, so drawing changes no global state and needs no display.

    magnitude_heatmap        largest channel over the ordinary ones, block by noise level
    channel_profile          every channel of each block, the massive ones named
    token_map, token_maps    one channel on the image grid
    magnitude_against_sigma  one channel along generation, a line for each prompt
    attribution_bars, attribution_grid   first-order and total Sobol indices
    image_grid               pictures, conditions by samples
    radial_spectra           power by spatial frequency
    dose_curve               a metric against the guidance scale
    forest                   metrics of each condition, controls hollow
    style                    the context that all of them draw in
"""

from __future__ import annotations

from madit.figures.activations import (
    channel_profile,
    magnitude_against_sigma,
    magnitude_heatmap,
    token_map,
    token_maps,
)
from madit.figures.results import (
    attribution_bars,
    attribution_grid,
    dose_curve,
    explained,
    forest,
    image_grid,
    pick,
    radial_spectra,
)
from madit.figures.style import PALETTE, RATIO, style

__all__ = [
    "PALETTE",
    "RATIO",
    "attribution_bars",
    "attribution_grid",
    "channel_profile",
    "dose_curve",
    "explained",
    "forest",
    "image_grid",
    "magnitude_against_sigma",
    "magnitude_heatmap",
    "pick",
    "radial_spectra",
    "style",
    "token_map",
    "token_maps",
]
