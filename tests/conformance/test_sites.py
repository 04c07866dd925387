"""Every site is where its name says: an edit there changes the output, and nothing that comes before it.

Edits and readings are plain PyTorch hooks, so this tests the families' tables and not the tracer.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from madit.arch import BoundBlock
from madit.dit import DiT
from madit.sites import UPDATES, Site
from madit.zoo.small import small_flux, small_sd3, small_sd35

MAKERS = {
    "sd3": lambda: small_sd3(layers=2),
    "sd35": lambda: small_sd35(layers=2),
    "flux": lambda: small_flux(layers=1, single_layers=2),
}


def inputs(pipeline: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    same = {
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=g),
        "pooled_projections": torch.randn(1, 32, generator=g),
        "return_dict": False,
    }
    if "Flux" not in type(pipeline).__name__:
        latent = torch.randn(1, 4, 16, 16, generator=g)
        return {"hidden_states": latent, "timestep": torch.tensor([600.0]), **same}
    ids = torch.stack([torch.zeros(64), torch.arange(64) // 8, torch.arange(64) % 8], dim=1)
    return {
        "hidden_states": torch.randn(1, 64, 16, generator=g),
        "timestep": torch.tensor([0.6]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        **same,
    }


def _module(block: BoundBlock, path: str) -> Any:
    return block.module.get_submodule(path)  # type: ignore[attr-defined]


def hook(block: BoundBlock, site: Site, change: Any, text: int = 5) -> Any:
    """Call `change` with the value at a site and let the model go on with what it returns, if anything."""
    table = block.table
    if site.kind == "resid_pre":
        name = table.inputs[site.stream]

        def before(module: Any, args: tuple, kwargs: dict) -> Any:
            new = change(kwargs[name])
            return None if new is None else (args, {**kwargs, name: new})

        return block.module.register_forward_pre_hook(before, with_kwargs=True)  # type: ignore[attr-defined]
    if site.kind == "resid_post":
        return block.module.register_forward_hook(_at(table.outputs[site.stream], change))  # type: ignore[attr-defined]
    if site.kind in UPDATES:
        update = next(u for u in block.updates() if (u.stream, u.kind) == (site.stream, site.kind))
        part = slice(None)
        if update.joint:
            part = slice(0, text) if site.stream == "txt" else slice(text, None)
        return _module(block, update.module).register_forward_hook(_at(update.index, change, tokens=part))
    m = next(m for m in block.modulation() if m.stream == site.stream and site.kind in m.names)
    return _module(block, m.module).register_forward_hook(_chunk(m.names.index(site.kind), len(m.names), change))


def _at(index: int | None, change: Any, tokens: slice = slice(None)) -> Any:
    def after(module: Any, args: tuple, output: Any) -> Any:
        whole = (output if index is None else output[index]).clone()
        new = change(whole[:, tokens])
        if new is None:
            return None
        whole[:, tokens] = new
        return whole if index is None else tuple(whole if i == index else o for i, o in enumerate(output))

    return after


def _chunk(index: int, n: int, change: Any) -> Any:
    def after(module: Any, args: tuple, output: Any) -> Any:
        parts = list(output.chunk(n, dim=-1))
        new = change(parts[index])
        if new is None:
            return None
        parts[index] = new
        return torch.cat(parts, dim=-1)

    return after


def _edit(x: torch.Tensor) -> torch.Tensor:
    """Not the same for all channels, which a LayerNorm would take away."""
    return x + torch.sin(torch.arange(x.shape[-1]) * 1.3)


def run(dit: DiT, edited: Site | None = None) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
    """The value at every site and the model's output; an edit of a site comes before the readings of it."""
    values: dict[Site, torch.Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        if edited is not None:
            handle = hook(dit.blocks[edited.block], edited, _edit)
            stack.callback(handle.remove)
        for block in dit.blocks:
            for site in block.sites():

                def keep(x: torch.Tensor, site: Site = site) -> None:
                    values[site] = x.clone()

                stack.callback(hook(block, site, keep).remove)
        output = dit.transformer(**inputs(dit.pipeline))[0]
    return values, output


@pytest.mark.parametrize("family", MAKERS)
def test_an_edit_at_each_site_changes_the_output_and_nothing_before_it(family: str) -> None:
    dit = DiT(MAKERS[family]())
    order = [site for block in dit.blocks for site in block.sites()]
    clean, output = run(dit)
    assert list(dict.fromkeys(order)) == order
    assert set(clean) == set(order)
    last = len(dit.blocks) - 1
    for place, site in enumerate(order):
        values, changed = run(dit, site)
        for before in order[:place]:
            assert torch.equal(values[before], clean[before]), f"an edit of {site} changed {before}"
        assert not torch.equal(values[site], clean[site]), site
        # Flux drops its text after the last block, and only there
        dropped = family == "flux" and site.block == last and site.stream == "txt"
        if dropped and site.kind in ("update", "resid_post"):
            assert torch.equal(changed, output), site
        else:
            assert float((changed - output).abs().max()) > 1e-5, site


@pytest.mark.parametrize("family", MAKERS)
def test_the_table_names_every_residual_state_and_write(family: str) -> None:
    """State after = state before + gated writes, in every block and stream: none is missing, none is counted twice."""
    dit = DiT(MAKERS[family]())
    values, _ = run(dit)
    for block in dit.blocks:
        for stream in block.streams():
            state = values[Site(block.index, stream, "resid_pre")]
            for update in (u for u in block.updates() if u.stream == stream):
                at = stream if Site(block.index, stream, update.gate) in values else "img"
                gate = values[Site(block.index, at, update.gate)]
                state = state + gate[:, None] * values[Site(block.index, stream, update.kind)]
            torch.testing.assert_close(state, values[Site(block.index, stream, "resid_post")])
            if block.index:
                entering = values[Site(block.index, stream, "resid_pre")]
                assert torch.equal(entering, values[Site(block.index - 1, stream, "resid_post")])
