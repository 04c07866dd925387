"""The write ledger: which block's update put a massive channel into the residual stream, and through which gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from madit.axes import BLOCK, CHANNEL, KIND, SAMPLE, STEP
from madit.channels import ChannelSet
from madit.errors import StoreError
from madit.views import as_tree, expect_kind, group, has, on_branch, pairs, recorded

HINT = "record with sites that name the updates of every block and blocks.0.{stream}.resid_pre"


def ledger(
    tree: xr.DataTree | str | Path, channels: ChannelSet, stream: str = "img", branch: str = "cond"
) -> xr.Dataset:
    """Split each channel's token mean into the embedding and the writes of every block.

    mean_n h_m[n,c] = mean_n h_0[n,c] + sum_{j <= m} sum_kind mean_n update_j^kind[n,c], which the residual stream
    obeys exactly up to rounding; `closure` says how well the recording does.

    Args:
        tree: a run with `/embedding`, `/updates` and `/statistics` of the stream, or the path of its store.
        channels: whose channels to follow, through all blocks.
        stream: `"img"` or `"txt"`.
        branch: which of the run's branches.

    Returns:
        Means over samples, in the unit of h: `embedding` (step, channel), `write` (step, block, kind, channel; NaN
        where a block lacks the kind), `state` (step, block, channel). `closure` (step, block, channel) is the largest
        |state - embedding - writes so far| over samples; `median_abs` (step, block) the scale to judge it by. Where
        gates were recorded, `gate` like `write`, and `gate_ratio`, |gate| over its median over channels. The attr
        `largest_closure` is in medians.

    Raises:
        StoreError: if the store lacks one of the groups, or the updates of a block.

    >>> book = ledger("run.zarr", channels)
    >>> book.attrs["largest_closure"] < 1e-3
    True

    Source: z^{k+1} = z^k + gate^k * D_k(z^k, t, c), Detail Guidance (arXiv 2510.11538).
    """
    tree = as_tree(tree)
    expect_kind(tree, "run", "ledger reads what madit.record wrote")
    hint = HINT.format(stream=stream)
    state = on_branch(group(tree, f"/statistics/{stream}"), branch)
    updates = on_branch(group(tree, f"/updates/{stream}", hint), branch)
    embedding = on_branch(group(tree, f"/embedding/{stream}", hint), branch)
    chosen, _ = pairs(state, channels, stream)
    followed = {CHANNEL: sorted({c for _, c in chosen})}
    mask = recorded(state)
    h0, write, h = (d["mean"].where(mask).sel(followed).compute() for d in (embedding, updates, state))
    _expect_every_block(write, h, hint)
    so_far = h0 + write.fillna(0.0).sum(KIND).cumsum(BLOCK).sel({BLOCK: h[BLOCK]})
    median = state["median_abs"].where(mask).mean(SAMPLE).compute()
    closure = abs(h - so_far).max(SAMPLE)
    book = xr.Dataset(
        {
            "embedding": h0.mean(SAMPLE),
            "write": write.mean(SAMPLE),
            "state": h.mean(SAMPLE),
            "closure": closure,
            "median_abs": median,
        },
        attrs={"stream": stream, "branch": branch, "largest_closure": float((closure / median).max().fillna(0.0))},
    )
    if not has(tree, f"/modulation/{stream}"):
        return book
    return book.assign(_gates(on_branch(group(tree, f"/modulation/{stream}"), branch), write[KIND], followed).data_vars)


def rank(book: xr.Dataset, block: int, channel: int) -> xr.Dataset:
    """Who wrote `channel` into the output of `block`, largest first.

    share = sum_step sign(state) write / sum_step |state|: the shares of all writers sum to 1 (up to the closure).

    Args:
        book: from `ledger`.
        block: at whose output.
        channel: which of the followed channels.

    Returns:
        Over `writer` ("embedding" or "blocks.{i}.{stream}.{kind}"), by |share|: `share`; `write`, the mean over steps
        in the unit of h; and where gates were recorded `gate_ratio`, |gate| at the channel over its median over
        channels, and `gate_rank` (1 = the writer with the largest |gate|).

    Raises:
        StoreError: if the ledger does not hold the block or channel.

    >>> rank(ledger("run.zarr", channels), block=3, channel=7).writer.values[0]
    'blocks.1.img.update_mlp'
    """
    for name, label in ((BLOCK, block), (CHANNEL, channel)):
        if label not in book[name].values:
            raise StoreError(f"expected a {name} of the ledger ({_listed(book[name].values)}), got {label}")
    here = book.sel({CHANNEL: channel})
    state = here["state"].sel({BLOCK: block}).values
    gated = here[[n for n in ("write", "gate", "gate_ratio") if n in here]].transpose(STEP, ...)
    places = [(b, k) for b in here[BLOCK].values if b <= block for k in here[KIND].values]
    cells = {
        f"blocks.{b}.{book.attrs['stream']}.{k}": cell
        for b, k in places
        if (cell := gated.sel({BLOCK: b, KIND: k})).write.notnull().any()
    }
    writes = np.stack([here["embedding"].values, *(cell["write"].values for cell in cells.values())])
    columns = {"share": (np.sign(state) * writes).sum(axis=1) / np.abs(state).sum(), "write": writes.mean(axis=1)}
    if "gate" in gated:
        size = np.array([np.nan, *(float(np.abs(cell["gate"]).mean()) for cell in cells.values())])
        columns["gate_ratio"] = np.array([np.nan, *(float(cell["gate_ratio"].mean()) for cell in cells.values())])
        columns["gate_rank"] = np.where(np.isnan(size), np.nan, rankdata(-size, nan_policy="omit", method="min"))
    table = xr.Dataset({k: ("writer", v) for k, v in columns.items()})
    table = table.assign_coords(writer=np.array(["embedding", *cells], object))
    return table.isel(writer=np.argsort(-np.abs(columns["share"]), kind="stable"))


def _gates(modulation: xr.Dataset, kinds: xr.DataArray, followed: dict[str, list[int]]) -> xr.Dataset:
    """Gates named by the update they scale: `gate_mlp` scales `update_mlp`, `gate` scales `update`."""
    mask = recorded(modulation)
    gates, ratios = [], []
    for kind in kinds.values:
        name = str(kind).replace("update", "gate", 1)
        if name not in modulation:
            continue
        gate = modulation[name].where(mask)
        gates.append(gate.sel(followed).mean(SAMPLE).expand_dims({KIND: [kind]}))
        size = abs(gate)
        median = size.fillna(0.0).median(CHANNEL)  # a block that lacks the gate has no median, and no ratio
        ratio = size.sel(followed) / median.where(median > 0)
        ratios.append(ratio.mean(SAMPLE).expand_dims({KIND: [kind]}))
    if not gates:
        return xr.Dataset()
    return xr.Dataset({"gate": xr.concat(gates, KIND), "gate_ratio": xr.concat(ratios, KIND)}).compute()


def _expect_every_block(write: xr.DataArray, state: xr.DataArray, hint: str) -> None:
    last = int(state[BLOCK].max())
    written = write.notnull().any([d for d in write.dims if d != BLOCK])
    held = {int(b) for b in write[BLOCK].values[written.values]} if write.sizes[CHANNEL] else set(range(last + 1))
    missing = sorted(set(range(last + 1)) - held)
    if missing:
        raise StoreError(
            f"expected the updates of every block up to {last}, blocks {_listed(missing)} have none; {hint}"
        )


def _listed(values: object) -> str:
    return ", ".join(str(v) for v in np.asarray(values).tolist())
