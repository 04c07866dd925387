"""Two small classifiers that read a picture of the shapes set: `semantics` and `texture`.

They are the judges of the embedded models: one says whether the meaning is right, the other whether the local detail
is. The semantics classifier is trained on blurred and noisy pictures too, so that a loss of detail alone does not
mislead it; the texture classifier sees noise but no blur.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from madit.zoo import shapes_data

_FOLDER = Path(__file__).parent / "models" / "classifiers"


class ShapesClassifier(ModelMixin, ConfigMixin):
    """A convolutional network with one head for each of `factors` (names in `shapes_data.FACTORS`)."""

    @register_to_config
    def __init__(self, factors: tuple[str, ...] = ("texture",), width: int = 32):
        super().__init__()
        sizes = [3, width, width, 2 * width, 2 * width]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(a, b, 3, padding=1, stride=1 + i % 2), nn.GroupNorm(8, b), nn.GELU()]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(2 * width * 64, 128)
        self.heads = nn.ModuleDict({f: nn.Linear(128, len(shapes_data.FACTORS[f])) for f in factors})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits by factor, (batch, class), of pictures (batch, 3, 32, 32) in [0, 1]."""
        x = self.features(2 * pictures - 1)
        x = F.gelu(self.hidden(rearrange(x, "b c h w -> b (c h w)")))
        return {name: head(x) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Predicted class indices by factor, (n,), of pictures (n, row, column, rgb), uint8 or float in [0, 1]."""
        x = torch.from_numpy(np.ascontiguousarray(images))
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        logits = self(rearrange(x, "n h w c -> n c h w").to(self.dtype))
        return {name: value.argmax(-1).numpy() for name, value in logits.items()}


def load_classifiers(folder: Path = _FOLDER) -> dict[str, ShapesClassifier]:
    """The two shipped classifiers: `{"semantics": ..., "texture": ...}`, float32, in evaluation mode."""
    models = {n: ShapesClassifier.from_pretrained(folder / n) for n in ("semantics", "texture")}
    return {name: model.float().eval().requires_grad_(False) for name, model in models.items()}


def box_blur(pictures: Tensor, size: int = 5) -> Tensor:
    """Mean over a `size` x `size` window, edges repeated; (batch, 3, row, column)."""
    if size == 1:
        return pictures
    padded = F.pad(pictures, [size // 2] * 4, mode="replicate")
    return F.avg_pool2d(padded, size, stride=1)


def batch(seed: int, step: int, size: int, blur: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Augmented pictures and labels, a function of (seed, step)."""
    rng = np.random.default_rng([seed, step])
    labels = shapes_data.sample_labels(rng, size)
    pictures = torch.from_numpy(shapes_data.render(labels, rng))
    if blur:
        pictures = torch.cat([box_blur(p, k) for p, k in zip(pictures.chunk(4), (1, 1, 3, 5), strict=True)])
    noise = rng.standard_normal(pictures.shape, dtype=np.float32) * rng.uniform(0, 0.08, (size, 1, 1, 1))
    noisy = (pictures + torch.from_numpy(noise.astype(np.float32))).clamp(0, 1)
    return noisy, {k: torch.from_numpy(v) for k, v in labels.items()}


def classification_loss(model: nn.Module, pictures: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Sum of the heads' cross entropies."""
    return torch.stack([F.cross_entropy(logit, labels[name]) for name, logit in model(pictures).items()]).sum()


@torch.no_grad()
def accuracy(model: ShapesClassifier, n: int = 2000, seed: int = 10_001) -> dict[str, float]:
    """Accuracy by factor on `n` clean pictures that training did not see."""
    rng = np.random.default_rng(seed)
    labels = shapes_data.sample_labels(rng, n)
    images = rearrange(shapes_data.render(labels, rng), "n c h w -> n h w c")
    return {name: float((guess == labels[name]).mean()) for name, guess in model.predict(images).items()}
