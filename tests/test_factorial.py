"""`record_factorial` against single forwards written out by hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from madit import store, tracing
from madit.errors import ConfigError, PromptError, StoreExistsError
from madit.recording import record_factorial
from madit.zoo import small

PROMPTS = ("a red circle", "a dog", "a blue cat", "a green square")
LEVELS = {"latent": 2, "timestep": 3, "pooled_text": 2, "text_tokens": 2}
SHORT = {"max_sequence_length": 8}
SMALL = {**SHORT, "height": 32, "width": 32}


def small_sd3() -> Any:
    return small.small_sd3(layers=2)


def small_flux(**more: Any) -> Any:
    return small.small_flux(layers=1, single_layers=1, **more)


def go(pipeline: Any, path: Path, **more: Any) -> xr.Dataset:
    settings = {"levels": LEVELS, "pipe_kwargs": SHORT, "num_inference_steps": 4, "batch_size": 5, **more}
    return record_factorial(pipeline, PROMPTS, path, **settings)["statistics/img"].to_dataset().load()


def block_outputs(pipeline: Any, **arguments: Any) -> list[np.ndarray]:
    """Image stream at each block's output, (token, channel), of one forward."""
    out: list[np.ndarray] = []
    blocks = [*pipeline.transformer.transformer_blocks, *getattr(pipeline.transformer, "single_transformer_blocks", [])]
    handles = [b.register_forward_hook(lambda m, a, o: out.append(o[1][0].double().numpy())) for b in blocks]
    with torch.no_grad():
        pipeline.transformer(**arguments, return_dict=False)
    for handle in handles:
        handle.remove()
    return out


def level(pipeline: Any, prompt: str, seed: int, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        x0 = pipeline(
            prompt, num_inference_steps=4, generator=torch.Generator().manual_seed(seed), output_type="latent", **more
        ).images
    return x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + 2**31))


def check(data: xr.Dataset, cell: dict[str, int], outputs: list[np.ndarray]) -> None:
    for block, h in enumerate(outputs):
        got = data.isel(**cell).sel(block=block)
        np.testing.assert_allclose(got["mean"], h.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got["mean_abs"], np.abs(h).mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(got["median_abs"], np.sort(np.abs(h), axis=None)[h.size // 2], rtol=1e-3)


@pytest.mark.parametrize("design", ["matched", "label"])
def test_cells_are_forwards_with_exactly_these_inputs(design: str, tmp_path: Path) -> None:
    pipeline = small_sd3()
    data = go(pipeline, tmp_path / "f.zarr", design=design)
    assert data["mean"].dims == ("latent", "timestep", "pooled_text", "text_tokens", "block", "channel")
    pipeline.scheduler.set_timesteps(4)
    sigmas, timesteps = pipeline.scheduler.sigmas[[0, 2, 3]], pipeline.scheduler.timesteps[[0, 2, 3]]
    np.testing.assert_allclose(data["sigma"], sigmas)
    np.testing.assert_allclose(data["timestep_value"], timesteps)
    texts = [pipeline.encode_prompt(p, None, None, do_classifier_free_guidance=False, **SHORT) for p in PROMPTS[:2]]
    held_out = list(PROMPTS[2:])
    assert data["latent_prompt"].values.tolist() == held_out
    assert data["pooled_text_prompt"].values.tolist() == data["text_tokens_prompt"].values.tolist() == list(PROMPTS[:2])
    for latent, timestep, pooled, tokens in product(range(2), (0, 2), range(2), range(2)):
        x0, eps = level(pipeline, held_out[latent], latent, guidance_scale=4.0, **SHORT)
        sigma = sigmas[timestep if design == "matched" else 1]
        outputs = block_outputs(
            pipeline,
            hidden_states=(1 - sigma) * x0 + sigma * eps,
            timestep=timesteps[timestep].reshape(1),
            encoder_hidden_states=texts[tokens][0],
            pooled_projections=texts[pooled][2],
        )
        check(data, {"latent": latent, "timestep": timestep, "pooled_text": pooled, "text_tokens": tokens}, outputs)
    assert data.attrs["design"] == design
    if design == "label":
        assert data.attrs["latent_sigma"] == pytest.approx(float(sigmas[1]))
        np.testing.assert_allclose(data["sigma_gap"], (sigmas - sigmas[1]).abs(), atol=1e-7)


def test_flux_has_embedded_guidance_as_a_factor(tmp_path: Path) -> None:
    pipeline = small_flux()
    levels = {"latent": 1, "timestep": 2, "pooled_text": 1, "text_tokens": 2, "guidance": 2}
    data = go(pipeline, tmp_path / "f.zarr", levels=levels, pipe_kwargs=SMALL)
    assert data["mean"].dims[:5] == tuple(levels)
    assert data["guidance_value"].values.tolist() == [1.0, 7.0]
    x0, eps = level(pipeline, PROMPTS[2], 0, guidance_scale=4.0, **SMALL)
    texts = [pipeline.encode_prompt(p, None, **SHORT) for p in PROMPTS[:2]]
    ids = torch.stack([torch.zeros(64), torch.arange(64) // 8, torch.arange(64) % 8], dim=1)
    for step, tokens, guidance in product(range(2), range(2), range(2)):
        sigma = float(data["sigma"][step])
        outputs = block_outputs(
            pipeline,
            hidden_states=(1 - sigma) * x0 + sigma * eps,
            timestep=torch.tensor([sigma]),
            encoder_hidden_states=texts[tokens][0],
            pooled_projections=texts[0][1],
            guidance=torch.tensor([float(data["guidance_value"][guidance])]),
            img_ids=ids,
            txt_ids=texts[0][2],
        )
        cell = {"latent": 0, "timestep": step, "pooled_text": 0, "text_tokens": tokens, "guidance": guidance}
        check(data, cell, outputs)


def test_a_factor_that_the_model_lacks_is_left_out(tmp_path: Path) -> None:
    levels = {"latent": 1, "timestep": 2, "guidance": 3}
    data = go(small_sd3(), tmp_path / "sd3.zarr", levels=levels)
    assert data["mean"].shape[:4] == (1, 2, 1, 1)
    assert "guidance" not in data.dims
    plain = go(small_flux(guidance_embeds=False), tmp_path / "flux.zarr", levels=levels, pipe_kwargs=SMALL)
    assert "guidance" not in plain.dims


def test_batches_and_a_crash_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = small_sd3()
    whole = go(pipeline, tmp_path / "whole.zarr")
    one = go(pipeline, tmp_path / "one.zarr", batch_size=1)
    xr.testing.assert_allclose(whole, one, rtol=1e-3, atol=1e-5)
    append = store.Writer.append

    def crash(self: store.Writer, batch: int, *rest: Any) -> None:
        if batch == 1:
            raise KeyboardInterrupt
        append(self, batch, *rest)

    monkeypatch.setattr(store.Writer, "append", crash)
    with pytest.raises(KeyboardInterrupt):
        go(pipeline, tmp_path / "cut.zarr")
    monkeypatch.setattr(store.Writer, "append", append)
    forwards: list[int] = []
    visit = tracing.visit_forward
    monkeypatch.setattr(tracing, "visit_forward", lambda *a: forwards.append(a[3].rows["cond"].stop) or visit(*a))
    xr.testing.assert_identical(go(pipeline, tmp_path / "cut.zarr"), whole)
    assert sum(forwards) == 12  # the second latent's cells only
    with pytest.raises(StoreExistsError, match="another `design`"):
        go(pipeline, tmp_path / "cut.zarr", design="label")


def test_the_number_of_forwards_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(small_sd3(), tmp_path / "f.zarr")
    said = "2 latent x 3 timestep x 2 pooled_text x 2 text_tokens = 24 forwards of the transformer\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"design": "free"}, ConfigError, "matched"),
        ({"levels": {"noise": 2}}, ConfigError, "'noise'"),
        ({"levels": {"latent": 0}}, ConfigError, "'latent': 0"),
        ({"levels": {"pooled_text": 5}}, PromptError, "at least 5 prompts .* got 4"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type, message: str, tmp_path: Path, pipelines: Any) -> None:
    with pytest.raises(error, match=message):
        go(pipelines["sd3"], tmp_path / "f.zarr", **change)
