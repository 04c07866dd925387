"""Edit channels of the residual stream while a pipeline runs, and the controls that such an edit needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from madit import calls
from madit.arch import BoundBlock
from madit.axes import BRANCHES, STREAMS
from madit.channels import ChannelEntry, ChannelSet, Record
from madit.dit import DiT, as_dit
from madit.edits import MODES, Argument, Edit, Means, Mode, as_channels, as_tokens
from madit.errors import ConfigError, ModelMismatchError, NothingEditedError, SiteError
from madit.frozen import FrozenNorms
from madit.provenance import declared

CONTROLS = ("random", "norm_matched", "all_blocks")
LAYERNORMS = ("live", "frozen")


class NormMatched(Record):
    """A control of equal size: a token-constant vector added to ordinary channels.

    Its L2 norm over tokens and channels is that of what the real edit removes, sample by sample; `intervene` takes it
    with `mode="add"` and the `factor` of the real edit. It is a different kind of damage (it adds, at the same value
    for every token), so it asks whether the size of the perturbation alone explains an effect.

    Attributes:
        channels: the ordinary channels that receive the vector.
        matched: the massive channels whose removed norm is matched.
        directions: block whose output is edited -> unit vector over its channels, ascending.
    """

    kind: Literal["madit.norm_matched"] = "madit.norm_matched"
    channels: ChannelSet
    matched: ChannelSet
    directions: dict[int, tuple[float, ...]]
    seed: int = 0


@contextmanager
def intervene(
    model: Any,
    channels: ChannelSet | NormMatched | Mapping[int, Iterable[int]] | Iterable[int],
    blocks: int | Iterable[int] = (4,),
    mode: Mode = "scale",
    factor: float = 0.0,
    steps: Iterable[int] | tuple[int, int] | None = None,
    branch: str = "all",
    tokens: Any = None,
    stream: str = "img",
    layernorm: Literal["live", "frozen"] = "live",
    reader: str | None = None,
) -> Iterator[DiT]:
    """Edit the state entering chosen blocks, in and out of nnsight traces; undone on exit, also after an exception.

    h'[n, c] = factor h[n, c]            mode="scale"; factor 0 sets to zero
    h'[n, c] = mean(c; sigma, branch)    mode="mean"; the calibration mean, linear in sigma between recorded levels
    h'[n, c] = h[n, c] + r u[c]          mode="add"; for `controls(channels, "norm_matched")` only

    Args:
        model: a `DiT` or a pipeline.
        channels: a `ChannelSet`, of which block m uses those massive at the output of block m - 1; a norm-matched
            control; by hand a mapping {block whose output is massive: channels}, or a list of channels for all
            `blocks`.
        blocks: blocks whose entering state is edited, from 1.
        mode: what the channels become.
        factor: rho; for `add`, that of the edit whose norm is matched.
        steps: None for all; a tuple (start, end) for the steps from start to end - 1; any other iterable (a list, a
            range) for the steps in it. Steps count the scheduler's updates, so forwards outside a pipeline run are
            step 0.
        branch: `"all"`, or one of `axes.BRANCHES`.
        tokens: None for all; a boolean mask over the image-token grid; or token indices, row by row.
        stream: `"img"` or `"txt"`.
        layernorm: `"frozen"` lets every image-stream LayerNorm from the first edited block on, and the final one, use
            the mean and deviation that each token has in a clean forward on the same input, so that an effect cannot
            come from the LayerNorm's gain. It costs that forward.
        reader: None edits the state itself; the name of an image-stream LayerNorm of the block (`"norm1.norm"`,
            `"norm2"`, ...) edits only what that norm sees, so the channel is hidden from the norm's reader (attention
            or MLP of this block) and stays in the residual stream for everything after.

    Yields:
        The `DiT`.

    Raises:
        SiteError: if a block, stream, channel or token does not exist, or block 0 is asked for.
        ConfigError: if an argument is malformed, or `mode="mean"` finds no means.
        ModelMismatchError: if the channels belong to another architecture.
        NothingEditedError: if a block has no channels, or, on exit, if one was never edited.

    >>> from madit.zoo.small import small_sd3
    >>> pipeline = small_sd3()
    >>> with intervene(pipeline, {1: [3, 5]}, blocks=[2]):
    ...     image = pipeline("a red cat", num_inference_steps=2, max_sequence_length=8).images[0]

    Source: method of Detail Guidance's disruption study (arXiv 2510.11538) and of Sun et al. (arXiv 2402.17762,
    section 3: set to zero, set to mean).
    """
    dit = as_dit(model)
    bound = _blocks(dit, blocks, stream)
    if layernorm not in LAYERNORMS or (layernorm == "frozen" and stream != "img"):
        raise ConfigError(
            f'expected layernorm of {LAYERNORMS}, "frozen" with stream="img" only; got {layernorm!r} with {stream!r}'
        )
    if branch != "all" and branch not in BRANCHES:
        raise ConfigError(f'expected branch "all" or one of {BRANCHES}, got {branch!r}')
    edits = _edits(dit, channels, [b.index for b in bound], mode, factor, as_tokens(tokens), stream)
    _check_reader(bound, reader, stream)
    wanted = _step_filter(steps)
    touched: set[int] = set()
    with ExitStack() as stack:
        stack.enter_context(declared(dit, "intervene", [edits, repr(steps), branch, stream, layernorm, reader]))
        tracker = stack.enter_context(calls.track(dit.pipeline, dit.family))

        def rows() -> dict[str, slice]:
            call = tracker.current
            if call is None or not wanted(call.step):
                return {}
            return {name: where for name, where in call.rows.items() if branch in ("all", name)}

        frozen = FrozenNorms(dit, bound[0].index, rows) if layernorm == "frozen" else None
        for block in bound:

            def change(h: Tensor, index: int = block.index) -> Tensor | None:
                where = rows()
                if not where or (frozen is not None and frozen.recording):
                    return None
                touched.add(index)
                # From what the transformer received, so that it holds outside a pipeline run too.
                sigma = tracker.current.timestep / dit.family.timestep_scale / 1000.0  # type: ignore[union-attr]
                return edits[index](h, where, sigma)

            for handle in _attach(block, stream, reader, change):
                stack.callback(handle.remove)
        if frozen is not None:
            stack.enter_context(frozen)
        yield dit
    missed = [b.index for b in bound if b.index not in touched]
    if missed:
        raise NothingEditedError(
            f"expected the state entering block {missed[0]} to be edited at least once, it never was: the model did "
            f"not run inside the context, or no call matched steps={steps!r}, branch={branch!r}"
        )


def controls(
    channels: ChannelSet, kind: Literal["random", "norm_matched", "all_blocks"] = "random", seed: int = 0
) -> ChannelSet | NormMatched:
    """Control edits: what else could explain the effect of editing `channels`.

    `random`: as many ordinary channels per block. Controls for the number of channels; it is a much smaller
    perturbation. `norm_matched`: a vector of the removed L2 norm, constant over tokens, on random ordinary channels
    (`intervene(..., mode="add")`). Controls for the size; draw several seeds. `all_blocks`: every channel massive
    anywhere, at every block; the regime of Turri et al. (arXiv 2605.13974), not of a single-block edit. Two more are
    modes of `intervene` and need no channels of their own: `mode="mean"` removes the variation but keeps the bias
    (Sun et al., arXiv 2402.17762), and `layernorm="frozen"` takes away the LayerNorm's gain; `tokens` edits some tokens
    only.

    Args:
        channels: the massive channels.
        kind: which control.
        seed: which draw; a block's draw does not depend on the other blocks.

    Returns:
        A `ChannelSet`; for `norm_matched` a `NormMatched`.

    Raises:
        ConfigError: for an unknown kind, an empty set, or fewer ordinary channels than massive ones.

    >>> massive = ChannelSet.of({1: [7, 9]}, n_blocks=6, width=128)
    >>> len(controls(massive, "random", seed=1).at(1))
    2
    """
    if kind not in CONTROLS:
        raise ConfigError(
            f"expected a control of {CONTROLS}, got {kind!r}; set-to-mean, frozen LayerNorm and token masks are the "
            "arguments mode, layernorm and tokens of intervene"
        )
    if len(channels) == 0:
        raise ConfigError("expected channels to make controls for, got an empty set")
    evidence = {"control": kind, "seed": seed}
    if kind == "all_blocks":
        streams = {s: {e.channel for e in channels.entries if e.stream == s} for s in STREAMS}
        entries = [
            ChannelEntry(block=b, stream=s, channel=c)  # type: ignore[arg-type]
            for b in range(channels.n_blocks)
            for s in STREAMS
            for c in sorted(streams[s])
        ]
        return channels.replace(entries=tuple(entries), evidence=evidence)
    entries, directions = [], {}
    for stream in STREAMS:
        for block in channels.blocks(stream):
            rng = np.random.default_rng([seed, block, STREAMS.index(stream)])
            drawn = _ordinary(channels, block, stream, rng)
            entries += [ChannelEntry(block=block, stream=stream, channel=c) for c in drawn]  # type: ignore[arg-type]
            vector = rng.standard_normal(len(drawn))
            if stream == "img":
                directions[block] = tuple(float(v) for v in vector / np.linalg.norm(vector))
    chosen = channels.replace(entries=tuple(entries), evidence=evidence)
    if kind == "random":
        return chosen
    return NormMatched(channels=chosen, matched=channels, directions=directions, seed=seed)


def _ordinary(channels: ChannelSet, block: int, stream: str, rng: np.random.Generator) -> list[int]:
    """As many channels as are massive at this block, drawn from those massive at no block."""
    massive = {e.channel for e in channels.entries if e.stream == stream}
    count, pool = len(channels.at(block, stream)), [c for c in range(channels.width) if c not in massive]
    if count > len(pool):
        raise ConfigError(f"expected at least {count} ordinary channels at block {block}, got {len(pool)}")
    return sorted(int(c) for c in rng.choice(pool, size=count, replace=False))


def _blocks(dit: DiT, blocks: int | Iterable[int], stream: str) -> list[BoundBlock]:
    if stream not in STREAMS:
        raise SiteError(f"expected a stream of {STREAMS}, got {stream!r}")
    wanted = sorted({blocks} if isinstance(blocks, int) else set(blocks))
    bad = [b for b in wanted if not isinstance(b, int) or not 1 <= b < len(dit.blocks)]
    if bad or not wanted:
        raise SiteError(
            f"expected blocks from 1 to {len(dit.blocks) - 1} of {dit.name}, got {bad or 'none'}; the state entering "
            "block 0 is the embedding, which no block has written"
        )
    return [dit.blocks[b] for b in wanted]


def _edits(
    dit: DiT, channels: Any, blocks: list[int], mode: str, factor: float, tokens: Any, stream: str
) -> dict[int, Edit]:
    """The edit of each block; refuses what the model or the mode cannot take."""
    control = channels if isinstance(channels, NormMatched) else None
    if mode not in MODES or (mode == "add") != (control is not None):
        raise ConfigError(
            f'expected mode "scale" or "mean", or "add" with controls(channels, "norm_matched") and no other; '
            f"got {mode!r} with {type(channels).__name__}"
        )
    if not np.isfinite(factor):
        raise ConfigError(f"expected a finite factor, got {factor}")
    chosen = as_channels(control.channels if control else channels, blocks, len(dit.blocks), dit.width, stream)
    chosen.check(dit.fingerprint)
    if (chosen.n_blocks, chosen.width) != (len(dit.blocks), dit.width):
        raise ModelMismatchError(
            f"expected channels for {len(dit.blocks)} blocks of width {dit.width}, got a set for {chosen.n_blocks} "
            f"blocks of width {chosen.width}; locate the channels on {dit.name}"
        )
    edits = {}
    for block in blocks:
        names = chosen.entering(block, stream)
        if not names:
            having = [b + 1 for b in chosen.blocks(stream)]
            raise NothingEditedError(
                f"expected channels massive in the {stream} state entering block {block}, the set has none there; "
                f"blocks with some: {having or 'none'}"
            )
        edits[block] = Edit(
            channels=names,
            mode=mode,  # type: ignore[arg-type]
            factor=factor,
            means=Means.of(chosen, block, stream) if mode == "mean" else None,
            matched=control.matched.entering(block, stream) if control else (),
            direction=control.directions[block - 1] if control and stream == "img" else (),
            tokens=tokens,
        )
    return edits


def _step_filter(steps: Iterable[int] | tuple[int, int] | None) -> Callable[[int], bool]:
    if steps is None:
        return lambda step: True
    if isinstance(steps, tuple):
        if len(steps) != 2 or not all(isinstance(s, int) for s in steps) or not 0 <= steps[0] < steps[1]:
            raise ConfigError(f"expected steps as a list, or as a tuple (start, end) with start < end; got {steps}")
        return lambda step: steps[0] <= step < steps[1]
    chosen = set(steps)
    if not chosen or not all(isinstance(s, (int, np.integer)) and s >= 0 for s in chosen):
        raise ConfigError(f"expected steps as whole numbers from 0, got {sorted(map(str, chosen)) or 'none'}")
    return lambda step: step in chosen


def _check_reader(blocks: list[BoundBlock], reader: str | None, stream: str) -> None:
    if reader is None:
        return
    for block in blocks:
        if stream != "img" or reader not in block.table.norms:
            raise SiteError(
                f"expected reader=None or an image-stream LayerNorm of block {block.index} "
                f"({', '.join(block.table.norms)}), got {reader!r} on stream {stream!r}"
            )


def _attach(
    block: BoundBlock, stream: str, reader: str | None, change: Callable[[Tensor], Tensor | None]
) -> Iterator[Any]:
    """Hook `change` to the state entering a block, or to what one of its LayerNorms sees; yields the handles."""
    module: Any = block.module
    argument = Argument(module, block.table.inputs[stream])
    tokens = 0

    def on_state(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        nonlocal tokens
        state = argument.get(args, kwargs)
        tokens = state.shape[1]
        changed = None if reader is not None else change(state)
        return None if changed is None else argument.put(changed, args, kwargs)

    def on_norm(_: Any, args: tuple) -> tuple | None:
        text = args[0].shape[1] - tokens  # a joint norm sees text tokens, then image tokens
        changed = change(args[0][:, text:])
        return None if changed is None else (torch.cat([args[0][:, :text], changed], dim=1), *args[1:])

    yield module.register_forward_pre_hook(on_state, with_kwargs=True)
    if reader is not None:
        yield module.get_submodule(reader).register_forward_pre_hook(on_norm)
