"""What the tests of edits and guidance share: small pipelines, one run, and a transformer's own inputs."""

from __future__ import annotations

from typing import Any

import torch

from madit.zoo.small import small_flux, small_sd3, small_sd35

MAKERS = {"sd3": small_sd3, "sd35": small_sd35, "flux": small_flux}


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
