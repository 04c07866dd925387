"""Synthetic runs with the store's schema, with statistics by a second, plain implementation: sort, index, average.

Nothing here uses madit's own reductions: tests compare against it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from madit.axes import FORMAT_VERSION, QUANTILE_LEVELS

RUN = ("sample", "step", "branch")
PER_CHANNEL = ("mean", "mean_abs", "mean_square", "max_abs")
MODEL = {"name": "synthetic", "transformer": "SyntheticTransformer", "config_hash": "c" * 64, "weights_hash": "w" * 64}


def describe(h: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of one cell, h (token, channel)."""
    size = np.sort(np.abs(h.astype(np.float64)), axis=0)
    flat = np.sort(size.reshape(-1))
    n = len(size)
    return {
        "mean": h.astype(np.float64).sum(axis=0) / n,
        "mean_abs": size.sum(axis=0) / n,
        "mean_square": (size * size).sum(axis=0) / n,
        "max_abs": size[-1],
        "abs_quantile": np.stack([size[int(p * n + 1e-9)] for p in QUANTILE_LEVELS]),
        "median_abs": flat[len(flat) // 2],
    }


def statistics(h: np.ndarray, dims: tuple[str, ...], valid: np.ndarray | None = None) -> xr.Dataset:
    """Statistics of h (*dims, token, channel) as the store keeps them; `valid` is (sample, token)."""
    cells = list(np.ndindex(h.shape[:-2]))
    described = [describe(h[i] if valid is None else h[i][valid[i[0]]]) for i in cells]
    lead = h.shape[:-2]
    data = {}
    for name in described[0]:
        values = np.stack([d[name] for d in described]).astype(np.float32)
        extra = {"abs_quantile": ("quantile", "channel"), "median_abs": ()}.get(name, ("channel",))
        data[name] = ((*dims, *extra), values.reshape(lead + values.shape[1:]))
    coords = {"channel": np.arange(h.shape[-1]), "quantile": list(QUANTILE_LEVELS)}
    return xr.Dataset(data, coords=coords)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Ordinary activations: normal, of median magnitude about 0.67."""
    return rng.normal(size=shape).astype(np.float32)


def run_tree(
    img: np.ndarray,
    txt: np.ndarray | None = None,
    *,
    txt_valid: np.ndarray | None = None,
    values: str = "both",
    branches: tuple[str, ...] = ("cond",),
    sigma: np.ndarray | None = None,
    embedding: np.ndarray | None = None,
    updates: Mapping[str, np.ndarray] | None = None,
    gates: Mapping[str, np.ndarray] | None = None,
    recorded: np.ndarray | None = None,
) -> xr.DataTree:
    """A run from raw activations.

    Args:
        img, txt: h after each block, (sample, step, branch, block, token, channel).
        txt_valid: (sample, token).
        values: "statistics", "raw" or "both".
        branches: names on the branch axis.
        sigma: (step,); from 1 downwards by default.
        embedding: state entering block 0, as `img` without the block axis.
        updates: kind -> what it added to the residual stream, as `img`; NaN where a block lacks the kind.
        gates: kind -> AdaLN gate (sample, step, branch, block, channel).
        recorded: (sample, step, branch).
    """
    shape = img.shape[:3]
    recorded = np.ones(shape, bool) if recorded is None else recorded
    sigma = np.linspace(1.0, 0.1, shape[1]) if sigma is None else np.asarray(sigma)
    axes = {
        "sample": np.arange(shape[0]),
        "prompt": ("sample", np.array([f"prompt {i}" for i in range(shape[0])], object)),
        "seed": ("sample", np.zeros(shape[0], int)),
        "step": np.arange(shape[1]),
        "timestep": ("step", 1000 * sigma),
        "sigma": ("step", sigma),
        "branch": np.array(branches, object),
    }
    groups: dict[str, xr.Dataset] = {}
    for stream, h, valid in (("img", img, None), ("txt", txt, txt_valid)):
        if h is not None:
            groups |= _stream(stream, h, valid, values, axes, recorded)
    if embedding is not None:
        groups["/embedding/img"] = _marked(statistics(embedding, RUN), axes, recorded)
    if updates is not None:
        each = [_statistics_or_nan(h).expand_dims(kind=[kind]) for kind, h in updates.items()]
        groups["/updates/img"] = _marked(xr.concat(each, "kind"), axes | _blocks(img.shape[3]), recorded)
    if gates is not None:
        data = xr.Dataset({k: ((*RUN, "block", "channel"), g) for k, g in gates.items()})
        data = data.assign_coords(channel=np.arange(img.shape[-1]))
        groups["/modulation/img"] = _marked(data, axes | _blocks(img.shape[3]), recorded)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update(
        format_version=FORMAT_VERSION, kind="run", model=json.dumps(MODEL), settings="{}", dtype="float32"
    )
    return tree


def _stream(
    stream: str, h: np.ndarray, valid: np.ndarray | None, values: str, axes: dict, recorded: np.ndarray
) -> dict[str, xr.Dataset]:
    groups = {}
    axes = axes | _blocks(h.shape[3])
    if values != "raw":
        data = _marked(statistics(h, (*RUN, "block"), valid), axes, recorded)
        groups[f"/statistics/{stream}"] = data
    if values != "statistics":
        data = xr.Dataset({"activation": ((*RUN, "block", "token", "channel"), h)})
        data = data.assign_coords(channel=np.arange(h.shape[-1]), token=np.arange(h.shape[-2]))
        side = int(h.shape[-2] ** 0.5)
        if stream == "img" and side**2 == h.shape[-2]:
            row, column = np.divmod(np.arange(side**2), side)
            data = data.assign_coords(row=("token", row), column=("token", column))
        if valid is not None:
            data["token_valid"] = (("sample", "token"), valid)
        groups[f"/activations/{stream}"] = _marked(data, axes, recorded)
    return groups


def _statistics_or_nan(h: np.ndarray) -> xr.Dataset:
    return statistics(np.nan_to_num(h), (*RUN, "block")).where(
        xr.DataArray(np.isfinite(h).all((-2, -1)), dims=(*RUN, "block"))
    )


def _marked(data: xr.Dataset, axes: dict, recorded: np.ndarray) -> xr.Dataset:
    """With coordinates, the mask, and zeros where nothing was recorded, as a store reads."""
    mask = xr.DataArray(recorded, dims=RUN)
    data = xr.Dataset({k: v.where(mask, 0) if set(RUN) <= set(v.dims) else v for k, v in data.items()})
    return data.assign(recorded=mask).assign_coords(axes)


def _blocks(n: int) -> dict:
    names = np.array([f"transformer_blocks.{i}" for i in range(n)], object)
    return {
        "block": np.arange(n),
        "block_fqn": ("block", names),
        "block_kind": ("block", np.array(["joint"] * n, object)),
    }


def factorial_tree(
    h: np.ndarray,
    factors: tuple[str, ...] = ("latent", "timestep", "pooled_text", "text_tokens"),
    design: str = "matched",
) -> xr.DataTree:
    """A factorial store from raw activations h (*factors, block, token, channel), or (*factors, block, channel).

    The second form gives the token means themselves, with mean |h| their magnitude and a median of 1.
    """
    if h.ndim == len(factors) + 3:
        data = statistics(h, (*factors, "block"))[["mean", "mean_abs", "median_abs"]].drop_vars(
            "quantile", errors="ignore"
        )
    else:
        per_channel = (*factors, "block", "channel")
        data = xr.Dataset({"mean": (per_channel, h), "mean_abs": (per_channel, np.abs(h))})
        data["median_abs"] = (per_channel[:-1], np.ones(h.shape[:-1]))
        data = data.assign_coords(channel=np.arange(h.shape[-1]))
    n = dict(zip(factors, h.shape, strict=False))
    coords: dict = {f: np.arange(k) for f, k in n.items()} | _blocks(h.shape[len(factors)])
    coords["latent_prompt"] = ("latent", np.array([f"prompt {i}" for i in range(n["latent"])], object))
    coords["latent_seed"] = ("latent", np.arange(n["latent"]))
    coords["sigma"] = ("timestep", np.linspace(1.0, 0.1, n["timestep"]))
    coords["timestep_value"] = ("timestep", np.linspace(1000.0, 100.0, n["timestep"]))
    data = data.assign_coords(coords)
    data.attrs["design"] = design
    if design == "label":
        data.attrs["latent_sigma"] = 0.5
        data = data.assign_coords(sigma_gap=("timestep", np.abs(data["sigma"].values - 0.5)))
    tree = xr.DataTree.from_dict({"/statistics/img": data})
    tree.attrs.update(format_version=FORMAT_VERSION, kind="factorial", design=design, model=json.dumps(MODEL))
    return tree


def factorial_of(
    function: Callable[..., np.ndarray], levels: Mapping[str, np.ndarray], n_blocks: int = 1, width: int = 1
) -> xr.DataTree:
    """A factorial store whose every channel's token mean is `function(**levels)`, evaluated on the full grid."""
    grid = np.meshgrid(*levels.values(), indexing="ij")
    y = np.asarray(function(**dict(zip(levels, grid, strict=True))), float) + np.zeros(grid[0].shape)
    return factorial_tree(np.broadcast_to(y[..., None, None], (*y.shape, n_blocks, width)).copy(), tuple(levels))
