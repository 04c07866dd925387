"""Tests run offline, on one thread and without a display; a socket that leaves this machine fails the test."""

from __future__ import annotations

import os

os.environ |= {  # before torch is imported, and for the processes that tests start
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_socket import enable_socket, socket_allow_hosts

PROMPTS = ("a red circle", "a blue square")


def pytest_runtest_setup() -> None:
    socket_allow_hosts(["127.0.0.1", "::1", "localhost"], allow_unix_socket=True)


def pytest_unconfigure() -> None:
    enable_socket()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipelines() -> dict[str, Any]:
    """A small pipeline of each family; edits on them must undo themselves."""
    from madit.zoo import small

    return {"sd3": small.small_sd3(), "sd35": small.small_sd35(), "flux": small.small_flux()}


@pytest.fixture(scope="session")
def pipe_kwargs() -> dict[str, dict[str, Any]]:
    """Arguments with which each of `pipelines` takes milliseconds."""
    short = {"max_sequence_length": 8}
    return {"sd3": short, "sd35": short, "flux": {**short, "height": 32, "width": 32}}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a planted model and all that the flow writes of it.

    `model/` (channels 7 and 20 massive from the output of block 1 on), `run.zarr`, `factorial.zarr`, `channels.json`,
    `dg.json`.
    """
    import madit
    from madit.zoo import planting, small

    folder = tmp_path_factory.mktemp("workspace")
    pipeline = small.small_sd3()
    planting.plant(pipeline, (7, 20), block=1, magnitude=500.0, signs=(1, -1))
    pipeline.save_pretrained(folder / "model")
    dit = madit.DiT.from_pretrained(folder / "model")
    short = {"max_sequence_length": 8}
    run = madit.record(
        dit,
        PROMPTS,
        store=str(folder / "run.zarr"),
        seeds=(0, 1),
        num_inference_steps=3,
        sites=["blocks.0.img.resid_pre", *(f"blocks.*.img.{kind}" for kind in ("resid_post", "update_*", "gate_*"))],
        pipe_kwargs=short,
    )
    madit.record_factorial(
        dit,
        ["a cat", "a dog", "a green square"],
        store=str(folder / "factorial.zarr"),
        levels={"latent": 2, "timestep": 3, "pooled_text": 2, "text_tokens": 2},
        pipe_kwargs=short,
    )
    channels = madit.locate(run)
    channels.save(folder / "channels.json")
    madit.GuidanceConfig.from_channels(channels, block=2, scale=0.5).save(folder / "dg.json")
    return folder


@pytest.fixture
def in_workspace(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder with links to what `workspace` holds."""
    for item in workspace.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    return tmp_path
