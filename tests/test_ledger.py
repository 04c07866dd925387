"""The write ledger: a conservation law, and known writers in known places."""

from __future__ import annotations

import numpy as np
import pytest
import trees
import xarray as xr

import madit
from madit.channels import ChannelSet
from madit.errors import StoreError
from madit.ledger import ledger, rank
from madit.zoo import small

SAMPLES, STEPS, BLOCKS, TOKENS, WIDTH = 3, 4, 4, 16, 12
KINDS = ("update_msa", "update_msa2", "update_mlp")
MASSIVE, OTHER = 5, 9
CHANNELS = ChannelSet.of({2: [MASSIVE], 3: [MASSIVE, OTHER]}, BLOCKS, WIDTH)


def parts(seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Embedding, updates, states and gates: block 1's MLP writes +300 (1 + step), block 3's attention takes 50 back."""
    rng = np.random.default_rng(seed)
    shape = (SAMPLES, STEPS, 1, BLOCKS, TOKENS, WIDTH)
    embedding = rng.normal(size=(*shape[:3], TOKENS, WIDTH))
    updates = {kind: 0.3 * rng.normal(size=shape) for kind in KINDS}
    updates["update_msa2"][..., 2:, :, :] = np.nan  # only the first blocks have a second attention
    growth = 300.0 * (1 + np.arange(STEPS)).reshape(1, -1, 1, 1)
    updates["update_mlp"][..., 1, :, MASSIVE] += growth
    updates["update_msa"][..., 3, :, MASSIVE] -= 50
    total = sum(np.nan_to_num(u) for u in updates.values())
    states = embedding[..., None, :, :] + np.cumsum(total, axis=3)
    gates = {kind.replace("update", "gate"): rng.uniform(0.5, 1.5, (*shape[:4], WIDTH)) for kind in KINDS}
    gates["gate_mlp"][..., 1, MASSIVE] = -40.0
    gates["gate_msa2"][..., 2:, :] = np.nan
    return embedding, updates, states, gates


def tree_of(embedding, updates, states, gates, **kwargs) -> xr.DataTree:
    return trees.run_tree(states, values="statistics", embedding=embedding, updates=updates, gates=gates, **kwargs)


@pytest.fixture(scope="module")
def book() -> xr.Dataset:
    return ledger(tree_of(*parts()), CHANNELS)


def test_the_ledger_closes_up_to_float32(book):
    assert book.closure.dims == ("step", "block", "channel")
    assert float(book.closure.max()) < 1e-3
    assert 0 < book.attrs["largest_closure"] < 1e-3
    assert book.channel.values.tolist() == [MASSIVE, OTHER]


def test_entries_are_token_means_over_samples(book):
    embedding, updates, states, _ = parts()
    here = book.sel(channel=MASSIVE)
    assert here.embedding.values == pytest.approx(embedding[:, :, 0, :, MASSIVE].mean((0, 2)), rel=1e-4, abs=1e-5)
    assert here.state.values == pytest.approx(states[:, :, 0, :, :, MASSIVE].mean((0, 3)), rel=1e-4, abs=1e-4)
    written = here.write.sel(kind="update_mlp", block=1)
    assert written.values == pytest.approx(updates["update_mlp"][:, :, 0, 1, :, MASSIVE].mean((0, 2)), rel=1e-4)
    assert here.write.sel(kind="update_msa2", block=[2, 3]).isnull().all()


def test_a_write_that_is_not_in_the_ledger_shows_in_the_closure():
    embedding, updates, states, gates = parts()
    states = states.copy()
    states[0, 2, 0, 2:, :, MASSIVE] += 7.0  # in one sample, from block 2 on
    book = ledger(tree_of(embedding, updates, states, gates), CHANNELS)
    assert book.closure.sel(step=2, block=[2, 3], channel=MASSIVE).values == pytest.approx([7, 7], rel=1e-3)
    assert float(book.closure.sel(step=[0, 1, 3]).max()) < 1e-3
    assert book.attrs["largest_closure"] == pytest.approx(
        7 / float(book.median_abs.sel(step=2, block=[2, 3]).min()), rel=0.1
    )


def test_ranking_names_the_writers(book):
    table = rank(book, block=3, channel=MASSIVE)
    assert table.writer.values[:2].tolist() == ["blocks.1.img.update_mlp", "blocks.3.img.update_msa"]
    growth = 300.0 * (1 + np.arange(STEPS))
    assert table.share.values[0] == pytest.approx(growth.sum() / (growth - 50).sum(), rel=0.01)
    assert table.share.values[1] == pytest.approx(-50 * STEPS / (growth - 50).sum(), rel=0.02)
    assert float(table.share.sum()) == pytest.approx(1, abs=1e-5)
    assert table.write.values[0] == pytest.approx(growth.mean(), rel=0.01)
    assert table.sizes["writer"] == 1 + 4 * 2 + 2  # the embedding, attention and MLP of 4 blocks, 2 second attentions
    assert "embedding" in table.writer.values


def test_only_earlier_writers_count(book):
    before = rank(book, block=0, channel=MASSIVE)
    assert before.sizes["writer"] == 4
    assert not any("blocks.1" in w for w in before.writer.values)
    assert float(before.share.sum()) == pytest.approx(1, abs=1e-4)
    assert rank(book, block=2, channel=MASSIVE).writer.values[0] == "blocks.1.img.update_mlp"


def test_gates_stand_beside_their_writers(book):
    _, _, _, gates = parts()
    table = rank(book, block=3, channel=MASSIVE)
    assert (table.gate_rank.values[0], table.gate_rank.values.tolist().count(1.0)) == (1.0, 1)
    sizes = np.abs(gates["gate_mlp"][:, :, 0, 1])
    expected = (sizes[..., MASSIVE] / np.median(sizes, axis=-1)).mean()
    assert table.gate_ratio.values[0] == pytest.approx(expected, rel=1e-5)
    assert float(book.gate.sel(kind="update_mlp", block=1, channel=MASSIVE, step=0)) == pytest.approx(-40)
    assert bool(table.gate_ratio.sel(writer="embedding").isnull())


def test_without_gates_the_ledger_still_ranks():
    embedding, updates, states, _ = parts()
    tree = trees.run_tree(states, values="statistics", embedding=embedding, updates=updates)
    book = ledger(tree, CHANNELS)
    assert "gate" not in book
    assert rank(book, 3, MASSIVE).writer.values[0] == "blocks.1.img.update_mlp"


def test_unwritten_samples_do_not_count(book):
    recorded = np.ones((SAMPLES, STEPS, 1), bool)
    recorded[2] = False
    embedding, updates, states, gates = parts()
    got = ledger(tree_of(embedding, updates, states, gates, recorded=recorded), CHANNELS)
    expected = states[:2, :, 0, :, :, MASSIVE].mean((0, 3))
    assert got.state.sel(channel=MASSIVE).values == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert float(got.closure.max()) < 1e-3


def test_lazy_trees_give_the_same(book):
    lazy = tree_of(*parts()).map_over_datasets(lambda data: data.chunk({"sample": 1}) if data.sizes else data)
    xr.testing.assert_allclose(ledger(lazy, CHANNELS), book, rtol=1e-5)


def test_refusals_say_what_to_do(book):
    embedding, updates, states, gates = parts()
    with pytest.raises(StoreError, match=r"expected /updates/img .*record with sites that name the updates"):
        ledger(trees.run_tree(states, values="statistics", embedding=embedding), CHANNELS)
    with pytest.raises(StoreError, match=r"expected /embedding/img .*blocks\.0\.img\.resid_pre"):
        ledger(trees.run_tree(states, values="statistics", updates=updates), CHANNELS)
    lacking = {k: u.copy() for k, u in updates.items()}
    for update in lacking.values():
        update[..., 1, :, :] = np.nan
    with pytest.raises(StoreError, match="updates of every block up to 3, blocks 1 have none"):
        ledger(tree_of(embedding, lacking, states, gates), CHANNELS)
    with pytest.raises(StoreError, match=r"expected a block of the ledger \(0, 1, 2, 3\), got 8"):
        rank(book, 8, MASSIVE)
    with pytest.raises(StoreError, match=r"expected a channel of the ledger \(5, 9\), got 0"):
        rank(book, 3, 0)


@pytest.mark.parametrize("make", [small.small_sd3, small.small_sd35, small.small_flux])
def test_the_law_holds_on_real_blocks(make, tmp_path):
    dit = madit.DiT(make())
    sites = ["blocks.*.img.resid_post", "blocks.0.img.resid_pre", "blocks.*.img.update*", "blocks.*.img.gate*"]
    size = {"height": 32, "width": 32} if dit.family.packed else {}
    tree = madit.record(
        dit, ["a red circle", "a cat"], tmp_path / "run.zarr", num_inference_steps=2, guidance_scale=3.0, batch_size=2,
        sites=sites, pipe_kwargs={"max_sequence_length": 8, **size},
    )  # fmt: skip
    n = len(dit.blocks)
    book = ledger(tree, ChannelSet.of({n - 1: range(dit.width)}, n, dit.width))
    assert book.attrs["largest_closure"] < 1e-5
    assert float(np.abs(book.state - book.embedding).max()) > 0.1  # the blocks do write
    moved = (book.embedding + book.write.fillna(0).sum(["kind", "block"])).values
    assert moved == pytest.approx(book.state.sel(block=n - 1).values, abs=1e-5)
    assert float(rank(book, n - 1, 3).share.sum()) == pytest.approx(1, abs=1e-4)
