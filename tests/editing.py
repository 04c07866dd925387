"""What the tests of edits and guidance share: small pipelines, one run, and a transformer's own inputs."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import torch

from madit import GuidanceConfig
from madit.zoo.small import small_flux, small_sd3, small_sd35

MAKERS = {"sd3": small_sd3, "sd35": small_sd35, "flux": small_flux}
CONFIG = GuidanceConfig(block=2, channels=(3, 5), scale=1.7, factor=-12.0)


def is_flux(pipeline: Any) -> bool:
    return "Flux" in type(pipeline).__name__


def run(pipeline: Any, steps: int = 2, cfg: float = 1.0, seed: int = 0, **more: Any) -> torch.Tensor:
    """Final latents of one prompt; `cfg` is the scale of classifier-free guidance in every family."""
    if is_flux(pipeline):
        more = {"height": 32, "width": 32, "true_cfg_scale": cfg, "negative_prompt": "dog", **more}
    else:
        more = {"guidance_scale": cfg, **more}
    return pipeline(
        "a red cat",
        num_inference_steps=steps,
        max_sequence_length=8,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **more,
    ).images


def hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def inputs(pipeline: Any, rows: int = 1) -> dict[str, Any]:
    """Random inputs of one forward of the transformer."""
    g = torch.Generator().manual_seed(3)
    same = {
        "timestep": torch.full((rows,), 600.0),
        "encoder_hidden_states": torch.randn(rows, 5, 32, generator=g),
        "pooled_projections": torch.randn(rows, 32, generator=g),
        "return_dict": False,
    }
    if not is_flux(pipeline):
        return {"hidden_states": torch.randn(rows, 4, 16, 16, generator=g), **same}
    grid = torch.stack([torch.zeros(64), torch.arange(64) // 8, torch.arange(64) % 8], dim=1)
    return {
        **same,
        "hidden_states": torch.randn(rows, 64, 16, generator=g),
        "timestep": torch.full((rows,), 0.6),
        "guidance": torch.full((rows,), 3.5),
        "img_ids": grid,
        "txt_ids": torch.zeros(5, 3),
    }


def all_blocks(pipeline):
    t = pipeline.transformer
    return [*t.transformer_blocks, *getattr(t, "single_transformer_blocks", ())]


@contextmanager
def disrupted(pipeline, config=CONFIG):
    """A second implementation of the disruption: a plain hook."""

    def hook(module, args, kwargs):
        h = kwargs["hidden_states"].clone()
        tokens = list(config.tokens) if config.tokens is not None else list(range(h.shape[1]))
        for c in config.channels:
            h[:, tokens, c] *= config.factor
        return args, {**kwargs, "hidden_states": h}

    handle = all_blocks(pipeline)[config.block].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def captured(pipeline, **more):
    """The arguments of each call of the transformer in an ordinary run."""
    found = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda m, a, k: found.append(k), with_kwargs=True)
    run(pipeline, **more)
    handle.remove()
    return found


def by_hand(pipeline, config, cfg, skip_scale=0.0, guided_steps=None, **more):
    """A scheduler loop that writes the formula out: D(0) + g (D(c) - D(0)) + w (D(c) - D_m(c)) + skip-layer term."""
    found = captured(pipeline, cfg=cfg, **more)
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler._step_index = None
    for name in ("step", "set_timesteps"):  # a tracker's, inside a context
        vars(scheduler).pop(name, None)
    timesteps = scheduler.timesteps[scheduler.begin_index or 0 :]
    per_step = len(found) // len(timesteps)
    batched = not is_flux(pipeline) and cfg > 1
    latents = found[0]["hidden_states"]
    latents = latents[: len(latents) // 2] if batched else latents
    predict = lambda k, z: pipeline.transformer(**{**k, "hidden_states": z})[0]  # noqa: E731
    for i, t in enumerate(timesteps):
        calls = found[i * per_step : (i + 1) * per_step]
        uncond, skip = None, None
        if batched:
            uncond, cond = predict(calls[0], torch.cat([latents] * 2)).chunk(2)
            n = len(latents)
            only = {k: v[n:] if isinstance(v, torch.Tensor) else v for k, v in calls[0].items()}
            skip = predict(calls[1], latents) if per_step == 2 else None
        else:
            only = calls[0]
            cond = predict(only, latents)
            uncond = predict(calls[1], latents) if per_step == 2 else None
        with disrupted(pipeline, config):
            degraded = predict(only, latents)
        noise = cond if uncond is None else uncond + cfg * (cond - uncond)
        if guided_steps is None or i in guided_steps:
            noise = noise + config.scale * (cond - degraded)
        if skip is not None:
            noise = noise + skip_scale * (cond - skip)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
