"""The parts that make a small text-to-image model a real `StableDiffusion3Pipeline`.

diffusers finds them by the library name `madit.zoo` in `model_index.json`, so `from_pretrained` works as on any model.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizer


class _Exact:
    """A posterior without variance: what a codec that loses nothing returns."""

    def __init__(self, mean: torch.Tensor):
        self.mean = mean

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        return self.mean

    def mode(self) -> torch.Tensor:
        return self.mean


class PixelCodec(ModelMixin, ConfigMixin):
    """Pixel space behind the interface of `AutoencoderKL`: latents are the pixels in [-1, 1], shape unchanged."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 3,
        block_out_channels: tuple[int, ...] = (1,),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        self.device_anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # gives .device and .dtype

    def encode(self, x: torch.Tensor, return_dict: bool = True):
        posterior = _Exact(x)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None):
        return DecoderOutput(sample=z) if return_dict else (z,)


class NullTextEncoder(ModelMixin, ConfigMixin):
    """The third text encoder of an SD3 pipeline that has no T5: one zero token for each prompt.

    SD3 without a third encoder pads the text with 256 zero tokens; this pads with one.
    """

    @register_to_config
    def __init__(self, hidden_size: int = 128):
        super().__init__()
        self.device_anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        shape = (*input_ids.shape, self.config.hidden_size)
        return (torch.zeros(shape, dtype=self.dtype, device=input_ids.device),)


class NullTokenizer(PreTrainedTokenizer):
    """Turns any prompt into the single id 0, whatever length is asked for."""

    model_input_names = ["input_ids"]  # noqa: RUF012  (the base class reads a plain list)

    @property
    def vocab_size(self) -> int:
        return 1

    def get_vocab(self) -> dict[str, int]:
        return {"</s>": 0}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return []

    def _convert_token_to_id(self, token: str) -> int:
        return 0

    def _convert_id_to_token(self, index: int) -> str:
        return "</s>"

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        return ()

    def __call__(self, text: str | list[str], **kwargs):
        n = 1 if isinstance(text, str) else len(text)
        return SimpleNamespace(input_ids=torch.zeros(n, 1, dtype=torch.long))


def word_tokenizer(words: list[str], max_length: int = 16) -> CLIPTokenizer:
    """A real `CLIPTokenizer` in which each of `words` is one token; other text falls back to letters."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789,.'-"))
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=max_length)
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in sorted(set(words))])
    return tokenizer


def text_encoder(tokenizer: CLIPTokenizer, width: int = 64, layers: int = 2) -> CLIPTextModelWithProjection:
    """A small CLIP text encoder for `tokenizer`, randomly initialised from torch's global generator."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
