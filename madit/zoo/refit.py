"""Keep a model's function while its residual stream carries planted channels: refit the readers.

Every later block reads the stream through a LayerNorm without weights and an AdaLN scale and shift. With planted
channels the norm's sigma grows to sigma' and its mean moves from mu to mu', so all other channels arrive shrunken:

    (h - mu) / sigma = (sigma' / sigma) * (h - mu') / sigma' + (mu' - mu) / sigma  =  g * LN(h') + k.

g and k are taken up by the AdaLN rows: 1 + scale -> g (1 + scale), shift -> shift + k (1 + scale). Both vary with the
input; what is linear in the conditioning SiLU(temb) is fitted by ridge regression on calibration inputs, the variation
over tokens is lost. The planted channels are hidden from the readers: 1 + scale = 0 and shift = 0 there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from madit.errors import ConfigError
from madit.zoo.rows import Rows

_READS = {
    "norm1.norm": (("scale_msa", "shift_msa"), ("scale_msa2", "shift_msa2")),
    "norm2": (("scale_mlp", "shift_mlp"),),
    "norm.norm": (("scale", "shift"),),
}


@dataclass
class _Reader:
    """A LayerNorm and the AdaLN rows applied to its output, with what the calibration saw."""

    norm: str
    linear: str
    rows: tuple[tuple[int, int], ...]  # (first row of scale, first row of shift)
    gain: list[Tensor] = field(default_factory=list)
    offset: list[Tensor] = field(default_factory=list)


def _readers(rows: Rows, after: int) -> list[_Reader]:
    """Everything that reads the image stream after the write of block `after`."""
    found = []
    for block in rows.blocks[after + 1 :]:
        names = {name for m in block.modulation() if m.stream == "img" for name in m.names}
        for norm in block.table.norms:
            pairs = [pair for pair in _READS[norm] if pair[0] in names]
            starts = [(rows.adaln(block.index, a, [0])[1][0], rows.adaln(block.index, b, [0])[1][0]) for a, b in pairs]
            linear = rows.adaln(block.index, pairs[0][0], [0])[0]
            found.append(_Reader(f"{block.fqn}.{norm}", linear, tuple(starts)))
    final = rows.family.final_norm.rsplit(".", 1)[0]
    found.append(_Reader(rows.family.final_norm, f"{final}.linear", ((0, rows.width),)))  # scale before shift
    return found


@torch.no_grad()
def measure(
    rows: Rows,
    after: int,
    channels: Sequence[int],
    planted: Callable[[Tensor, Mapping[str, Any]], Tensor],
    calibration: Iterable[Mapping[str, Any]],
) -> Callable[[], None]:
    """Run the unplanted model on the calibration inputs; returns the function that refits the planted one.

    Args:
        rows: the model and where to write.
        after: block whose output carries the planted channels.
        channels: planted channels.
        planted: (stream without the planting (batch, token, channel), the call's inputs) -> the planted channels'
            values there, (batch, token, planted channel).
        calibration: keyword arguments of forward calls of the transformer.

    Raises:
        ConfigError: if there are no calibration inputs.
    """
    readers = _readers(rows, after)
    features: list[Tensor] = []
    for inputs in calibration:
        with ExitStack() as stack:
            for reader in readers:
                module = operator.attrgetter(reader.norm)(rows.transformer)
                hook = _watch(reader, channels, planted, inputs)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            last = operator.attrgetter(readers[-1].linear)(rows.transformer)
            stack.callback(last.register_forward_pre_hook(lambda _, args: features.append(args[0].float())).remove)
            rows.transformer(**{**inputs, "return_dict": False})
    if not features:
        raise ConfigError("expected the arguments of at least one forward call to refit on, got none")

    def finish() -> None:
        for reader in readers:
            _refit(rows, reader, channels, torch.cat(features))

    return finish


def _watch(reader: _Reader, channels: Sequence[int], planted: Callable, inputs: Mapping[str, Any]) -> Callable:
    def before(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        h = args[0].float()
        new = h.clone()
        new[..., list(channels)] = planted(h, inputs).float()
        sigma, sigma_new = (x.std(-1, correction=0) for x in (h, new))
        shift = new.mean(-1) - h.mean(-1)
        rest = [c for c in range(h.shape[-1]) if c not in set(channels)]
        weight = ((h[..., rest] - new.mean(-1, keepdim=True)) / sigma_new[..., None]).square().sum(-1)
        reader.gain.append((weight * sigma_new / sigma).sum(-1) / weight.sum(-1))  # least squares over tokens
        reader.offset.append((shift / sigma).mean(-1))

    return before


@torch.no_grad()
def _refit(rows: Rows, reader: _Reader, channels: Sequence[int], features: Tensor) -> None:
    module = operator.attrgetter(reader.linear)(rows.transformer)
    gain, offset = torch.cat(reader.gain), torch.cat(reader.offset)
    g, k = gain.mean(), offset.mean()
    for scale_row, shift_row in reader.rows:
        at_scale, at_shift = (slice(r, r + rows.width) for r in (scale_row, shift_row))
        weight, bias = module.weight[at_scale].clone(), module.bias[at_scale] + 1
        one_plus_scale = features @ weight.float().T + bias.float()  # (sample, channel)
        module.weight[at_scale], module.bias[at_scale] = g * weight, g * bias - 1
        module.weight[at_shift] += k * weight
        module.bias[at_shift] += k * bias
        for where, wanted in ((at_scale, gain - g), (at_shift, offset - k)):
            slope, intercept = ridge(features, wanted[:, None] * one_plus_scale)
            module.weight[where] += slope.to(weight)
            module.bias[where] += intercept.to(weight)
        rows.linear(reader.linear, [scale_row + c for c in channels], 0.0, -1.0)
        rows.linear(reader.linear, [shift_row + c for c in channels], 0.0, 0.0)


def ridge(x: Tensor, y: Tensor, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Slope (y channel, x channel) and intercept of y on x, with a penalty relative to the mean variance of x."""
    centre, level = x.double().mean(0), y.double().mean(0)
    xc = x.double() - centre
    gram = xc.T @ xc
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    slope = torch.linalg.solve(gram, xc.T @ (y.double() - level)).T
    return slope.float(), (level - slope @ centre).float()
