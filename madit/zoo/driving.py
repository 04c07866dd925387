"""What planted channels can depend on, each with its weights and its closed form.

A driver is made before anything is written, since refitting runs the unplanted model first: `value` may read only
weights that the driver will write, not the model's as they are.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from madit.errors import ConfigError
from madit.zoo.refit import ridge
from madit.zoo.rows import Rows

PROMPTS = (
    "a red circle", "a large blue square", "a cat with a green circle", "a small dog on a square",
    "a red cat", "a green square with a red circle", "a dog", "a large circle on a small blue square",
)  # fmt: skip
AT_FIRST_BLOCK = ("latent", "text_tokens")
_DIMS = 4  # dims of temb that each source gets


@dataclass(frozen=True)
class Request:
    """The arguments of `plant` that a driver needs."""

    pipeline: Any
    rows: Rows
    channels: tuple[int, ...]
    block: int
    stream: str
    depth: float
    interaction: float
    prompts: tuple[str, ...]
    max_sequence_length: int
    seed: int


@dataclass(frozen=True)
class Drive:
    """`value(inputs)`: (batch,) multiple of the magnitude; `write(magnitude, signs)` puts it into the weights."""

    value: Callable[[Mapping[str, Tensor]], Tensor]
    write: Callable[[float, tuple[int, ...]], None]


def _need(inputs: Mapping[str, Tensor], name: str) -> Tensor:
    if inputs.get(name) is None:
        raise ConfigError(f"expected the input {name!r}, which drives the planted channels; got {sorted(inputs)}")
    return inputs[name]


def _write_bias(
    request: Request, magnitude: float, signs: tuple[int, ...], weight: Tensor | float, bias: float
) -> None:
    """The MLP writes sign * magnitude; the AdaLN gate multiplies it by weight SiLU(temb) + bias."""
    rows, channels = request.rows, request.channels
    block = rows.blocks[request.block]
    update = [u for u in block.updates() if u.stream == request.stream][-1]
    module = operator.attrgetter(update.module)(block.module)
    last = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)][-1]
    name = f"{block.fqn}.{update.module}" + (f".{last}" if last else "")
    rows.linear(name, channels, 0.0, 0.0)
    rows.set(f"{name}.bias", channels, magnitude * torch.tensor(signs, dtype=torch.float32))
    rows.linear(*rows.adaln(request.block, update.gate, channels, request.stream), weight, bias)


def constant(request: Request) -> Drive:
    """The gate is 1."""
    return Drive(lambda _: torch.ones(1), lambda magnitude, signs: _write_bias(request, magnitude, signs, 0.0, 1.0))


# Drivers that go through the conditioning: gate = W SiLU(temb) + b.

_EMBEDDERS = {"timestep": "timestep_embedder", "guidance": "guidance_embedder", "pooled_text": "text_embedder"}


def _reserve(rows: Rows) -> list[int]:
    """Dims of temb for one term: none that an earlier planting in this model reads."""
    start = getattr(rows.transformer, "_planted_dims", 0)
    if start + _DIMS > rows.width:
        raise ConfigError(f"expected at most {rows.width // _DIMS} driving terms in a model of width {rows.width}")
    rows.transformer._planted_dims = start + _DIMS
    return list(range(start, start + _DIMS))


def _features(rows: Rows, source: str, x: Tensor) -> Tensor:
    """What the embedder's last Linear reads, (batch, feature); the formula written out, not the module called."""
    embedder = getattr(rows.transformer.time_text_embed, _EMBEDDERS[source])
    first = embedder.linear_1
    if source != "pooled_text":  # Flux multiplies both scalars by 1000 itself
        half = first.in_features // 2
        scale = 1 / rows.family.timestep_scale
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angle = (x.float().cpu().reshape(-1, 1) * scale) * frequency
        x = torch.cat([angle.cos(), angle.sin()], -1)
    return nn.functional.silu(x.to(first.weight) @ first.weight.T + first.bias)


@dataclass(frozen=True)
class _Term:
    """A summand of the gate: gain * sum_j a_j SiLU(sum_s temb_s[dim j]) + offset, over the dims reserved for it.

    `last` holds each source's rows of the embedder's last Linear, (weight, bias).
    """

    dims: list[int]
    last: dict[str, tuple[Tensor, Tensor]]
    mix: Tensor
    gain: float = 1.0
    offset: float = 0.0

    def raw(self, features: Mapping[str, Tensor]) -> Tensor:
        temb = torch.stack([features[s] @ w.T + b for s, (w, b) in self.last.items()]).sum(0)
        return nn.functional.silu(temb) @ self.mix

    def value(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.gain * self.raw(features) + self.offset

    def write(self, rows: Rows) -> None:
        for source, name in _EMBEDDERS.items():
            if hasattr(rows.transformer.time_text_embed, name):
                weight, bias = self.last.get(source, (0.0, 0.0))
                rows.linear(f"time_text_embed.{name}.linear_2", self.dims, weight, bias)


def _calibration(request: Request, source: str) -> Tensor:
    if source == "pooled_text":
        return encode(request.pipeline, request.prompts, request.max_sequence_length)["pooled_text"]
    if source == "guidance":
        return torch.linspace(1.0, 10.0, 256)
    return torch.linspace(1.0, 1000.0, 256) * request.rows.family.timestep_scale


def _term(request: Request, sources: tuple[str, ...], depth: float) -> _Term:
    """A term whose values over the calibration inputs (all pairs of them) span -depth..depth."""
    rows = request.rows
    generator = torch.Generator().manual_seed(request.seed)
    inputs = {s: _features(rows, s, _calibration(request, s)) for s in sources}
    deviation = float(len(sources))  # sources interact through the curvature of SiLU, which is at |x| ~ 2
    last = {s: _spread(inputs[s], s, deviation, generator) for s in sources}
    dims = _reserve(rows)
    mix = torch.rand(_DIMS, generator=generator) + 0.5  # positive: the terms' effects add up, none cancels another
    term = _Term(dims, last, mix.to(next(iter(inputs.values()))))
    if len(sources) == 2:
        first, second = sources
        n, m = len(inputs[first]), len(inputs[second])
        inputs = {first: inputs[first].repeat_interleave(m, 0), second: inputs[second].repeat(n, 1)}
    low, high = (float(v) for v in term.raw(inputs).aminmax())
    gain = 2 * depth / (high - low)
    return _Term(dims, last, term.mix, gain, -gain * (low + high) / 2)


def _spread(features: Tensor, source: str, deviation: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (weight, bias) that make temb of an embedder's features.

    Timestep: a ramp that falls with t, guidance: one that rises (ridge regression on the calibration), from -1 to 3
    where it is alone, since SiLU is monotone there, else around zero, where SiLU is curved. Pooled text: random
    directions of mean 0 and this standard deviation.
    """
    centre = features.mean(0)
    if source == "pooled_text":
        weight = torch.randn(_DIMS, features.shape[-1], generator=generator).to(features)
        weight = weight * (deviation / ((features - centre) @ weight.T).std(0))[:, None]
        return weight, -(weight @ centre)
    low, high = (-1.0, 3.0) if deviation == 1 else (-2 * deviation, 2 * deviation)
    ramp = torch.linspace(low, high, len(features), dtype=torch.float64)
    slope, intercept = ridge(features, ramp.flip(0)[:, None] if source == "timestep" else ramp[:, None], 1e-6)
    return slope.expand(_DIMS, -1).to(features), intercept.expand(_DIMS).to(features)


def _through_temb(*sources: str) -> Callable[[Request], Drive]:
    def driver(request: Request) -> Drive:
        rows = request.rows
        missing = [s for s in sources if not hasattr(rows.transformer.time_text_embed, _EMBEDDERS[s])]
        if missing:
            raise ConfigError(f"expected a model that takes {missing[0]}, got {type(rows.transformer).__name__}")
        shared = request.interaction if len(sources) > 1 else 0.0
        if request.interaction and not shared:
            raise ConfigError(f"expected interaction with driver 'both' only, got it with {', '.join(sources)!r}")
        terms = [_term(request, (s,), request.depth * (1 - shared) / len(sources)) for s in sources]
        if shared:
            terms.append(_term(request, sources, request.depth * shared))

        def value(inputs: Mapping[str, Tensor]) -> Tensor:
            features = {s: _features(rows, s, _need(inputs, s)) for s in sources}
            return 1 + torch.stack([term.value(features) for term in terms]).sum(0)

        def write(magnitude: float, signs: tuple[int, ...]) -> None:
            weight = torch.zeros(rows.width)
            for term in terms:
                term.write(rows)
                weight[term.dims] = (term.gain * term.mix).float().cpu()
            _write_bias(request, magnitude, signs, weight, 1 + sum(term.offset for term in terms))

        return Drive(value, write)

    return driver


# Drivers that go through the streams.


def latent(request: Request) -> Drive:
    """The patch embedding writes magnitude (1 + depth * mean of the patch)."""
    rows = request.rows
    name = rows.family.embed if rows.family.packed else f"{rows.family.embed}.proj"

    def value(inputs: Mapping[str, Tensor]) -> Tensor:
        return 1 + request.depth * _need(inputs, "latent").float().flatten(1).mean(1)

    def write(magnitude: float, signs: tuple[int, ...]) -> None:
        weight = operator.attrgetter(f"{name}.weight")(rows.transformer)
        sign = torch.tensor(signs, dtype=torch.float32)
        bias = magnitude * sign
        per_input = request.depth * bias / weight[0].numel()
        rows.linear(name, request.channels, per_input.reshape(-1, *[1] * (weight.ndim - 1)), bias)

    return Drive(value, write)


def text_tokens(request: Request) -> Drive:
    """A head of block 0 with queries of zero averages a reading of the normalised text over all tokens.

        h[n, c] = magnitude (gain * N_txt / (N_txt + N_img) * mean_k w LN(context[k]) + offset)

    The reading uses a few channels whose AdaLN scale and shift are zero there, so nothing but the text enters.
    """
    rows, block = request.rows, request.rows.blocks[0]
    read = list(range(_DIMS))
    w = torch.randn(_DIMS, generator=torch.Generator().manual_seed(0))  # one reading for all plantings in a model
    attention = block.module.attn  # type: ignore[attr-defined]
    head = rows.width // attention.heads
    embedder = rows.transformer.context_embedder

    def mean_reading(inputs: Mapping[str, Tensor]) -> Tensor:
        text, image = _need(inputs, "text_tokens"), _need(inputs, "latent")
        context = text.to(embedder.weight) @ embedder.weight.T + embedder.bias
        reading = nn.functional.layer_norm(context, context.shape[-1:], eps=1e-6)[..., read] @ w.to(context)
        return reading.sum(1) / (text.shape[1] + _image_tokens(rows, image))

    calibration = encode(request.pipeline, request.prompts, request.max_sequence_length)["text_tokens"]
    readings = mean_reading({"text_tokens": calibration, "latent": _sample(request)})
    low, high = (float(v) for v in readings.aminmax())
    gain = 2 * request.depth / (high - low)
    offset = 1 - gain * (low + high) / 2

    def value(inputs: Mapping[str, Tensor]) -> Tensor:
        return gain * mean_reading(inputs) + offset

    def write(magnitude: float, signs: tuple[int, ...]) -> None:
        name = f"{block.fqn}.attn"
        rows.linear(f"{name}.to_q", range(head), 0.0, 0.0)
        rows.linear(f"{name}.to_v", [0], 0.0, 0.0)
        weight = torch.zeros(rows.width)
        weight[read] = w
        rows.linear(f"{name}.add_v_proj", [0], weight, 0.0)
        for parameter in ("scale_msa", "shift_msa"):
            rows.linear(*rows.adaln(0, parameter, read, "txt"), 0.0, 0.0)
        out = torch.zeros(len(signs), rows.width)
        out[:, 0] = magnitude * gain * torch.tensor(signs)
        rows.linear(f"{name}.to_out.0", request.channels, out, magnitude * offset * torch.tensor(signs))
        rows.linear(*rows.adaln(0, "gate_msa", request.channels), 0.0, 1.0)

    return Drive(value, write)


def _image_tokens(rows: Rows, latent: Tensor) -> int:
    if rows.family.packed:
        return latent.shape[1]
    patch = rows.transformer.config.patch_size
    return (latent.shape[-2] // patch) * (latent.shape[-1] // patch)


def _sample(request: Request) -> Tensor:
    """A latent of the pipeline's own size; Flux packs 2x2 patches."""
    if request.rows.family.packed:
        return torch.zeros(1, (request.pipeline.default_sample_size // 2) ** 2, 1)
    return torch.zeros(1, 1, *[request.rows.transformer.config.sample_size] * 2)


def encode(pipeline: Any, prompts: Sequence[str], max_sequence_length: int = 64) -> dict[str, Tensor]:
    """Prompts as the transformer gets them: `text_tokens` (batch, token, channel), `pooled_text` (batch, channel)."""
    settings = {"prompt": list(prompts), "prompt_2": None, "max_sequence_length": max_sequence_length}
    with torch.no_grad():
        if "do_classifier_free_guidance" in inspect.signature(pipeline.encode_prompt).parameters:
            tokens, _, pooled, _ = pipeline.encode_prompt(**settings, prompt_3=None, do_classifier_free_guidance=False)
        else:
            tokens, pooled, _ = pipeline.encode_prompt(**settings)
    return {"text_tokens": tokens, "pooled_text": pooled}


DRIVERS: dict[str, Callable[[Request], Drive]] = {
    "constant": constant,
    "timestep": _through_temb("timestep"),
    "pooled_text": _through_temb("pooled_text"),
    "both": _through_temb("timestep", "pooled_text"),
    "guidance": _through_temb("guidance"),
    "latent": latent,
    "text_tokens": text_tokens,
}
