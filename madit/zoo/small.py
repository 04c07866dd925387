"""Small pipelines from the real diffusers and transformers classes, with random weights: SD3, SD3.5 and Flux.

They run in milliseconds and have every part of the real ones, text encoders and tokenizers included. Nothing in them
is trained: they serve tests, benchmarks and planted ground truth (`madit.zoo.planting`).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from madit.zoo import components

_WORDS = ("a", "red", "blue", "green", "circle", "square", "cat", "dog", "with", "on", "small", "large")
_WIDTH = 32  # of the text encoders


def small_sd3(seed: int = 0, layers: int = 4, heads: int = 2, **transformer: Any) -> StableDiffusion3Pipeline:
    """A small Stable Diffusion 3: 16x16 latents in 2x2 patches (64 image tokens), 32x32 pixels."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = (components.word_tokenizer(list(_WORDS)) for _ in range(2))
    encoders = [components.text_encoder(t, width=_WIDTH // 2) for t in (tokenizer, tokenizer_2)]
    tokenizer_3, encoder_3 = _t5(_WIDTH)
    settings = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 16,
        "joint_attention_dim": _WIDTH,
        "caption_projection_dim": heads * 16,
        "pooled_projection_dim": _WIDTH,
        "pos_embed_max_size": 16,
        **transformer,
    }
    return _eval(
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(**settings),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(4),
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            text_encoder_3=encoder_3,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
        )
    )


def small_sd35(seed: int = 0, layers: int = 4, heads: int = 2, **transformer: Any) -> StableDiffusion3Pipeline:
    """A small Stable Diffusion 3.5: as `small_sd3` with dual attention in the first half and normalised q and k."""
    dual = tuple(range(layers // 2))
    return small_sd3(seed, layers, heads, dual_attention_layers=dual, qk_norm="rms_norm", **transformer)


def small_flux(
    seed: int = 0, layers: int = 2, single_layers: int = 3, heads: int = 2, guidance_embeds: bool = True
) -> FluxPipeline:
    """A small Flux.1: dual- and single-stream blocks, embedded guidance, packed 2x2 latents."""
    torch.manual_seed(seed)
    tokenizer = components.word_tokenizer(list(_WORDS))
    tokenizer_2, encoder_2 = _t5(_WIDTH)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=_WIDTH, intermediate_size=_WIDTH, projection_dim=_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4),
        text_encoder=CLIPTextModel(clip),
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )
    pipeline.default_sample_size = 16
    return _eval(pipeline)


def _t5(width: int) -> tuple[T5TokenizerFast, T5EncoderModel]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in _WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5TokenizerFast(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config)


def _vae(latent_channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _eval(pipeline: Any) -> Any:
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
