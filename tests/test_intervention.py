from __future__ import annotations

import numpy as np
import pytest
import torch
from editing import MAKERS, all_blocks, hooks, inputs, is_flux, run
from torch import nn

from madit import DiT, controls, intervene
from madit.channels import ChannelEntry, ChannelSet
from madit.errors import ConfigError, ModelMismatchError, NothingEditedError, SiteError
from madit.intervention import NormMatched
from madit.zoo.small import small_flux, small_sd3


class ByHand:
    """A second implementation: a plain hook on a block, `change(h, number of the call)`."""

    def __init__(self, block: nn.Module, change, argument: str = "hidden_states"):
        self.calls = 0

        def hook(module, args, kwargs):
            h = change(kwargs[argument].clone(), self.calls)
            self.calls += 1
            return args, {**kwargs, argument: h}

        self.handle = block.register_forward_pre_hook(hook, with_kwargs=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.fixture(scope="module", params=MAKERS)
def pipeline(request):
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def sd3():
    return small_sd3()


def set_of(pipeline, channels, sigma=(), means=None) -> ChannelSet:
    dit = DiT(pipeline)
    entries = tuple(
        ChannelEntry(block=b, channel=c, means={} if means is None else means(c))
        for b, cs in channels.items()
        for c in cs
    )
    return ChannelSet(model=dit.fingerprint, n_blocks=len(dit.blocks), width=dit.width, sigma=sigma, entries=entries)


def test_scale_is_what_a_plain_hook_does(pipeline):
    for block in (1, 3):  # for Flux a dual- and a single-stream block

        def change(h, call):
            h[..., [3, 5]] *= -7.0
            return h

        with ByHand(all_blocks(pipeline)[block], change):
            expected = run(pipeline, cfg=3.0)
        with intervene(pipeline, set_of(pipeline, {block - 1: [3, 5]}), blocks=[block], factor=-7.0):
            edited = run(pipeline, cfg=3.0)
        assert torch.equal(edited, expected)
        assert not torch.allclose(edited, run(pipeline, cfg=3.0), atol=1e-3)


def test_only_the_chosen_steps_tokens_and_branch(pipeline):
    calls_per_step = 2 if is_flux(pipeline) else 1

    def change(h, call):
        if call // calls_per_step == 1:
            rows = slice(None) if is_flux(pipeline) else slice(1, 2)
            if not is_flux(pipeline) or call % 2 == 0:
                h[rows, 8:16, 5] = 40.0 * h[rows, 8:16, 5]
        return h

    with ByHand(all_blocks(pipeline)[2], change):
        expected = run(pipeline, steps=3, cfg=3.0)
    mask = np.zeros((8, 8), dtype=bool)
    mask[1] = True
    chosen = {"blocks": 2, "factor": 40.0, "branch": "cond"}
    for tokens in (mask, list(range(8, 16))):
        for steps in ([1], (1, 2)):
            with intervene(pipeline, [5], tokens=tokens, steps=steps, **chosen):
                assert torch.equal(run(pipeline, steps=3, cfg=3.0), expected)
    assert not torch.equal(expected, run(pipeline, steps=3, cfg=3.0))


def test_text_stream(sd3):
    def change(h, call):
        h[..., 4] = 0
        return h

    with ByHand(sd3.transformer.transformer_blocks[2], change, "encoder_hidden_states"):
        expected = run(sd3)
    with intervene(sd3, ChannelSet.of({1: [4]}, 4, 32, stream="txt"), blocks=[2], stream="txt"):
        assert torch.equal(run(sd3), expected)


def test_mean_is_interpolated_over_sigma_per_branch(pipeline):
    sigma = (1.0, 0.8, 0.0)
    tables = {"cond": (10.0, 20.0, 60.0), "uncond": (-10.0, None, -60.0)}

    def value(branch, s):
        if branch == "cond":
            return np.interp(s, [0, 0.8, 1], [60, 20, 10])
        return np.interp(s, [0, 1], [-60, -10])

    channels = set_of(
        pipeline, {1: [3, 5]}, sigma, lambda c: {b: tuple(v and v + c for v in t) for b, t in tables.items()}
    )
    levels = []

    def change(h, call):
        if is_flux(pipeline):
            s = levels[call // 2]
            h[..., [3, 5]] = torch.tensor([value(("cond", "uncond")[call % 2], s) + c for c in (3, 5)], dtype=h.dtype)
        else:
            for row, branch in enumerate(("uncond", "cond")):
                h[row, :, [3, 5]] = torch.tensor([value(branch, levels[call]) + c for c in (3, 5)], dtype=h.dtype)
        return h

    run(pipeline, steps=3)
    levels += [float(s) for s in pipeline.scheduler.sigmas[:3]]
    with ByHand(all_blocks(pipeline)[2], change):
        expected = run(pipeline, steps=3, cfg=3.0)
    with intervene(pipeline, channels, blocks=[2], mode="mean"):
        torch.testing.assert_close(run(pipeline, steps=3, cfg=3.0), expected, rtol=1e-5, atol=1e-5)


def test_several_blocks_use_their_own_channels(sd3):
    def zero(channel):
        def change(h, call):
            h[..., channel] = 0
            return h

        return change

    blocks = sd3.transformer.transformer_blocks
    with ByHand(blocks[1], zero(7)), ByHand(blocks[3], zero(9)):
        expected = run(sd3)
    with intervene(sd3, {0: [7], 2: [9]}, blocks=[1, 3]):
        assert torch.equal(run(sd3), expected)


def test_a_trace_sees_the_edit(pipeline):
    dit = DiT(pipeline)
    model = dit.model
    name = dit.blocks[2].fqn
    kwargs = {"height": 32, "width": 32} if is_flux(pipeline) else {"guidance_scale": 1.0}

    def state():
        with model.generate(
            "a cat",
            num_inference_steps=1,
            max_sequence_length=8,
            output_type="latent",
            **kwargs,
            generator=torch.Generator().manual_seed(0),
        ):
            entering = model.get(f"transformer.{name}").inputs.save()
            after = model.get(f"transformer.{name}").output.save()
        return entering[1]["hidden_states"], after[1]

    clean_in, clean_out = state()
    for layernorm in ("live", "frozen"):
        with intervene(dit, [3], blocks=[2], factor=0.0, layernorm=layernorm):
            edited_in, edited_out = state()
        assert torch.all(edited_in[..., 3] == 0)
        assert torch.equal(edited_in[..., :3], clean_in[..., :3])
        assert not torch.allclose(edited_out, clean_out, atol=1e-4)
    assert torch.equal(state()[1], clean_out)


def test_undone_on_exit_and_after_an_exception(pipeline):
    def fail(pipeline, step, timestep, state):
        raise RuntimeError("NaN")

    clean, before, scheduler = run(pipeline), hooks(pipeline.transformer), dict(vars(pipeline.scheduler))
    for layernorm in ("live", "frozen"):
        with (
            pytest.raises(RuntimeError, match="NaN"),
            intervene(pipeline, [3], blocks=[2], factor=9.0, layernorm=layernorm),
        ):
            run(pipeline, callback_on_step_end=fail)
        assert hooks(pipeline.transformer) == before
        assert not {"step", "set_timesteps"} & (set(vars(pipeline.scheduler)) - set(scheduler))
        assert torch.equal(run(pipeline), clean)


def test_an_edit_that_touches_nothing_raises(sd3):
    with pytest.raises(NothingEditedError, match="block 2"), intervene(sd3, [3], blocks=[2]):
        pass
    with pytest.raises(NothingEditedError, match=r"steps=\[7\]"), intervene(sd3, [3], blocks=[2], steps=[7]):
        run(sd3)
    with pytest.raises(NothingEditedError, match="uncond"), intervene(sd3, [3], blocks=[2], branch="uncond"):
        run(sd3, cfg=1.0)
    with pytest.raises(KeyError, match="mine"), intervene(sd3, [3], blocks=[2]):  # the first error is the one to see
        raise KeyError("mine")


def test_frozen_layernorm_is_the_clean_statistics_by_hand(pipeline):
    t = pipeline.transformer
    single = getattr(t, "single_transformer_blocks", ())
    norms = [m for b in t.transformer_blocks[2:] for m in (b.norm1.norm, b.norm2)]
    norms += [b.norm.norm for b in single] + [t.norm_out.norm]
    clean: dict[nn.Module, torch.Tensor] = {}
    handles = [m.register_forward_hook(lambda m, a, o: clean.__setitem__(m, a[0].double())) for m in norms]
    unedited = t(**inputs(pipeline))[0]
    for h in handles:
        h.remove()

    def frozen(m, args, output):
        joint = any(m is b.norm.norm for b in single)
        x, c = args[0].double(), clean[m]
        y = (x - c.mean(-1, keepdim=True)) / (c.std(-1, unbiased=False, keepdim=True).square() + m.eps).sqrt()
        return torch.cat([output[:, :5], y[:, 5:].float()], 1) if joint else y.float()

    def change(h, call):
        h[..., 3] *= 30.0
        return h

    handles = [m.register_forward_hook(frozen) for m in norms]
    with ByHand(all_blocks(pipeline)[2], change):
        expected = t(**inputs(pipeline))[0]
    for h in handles:
        h.remove()
    with intervene(pipeline, [3], blocks=[2], factor=30.0, layernorm="frozen"):
        edited = t(**inputs(pipeline))[0]
    torch.testing.assert_close(edited, expected, rtol=1e-4, atol=1e-5)
    with intervene(pipeline, [3], blocks=[2], factor=30.0):
        live = t(**inputs(pipeline))[0]
    assert not torch.allclose(live, expected, atol=1e-2)
    assert not torch.allclose(unedited, expected, atol=1e-2)


def test_hidden_from_one_reader_only(pipeline):
    """A hook on the norm's input by hand; the residual stream itself keeps the channel."""
    for index, reader in ((1, "norm1.norm"), (1, "norm2"), (3, "norm.norm" if is_flux(pipeline) else "norm2")):
        block = all_blocks(pipeline)[index]
        norm = block.get_submodule(reader)
        joint = reader == "norm.norm"

        def hide(module, args, joint=joint):
            x = args[0].clone()
            x[:, 5 if joint else 0 :, 3] *= 30.0
            return (x,)

        handle = norm.register_forward_pre_hook(hide)
        expected = pipeline.transformer(**inputs(pipeline))[0]
        handle.remove()
        with intervene(pipeline, [3], blocks=[index], factor=30.0, reader=reader):
            assert torch.equal(pipeline.transformer(**inputs(pipeline))[0], expected)
        with intervene(pipeline, [3], blocks=[index], factor=30.0):
            assert not torch.allclose(pipeline.transformer(**inputs(pipeline))[0], expected, atol=1e-3)


def test_frozen_layernorm_reads_the_clean_run_once_per_call_of_the_pipeline(pipeline):
    with intervene(pipeline, [3], blocks=[2], factor=1.0, layernorm="frozen"):
        identity = run(pipeline, steps=3, cfg=3.0)
    torch.testing.assert_close(identity, run(pipeline, steps=3, cfg=3.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (SiteError, "block 0 is the embedding", {"blocks": [0]}),
        (SiteError, "from 1 to 3", {"blocks": [4]}),
        (SiteError, "from 1 to 3", {"blocks": []}),
        (SiteError, "stream", {"stream": "audio"}),
        (ConfigError, "mode", {"mode": "square"}),
        (ConfigError, "norm_matched", {"mode": "add"}),
        (ConfigError, "means", {"mode": "mean"}),
        (ConfigError, "layernorm", {"layernorm": "cold"}),
        (ConfigError, "layernorm", {"layernorm": "frozen", "stream": "txt"}),
        (ConfigError, "branch", {"branch": "left"}),
        (SiteError, r"norm1.norm, norm2\), got 'norm9'", {"reader": "norm9"}),
        (ConfigError, "finite", {"factor": float("nan")}),
        (ConfigError, "steps", {"steps": (3, 1)}),
        (ConfigError, "steps", {"steps": (1, 2, 3)}),
        (ConfigError, "steps", {"steps": []}),
        (ConfigError, "tokens", {"tokens": [0.5]}),
        (ConfigError, "token mask", {"tokens": [False, False]}),
        (ConfigError, "from 0", {"tokens": [-1]}),
        (NothingEditedError, r"blocks with some: \[2\]", {"blocks": [3]}),
    ],
)
def test_refusals(sd3, error, match, arguments):
    with pytest.raises(error, match=match), intervene(sd3, {1: [3]}, **{"blocks": [2], **arguments}):
        run(sd3)


def test_tokens_that_do_not_fit_the_picture(sd3):
    for tokens, match in (([64], "below 64"), (np.ones((4, 4), dtype=bool), r"shape \(4, 4\)")):
        with pytest.raises(SiteError, match=match), intervene(sd3, [3], blocks=[2], tokens=tokens):
            run(sd3)


def test_channels_of_another_model_are_refused(sd3):
    other = small_flux()
    with (
        pytest.raises(ModelMismatchError, match="FluxTransformer2DModel"),
        intervene(sd3, set_of(other, {1: [3]}), blocks=[2]),
    ):
        run(sd3)
    with (
        pytest.raises(ModelMismatchError, match="width 64"),
        intervene(sd3, ChannelSet.of({1: [3]}, 4, 64), blocks=[2]),
    ):
        run(sd3)


def test_random_controls_are_ordinary_and_seeded():
    massive = ChannelSet.of({1: [7, 9], 2: [7, 9, 11]}, n_blocks=6, width=16)
    drawn = [controls(massive, "random", seed=s) for s in range(20)]
    for c in drawn:
        assert [len(c.at(b)) for b in range(6)] == [0, 2, 3, 0, 0, 0]
        assert not {e.channel for e in c.entries} & {7, 9, 11}
    assert len({c.at(2) for c in drawn}) > 5
    assert controls(massive, "random", seed=3) == drawn[3]
    assert controls(massive.select(blocks=[2]), "random", seed=3).at(2) == drawn[3].at(2)
    everywhere = controls(massive, "all_blocks")
    assert [everywhere.at(b) for b in range(6)] == [(7, 9, 11)] * 6


def test_controls_refuse_what_they_cannot_give():
    massive = ChannelSet.of({1: [0, 1]}, n_blocks=4, width=3)
    with pytest.raises(ConfigError, match="at least 2 ordinary"):
        controls(massive)
    with pytest.raises(ConfigError, match="arguments mode, layernorm"):
        controls(massive, "mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="empty"):
        controls(ChannelSet.of({}, 4, 3))


def test_norm_matched_adds_the_removed_norm_per_sample(pipeline):
    """On a batch of two samples with different norms, at a factor that is not zero."""
    massive = set_of(pipeline, {1: [3, 5]})
    control = controls(massive, "norm_matched", seed=2)
    assert isinstance(control, NormMatched)
    states = []
    block = all_blocks(pipeline)[2]
    capture = lambda m, a, k: states.append(k["hidden_states"])  # noqa: E731
    arguments = inputs(pipeline, rows=2)
    handle = block.register_forward_pre_hook(capture, with_kwargs=True)
    pipeline.transformer(**arguments)
    handle.remove()
    with intervene(pipeline, control, blocks=[2], mode="add", factor=0.25):
        handle = block.register_forward_pre_hook(capture, with_kwargs=True)
        pipeline.transformer(**arguments)
        handle.remove()
    clean, edited = states
    added = edited - clean
    removed = 0.75 * clean[..., [3, 5]]
    torch.testing.assert_close(added.flatten(1).norm(dim=1), removed.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-4)
    assert set(added.abs().sum((0, 1)).nonzero().flatten().tolist()) == set(control.channels.at(1))
    torch.testing.assert_close(added, added[:, :1].expand_as(added), rtol=1e-4, atol=1e-5)


def test_a_list_and_a_mapping_say_the_same(sd3):
    with intervene(sd3, [3, 5], blocks=2):
        a = run(sd3)
    with intervene(sd3, {1: [5, 3]}, blocks=[2]):
        assert torch.equal(run(sd3), a)
