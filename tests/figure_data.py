"""Small made-up runs, effects and pictures with known values, for the tests of figures and report."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr

from madit.axes import FACTORS, QUANTILE_LEVELS
from madit.channels import ChannelEntry, ChannelSet, ModelFingerprint

SIGMA = (1.0, 0.75, 0.5, 0.25)
BLOCKS, WIDTH, SAMPLES, SIDE = 3, 16, 4, 4
MASSIVE = 5
MODEL = ModelFingerprint(name="shapes-detail", transformer="SD3Transformer2DModel", config_hash="ab" * 32)


def magnitude(block: int, step: int, channel: int) -> float:
    """Constant |h| over tokens and samples: 1, and in the massive channel from block 1 on 200 (1 + step) block."""
    return 200.0 * (1 + step) * block if channel == MASSIVE and block > 0 else 1.0


def run(raw: bool = True, images: bool = True) -> xr.DataTree:
    """A run store's tree: `mean_abs` is `magnitude`, `median_abs` 1, the last sample's last step not recorded."""
    size = np.array([[[magnitude(b, t, c) for c in range(WIDTH)] for b in range(BLOCKS)] for t in range(len(SIGMA))])
    stat = np.broadcast_to(size[None, :, None], (SAMPLES, len(SIGMA), 1, BLOCKS, WIDTH)).astype(np.float32).copy()
    recorded = np.ones((SAMPLES, len(SIGMA), 1), bool)
    recorded[-1, -1] = False
    stat[-1, -1] = 0
    dims = ("sample", "step", "branch", "block")
    coords = {
        "sample": np.arange(SAMPLES),
        "prompt": ("sample", np.array([f"a <b>picture</b> {i}" for i in range(SAMPLES)], dtype=object)),
        "seed": ("sample", np.zeros(SAMPLES, int)),
        "step": np.arange(len(SIGMA)),
        "sigma": ("step", np.array(SIGMA)),
        "timestep": ("step", 1000 * np.array(SIGMA)),
        "branch": np.array(["cond"], dtype=object),
        "block": np.arange(BLOCKS),
        "channel": np.arange(WIDTH),
    }
    levels = np.array(QUANTILE_LEVELS)
    statistics = xr.Dataset(
        {
            "mean": ((*dims, "channel"), stat),
            "mean_abs": ((*dims, "channel"), stat),
            "mean_square": ((*dims, "channel"), stat**2),
            "max_abs": ((*dims, "channel"), stat),
            "abs_quantile": ((*dims, "quantile", "channel"), np.repeat(stat[..., None, :], len(levels), axis=-2)),
            "median_abs": (dims, np.where(recorded[..., None], 1, 0).repeat(BLOCKS, axis=-1).astype(np.float32)),
            "recorded": (dims[:3], recorded),
        },
        coords | {"quantile": levels},
    )
    tree = {"/statistics/img": statistics}
    if raw:
        tokens = SIDE * SIDE
        h = np.repeat(stat[..., None, :], tokens, axis=-2)
        h[..., 2] = np.arange(tokens) - 7.5
        place = {"row": ("token", np.arange(tokens) // SIDE), "column": ("token", np.arange(tokens) % SIDE)}
        tree["/activations/img"] = xr.Dataset({"activation": ((*dims, "token", "channel"), h)}, coords | place)
    if images:
        pictures = xr.DataArray(picture(SAMPLES), dims=("sample", "pixel_row", "pixel_column", "rgb"))
        tree["/outputs"] = xr.Dataset({"image": pictures}, {k: coords[k] for k in ("sample", "prompt", "seed")})
    result = xr.DataTree.from_dict(tree)
    result.attrs = {"format_version": 1, "kind": "run", "model": MODEL.model_dump_json(), "settings": json.dumps({})}
    return result


def channel_set() -> ChannelSet:
    """The massive channel at blocks 1 and 2."""
    entries = [
        ChannelEntry(
            block=b, channel=MASSIVE, ratio=500.0 * b, ratio_low=450.0 * b, ratio_high=550.0 * b, coverage=1,
            persistence=1, constancy=40, sign=1, magnitude=500.0 * b, sigma_min=0.25, sigma_max=1.0,
        )
        for b in (1, 2)
    ]  # fmt: skip
    criterion = {"ratio": 100.0, "coverage": 0.95, "persistence": 0.9, "step_share": 0.5}
    return ChannelSet(model=MODEL, n_blocks=BLOCKS, width=WIDTH, entries=tuple(entries), criterion=criterion)


def effects() -> xr.Dataset:
    """Indices of the massive channel at blocks 1 and 2; block 2 is flagged constant."""
    factors = list(FACTORS[:4])
    first = np.full((2, 1, 4), np.nan)
    first[0, 0] = [0.05, 0.7, 0.15, 0.0]
    data = {"first_order": first, "total": first + 0.05}
    data |= {f"{k}_low": v - 0.04 for k, v in data.items()} | {f"{k}_high": v + 0.08 for k, v in data.items()}
    dims = ("block", "channel", "factor")
    coords = {"block": [1, 2], "channel": [MASSIVE], "factor": np.array(factors, dtype=object)}
    result = xr.Dataset({k: (dims, v) for k, v in data.items()}, coords, {"design": "matched"})
    return result.assign(constant=(dims[:2], np.array([[False], [True]])))


def picture(n: int, contrast: float = 0.3, seed: int = 0) -> np.ndarray:
    """Striped squares on grey, (n, 32, 32, 3) uint8."""
    rng = np.random.default_rng(seed)
    images = np.full((n, 32, 32, 3), 0.2)
    stripes = 1 + contrast * np.where((np.arange(32) // 2) % 2, 1, -1)[None, :, None]
    for image in images:
        r, c = rng.integers(2, 14, 2)
        image[r : r + 14, c : c + 14] = rng.uniform(0.3, 0.7, 3) * stripes[:, r : r + 14]
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
