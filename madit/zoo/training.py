"""How the embedded models are trained; `python -m madit.zoo.train` runs it.

Everything is a function of the seed and the step number, so a run that is killed goes on from its last checkpoint as
if nothing had happened. A run folder holds `state.pt` (to resume), `log.jsonl` (loss and time), `snapshots/` (EMA
weights at chosen steps) and, at the end, `pipeline/`.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from madit.zoo import classifiers, components, shapes_data

SNAPSHOTS = (250, 500, 1000, 2000, 3000, 4000, 6000, 8000, 10000)


def words() -> list[str]:
    """Every word that a caption can contain."""
    labels = shapes_data.labels_from_index(np.arange(shapes_data.n_combinations()))
    return sorted({word for text in shapes_data.captions(labels) for word in text.split()})


def build_pipeline(seed: int = 0, layers: int = 6, heads: int = 4, head_dim: int = 32) -> StableDiffusion3Pipeline:
    """An untrained text-conditioned SD3 in pixel space, 32x32 pixels in 4x4 patches."""
    torch.manual_seed(seed)
    tokenizer = components.word_tokenizer(words())
    encoders = [components.text_encoder(tokenizer) for _ in range(2)]
    width = heads * head_dim
    joint = sum(e.config.hidden_size for e in encoders)
    transformer = SD3Transformer2DModel(
        sample_size=shapes_data.SIZE,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        joint_attention_dim=joint,
        caption_projection_dim=width,
        pooled_projection_dim=joint,
        pos_embed_max_size=shapes_data.SIZE // 4,
    )
    _adaln_zero(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=components.PixelCodec(),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=components.NullTextEncoder(hidden_size=joint),
        tokenizer=tokenizer,
        tokenizer_2=copy.deepcopy(tokenizer),
        tokenizer_3=components.NullTokenizer(),
    )


def _adaln_zero(transformer: SD3Transformer2DModel) -> None:
    """DiT's initialisation (Peebles & Xie 2023, section 3.2): every AdaLN parameter and the output start at zero."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith((".norm1.linear", ".norm1_context.linear"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for module in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


class Trainable(nn.Module):
    """The parts that learn: the transformer and both text encoders, called on token ids."""

    def __init__(self, pipeline: StableDiffusion3Pipeline):
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings (batch, token, joint) and pooled embedding (batch, joint), as the pipeline makes them."""
        outputs = [e(ids, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        tokens = torch.cat([tokens, tokens.new_zeros(len(tokens), 1, tokens.shape[-1])], dim=1)
        return tokens, torch.cat([o.text_embeds for o in outputs], dim=-1)

    def forward(self, z: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Velocity (batch, channel, row, column) at state `z`, noise level `sigma` (batch,) and token ids."""
        tokens, pooled = self.encode(ids)
        return self.transformer(z, tokens, pooled, 1000 * sigma, return_dict=False)[0]


class Batches:
    """Training batches: (pictures in [-1, 1], token ids, noise, sigma), a function of (seed, step) alone."""

    def __init__(self, tokenizer, seed: int, size: int = 32, drop_caption: float = 0.1, drop_word: float = 0.08):
        self.tokenizer, self.seed, self.size = tokenizer, seed, size
        self.drop_caption, self.drop_word = drop_caption, drop_word

    def ids(self, texts: list[str]) -> Tensor:
        """Token ids (batch, token) of captions."""
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, step])
        labels = shapes_data.sample_labels(rng, self.size)
        pictures = torch.from_numpy(shapes_data.render(labels, rng)) * 2 - 1
        texts = shapes_data.captions(labels, rng, self.drop_word)
        texts = ["" if rng.random() < self.drop_caption else t for t in texts]
        noise = torch.from_numpy(rng.standard_normal(pictures.shape, dtype=np.float32))
        sigma = torch.sigmoid(torch.from_numpy(rng.standard_normal(self.size, dtype=np.float32)))
        return pictures, self.ids(texts), noise, sigma


def mix(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The flow-matching state z = (1 - sigma) x0 + sigma eps."""
    s = sigma[:, None, None, None]
    return (1 - s) * x0 + s * noise


def flow_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared error of the predicted velocity against eps - x0 (Lipman et al. 2023; SD3, arXiv 2403.03206)."""
    x0, ids, noise, sigma = batch
    return (model(mix(x0, noise, sigma), sigma, ids) - (noise - x0)).square().mean()


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 200 steps, flat, then linear to a hundredth over the last fifth."""
    warm = min(1.0, (step + 1) / 200)
    cool = min(1.0, max(0.01, (total - step) / (0.2 * total)))
    return peak * warm * cool


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, int], Tensor],
    out: Path,
    steps: int,
    *,
    lr: float = 1e-3,
    ema_decay: float = 0.999,
    after_step: Callable[[nn.Module], None] | None = None,
    snapshots: tuple[int, ...] = (),
    checkpoint_seconds: float = 240.0,
) -> nn.Module:
    """Minimise `loss_of(model, step)` with AdamW; resumes from `out/state.pt`; returns the averaged (EMA) model."""
    (out / "snapshots").mkdir(parents=True, exist_ok=True)
    ema = copy.deepcopy(model).requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state_file = out / "state.pt"
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    saved = begun = time.monotonic()
    running: list[float] = []
    with (out / "log.jsonl").open("a") as log:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            loss = loss_of(model, step)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if after_step is not None:
                after_step(model)
            _average(ema, model, min(ema_decay, (step + 1) / (step + 10)))
            running.append(float(loss.detach()))
            done = step + 1
            if done % 50 == 0 or done == steps:
                entry = {"step": done, "loss": float(np.mean(running)), "seconds": time.monotonic() - begun}
                log.write(json.dumps(entry) + "\n")
                log.flush()
                running.clear()
            if done in snapshots:
                torch.save(ema.state_dict(), out / "snapshots" / f"{done:06d}.pt")
            if time.monotonic() - saved > checkpoint_seconds or done == steps:
                _save(state_file, {"model": model.state_dict(), "ema": ema.state_dict(),
                                   "optimizer": optimizer.state_dict(), "step": done})  # fmt: skip
                saved = time.monotonic()
    return ema


def _save(path: Path, state: dict) -> None:
    """Write aside, then rename: a kill in the middle leaves the older state whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.rename(path)


@torch.no_grad()
def _average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    averaged, current = list(ema.state_dict().values()), list(model.state_dict().values())
    floats = [(a, b) for a, b in zip(averaged, current, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)


def install(pipeline: StableDiffusion3Pipeline, trained: Trainable | dict[str, Tensor]) -> StableDiffusion3Pipeline:
    """Copy trained weights into the pipeline's own modules."""
    weights = trained if isinstance(trained, dict) else trained.state_dict()
    Trainable(pipeline).load_state_dict(weights)
    return pipeline


def train_shapes(out: Path, steps: int, seed: int, lr: float) -> None:
    """Train the natural model `shapes`."""
    pipeline = build_pipeline(seed)
    batches = Batches(pipeline.tokenizer, seed)
    model = Trainable(pipeline).train()
    ema = train(model, lambda m, step: flow_loss(m, batches[step]), out, steps, lr=lr, snapshots=SNAPSHOTS)
    install(pipeline, ema).save_pretrained(out / "pipeline")


def train_classifiers(out: Path, steps: int, seed: int, lr: float) -> None:
    """Train the judges of semantics and texture."""
    for name, factors in (("semantics", shapes_data.SEMANTICS), ("texture", shapes_data.DETAIL)):
        torch.manual_seed(seed)
        model = classifiers.ShapesClassifier(factors=factors)

        def loss(m: nn.Module, step: int, blur: bool = name == "semantics") -> Tensor:
            return classifiers.classification_loss(m, *classifiers.batch(seed, step, 64, blur))

        ema = train(model, loss, out / name, steps, lr=lr, ema_decay=0.99)
        assert isinstance(ema, classifiers.ShapesClassifier)
        (out / name / "accuracy.json").write_text(json.dumps(classifiers.accuracy(ema.eval())))
        ema.half().save_pretrained(out / name / "model")
