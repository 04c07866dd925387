"""`doctor` passes sound models of every family, and notices adapters and models that are not what they say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import madit
from madit.workflows.doctor import Check, doctor, site_table
from madit.zoo import small

SHORT = {"max_sequence_length": 8}


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("family", ["sd3", "sd35", "flux"])
def test_sound_models_pass_and_stay_as_they_were(
    family: str, pipelines: dict[str, Any], pipe_kwargs: dict[str, dict[str, Any]]
) -> None:
    dit = madit.DiT(pipelines[family])
    before = dit.fingerprint
    checks = doctor(dit, pipe_kwargs=pipe_kwargs[family])
    assert failed(checks) == set()
    assert [c.name for c in checks][:5] == ["repeatable", "order", "edits, img", "edits, txt", "intervene"]
    assert dit.fingerprint == before
    assert all(not m._forward_pre_hooks for m in dit.transformer.modules())


def test_a_table_with_the_streams_swapped_is_noticed() -> None:
    dit = madit.DiT(small.small_sd3())
    swapped = dataclasses.replace(dit.blocks[1].table, outputs={"img": 0, "txt": 1})
    dit.blocks[1] = dataclasses.replace(dit.blocks[1], table=swapped)
    assert failed(doctor(dit, pipe_kwargs=SHORT)) & {"record", "updates"}


def test_blocks_out_of_order_are_noticed() -> None:
    dit = madit.DiT(small.small_sd3())
    first, second = dit.blocks[1], dit.blocks[2]
    dit.blocks[1] = dataclasses.replace(second, index=1)
    dit.blocks[2] = dataclasses.replace(first, index=2)
    assert {"order", "edits, img"} <= failed(doctor(dit, pipe_kwargs=SHORT))


def test_a_block_that_ignores_its_text_is_noticed() -> None:
    pipeline = small.small_sd3()
    with torch.no_grad():  # the last block's text enters only through attention's added keys and values
        pipeline.transformer.transformer_blocks[-1].attn.add_v_proj.weight.zero_()
        pipeline.transformer.transformer_blocks[-1].attn.add_k_proj.weight.zero_()
    checks = doctor(pipeline, pipe_kwargs=SHORT)
    assert failed(checks) == {"edits, txt"}
    assert "[3]" in next(c.detail for c in checks if c.name == "edits, txt")


def test_a_model_that_does_not_repeat_itself_is_noticed() -> None:
    pipeline = small.small_sd3()
    pipeline.transformer.transformer_blocks[1].register_forward_hook(
        lambda module, args, output: (output[0], output[1] + 1e-3 * torch.randn_like(output[1]))
    )
    assert "repeatable" in failed(doctor(pipeline, pipe_kwargs=SHORT))


def test_the_site_table_has_every_site(pipelines: dict[str, Any]) -> None:
    dit = madit.DiT(pipelines["flux"])
    table = site_table(dit)
    assert [row[1] for row in table] == [b.fqn for b in dit.blocks]
    assert {row[2] for row in table} == {"dual", "single"}
    listed = sum(len(line.split(": ")[1].split()) for row in table for line in row[3].splitlines())
    assert listed == len(dit.sites())
