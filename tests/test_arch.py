from __future__ import annotations

import operator

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch.testing import assert_close

from madit import DiT, arch
from madit.errors import SiteError, UnknownFamilyError
from madit.zoo.small import small_sd3
from tests.conformance.planted import FAMILIES, forward_inputs

# transformer/config.json of the hub repositories named; the same numbers follow from diffusers'
# scripts/convert_sd3_to_diffusers.py (heads = layers, 64 channels each) and black-forest-labs/flux `util.py`.
_SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
}  # fmt: skip
FULL_SIZE = {
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        SD3Transformer2DModel,
        {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "pos_embed_max_size": 192},
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        SD3Transformer2DModel,
        {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        SD3Transformer2DModel,
        {**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    ),
    "black-forest-labs/FLUX.1-dev": (
        FluxTransformer2DModel,
        {"patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
         "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
         "guidance_embeds": True, "axes_dims_rope": (16, 56, 56)},
    ),
}  # fmt: skip
# A joint block has 2 states before, 6 + 6 AdaLN parameters, 2 + 2 updates and 2 states after: 20 sites. Dual attention
# adds 3 parameters and an update. SD3's last block has 2 text parameters, no text update and no text state after: 13.
# A Flux single block: 2 before, 3 parameters, the update in each stream, 2 after: 9.
EXPECTED = {  # family, width, blocks, sites
    "stabilityai/stable-diffusion-3-medium-diffusers": ("sd3", 1536, 24, 23 * 20 + 13),
    "stabilityai/stable-diffusion-3.5-medium": ("sd3", 1536, 24, 13 * 24 + 10 * 20 + 13),
    "stabilityai/stable-diffusion-3.5-large": ("sd3", 2432, 38, 37 * 20 + 13),
    "black-forest-labs/FLUX.1-dev": ("flux", 3072, 57, 19 * 20 + 38 * 9),
}


class Holder:
    """A pipeline as far as `DiT` looks."""

    def __init__(self, transformer):
        self.transformer = transformer


@pytest.mark.parametrize("name", FULL_SIZE)
def test_tables_fit_the_full_size_models(name):
    cls, config = FULL_SIZE[name]
    with torch.device("meta"):
        dit = DiT(Holder(cls(**config)), name=name)
    family, width, blocks, sites = EXPECTED[name]
    assert (dit.family.name, dit.width, len(dit.blocks), len(dit.sites())) == (family, width, blocks, sites)
    assert len(set(dit.sites())) == sites
    assert [b.index for b in dit.blocks] == list(range(blocks))
    for block in dit.blocks:
        assert (
            operator.attrgetter(block.fqn.split(".")[0])(dit.transformer)[int(block.fqn.split(".")[1])] is block.module
        )
        for m in block.modulation():
            linear = operator.attrgetter(m.module)(block.module)
            assert linear.out_features == len(m.names) * width
        for norm in block.table.norms:
            layer = operator.attrgetter(norm)(block.module)
            assert isinstance(layer, nn.LayerNorm)
            assert not layer.elementwise_affine
    for path in (dit.family.embed, dit.family.final_norm):
        assert isinstance(operator.attrgetter(path)(dit.transformer), nn.Module)


def test_sites_of_special_blocks():
    with torch.device("meta"):
        cls, config = FULL_SIZE["stabilityai/stable-diffusion-3.5-medium"]
        dit = DiT(Holder(cls(**config)))
    assert "blocks.12.img.gate_msa2" in dit.sites()
    assert "blocks.12.img.update_msa2" in dit.sites()
    assert "blocks.13.img.update_msa2" not in dit.sites()
    last = [s for s in dit.sites() if s.startswith("blocks.23.txt")]
    assert last == ["blocks.23.txt.resid_pre", "blocks.23.txt.scale_msa", "blocks.23.txt.shift_msa"]
    with pytest.raises(SiteError, match="24 blocks"):
        dit.site("blocks.24.img.resid_post")
    with pytest.raises(SiteError, match="update_msa2"):
        dit.site("blocks.13.img.update_msa2")


def watch(pipeline):
    """Run one forward; inputs and outputs of every module in and around the blocks, by name."""
    seen = {}
    handles = []
    for name, module in pipeline.transformer.named_modules():

        def after(m, args, kwargs, out, name=name):
            seen[name] = (args, kwargs, out)

        handles.append(module.register_forward_hook(after, with_kwargs=True))
    with torch.no_grad():
        pipeline.transformer(**forward_inputs(pipeline))
    for handle in handles:
        handle.remove()
    return seen


def parameters_of(seen, block):
    """AdaLN parameters as the table names them: (stream, name) -> (batch, 1, channel)."""
    found = {}
    for m in block.modulation():
        chunks = seen[f"{block.fqn}.{m.module}"][2].chunk(len(m.names), dim=1)
        found.update({(m.stream, n): c[:, None] for n, c in zip(m.names, chunks, strict=True)})
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_and_gates_of_the_table_make_up_the_residual_stream(family):
    pipeline = FAMILIES[family]()
    table = arch.family_of(pipeline.transformer)
    seen = watch(pipeline)
    before = {"img": seen[table.embed][2], "txt": seen["context_embedder"][2]}
    for block in arch.bind(pipeline.transformer, table):
        _, kwargs, out = seen[block.fqn]
        n_text = kwargs[block.table.inputs["txt"]].shape[1]
        parameters = parameters_of(seen, block)
        for stream in block.streams():
            assert_close(kwargs[block.table.inputs[stream]], before[stream], rtol=0, atol=0)
            total = before[stream]
            for update in (u for u in block.updates() if u.stream == stream):
                written = seen[f"{block.fqn}.{update.module}"][2]
                written = written if update.index is None else written[update.index]
                if update.joint:
                    written = written[:, :n_text] if stream == "txt" else written[:, n_text:]
                gate = parameters.get((stream, update.gate), parameters.get(("img", update.gate)))
                assert (gate * written).abs().max() > 1e-4
                total = total + gate * written
            after = out[block.table.outputs[stream]]
            assert_close(total, after, rtol=1e-5, atol=1e-5)
            before[stream] = after
    assert_close(seen[table.final_norm][0][0], before["img"], rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_shifts_and_scales_of_the_table_make_what_the_readers_see(family):
    pipeline = FAMILIES[family]()
    table = arch.family_of(pipeline.transformer)
    seen = watch(pipeline)
    blocks = arch.bind(pipeline.transformer, table)
    readers = {  # norm -> (stream, shift, scale, reading module, its argument)
        "norm1.norm": [("img", "shift_msa", "scale_msa", "attn", "hidden_states"),
                       ("img", "shift_msa2", "scale_msa2", "attn2", "hidden_states")],
        "norm1_context.norm": [("txt", "shift_msa", "scale_msa", "attn", "encoder_hidden_states")],
        "norm2": [("img", "shift_mlp", "scale_mlp", "ff", 0)],
        "norm2_context": [("txt", "shift_mlp", "scale_mlp", "ff_context", 0)],
        "norm.norm": [("img", "shift", "scale", "attn", "hidden_states"), ("img", "shift", "scale", "proj_mlp", 0)],
    }  # fmt: skip
    read = 0
    for block in blocks:
        parameters = parameters_of(seen, block)
        for norm, rows in readers.items():
            for stream, shift, scale, module, argument in rows:
                if f"{block.fqn}.{norm}" not in seen or (stream, shift) not in parameters:
                    continue
                args, kwargs, _ = seen[f"{block.fqn}.{module}"]
                given = kwargs[argument] if isinstance(argument, str) else args[argument]
                normed = seen[f"{block.fqn}.{norm}"][2]
                expected = normed * (1 + parameters[stream, scale]) + parameters[stream, shift]
                assert_close(given, expected, rtol=1e-5, atol=1e-5)
                read += 1
        for norm in block.table.norms:
            h = seen[f"{block.fqn}.{norm}"][0][0]
            tokens = 64 + (
                seen[block.fqn][1]["encoder_hidden_states"].shape[1] if norm in block.table.joint_norms else 0
            )
            assert h.shape[1] == tokens
    assert read == {"sd3": 4 * 4 - 1, "sd35": 4 * 4 - 1 + 2, "flux": 2 * 4 + 3 * 2}[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_arguments_change_the_prediction(family):
    pipeline = FAMILIES[family]()
    inputs = forward_inputs(pipeline)
    other = forward_inputs(pipeline, seed=1)
    other |= {k: other[k].flip(0) for k in ("encoder_hidden_states", "pooled_projections")}
    other["guidance"] = torch.full((3,), 9.0)
    with torch.no_grad():
        base = pipeline.transformer(**inputs)[0]
        for name in arch.family_of(pipeline.transformer).arguments.values():
            changed = pipeline.transformer(**{**inputs, name: other[name]})[0]
            assert (changed - base).abs().max() > 1e-5, name


def test_unknown_classes_are_refused_by_name():
    with pytest.raises(UnknownFamilyError, match=r"SD3Transformer2DModel, FluxTransformer2DModel.*got Linear.*arch/"):
        arch.family_of(nn.Linear(2, 2))
    with pytest.raises(UnknownFamilyError, match="got Holder"):
        DiT(Holder(None))
    with pytest.raises(TypeError):  # what a caller who does not know madit's errors would catch
        arch.family_of(object())


def test_known_class_with_another_structure_is_refused():
    pipeline = small_sd3()
    pipeline.transformer.transformer_blocks[2] = nn.Identity()
    with pytest.raises(UnknownFamilyError, match=r"JointTransformerBlock, got Identity"):
        DiT(pipeline)
    pipeline.transformer.transformer_blocks = nn.ModuleList()
    with pytest.raises(UnknownFamilyError, match="found none"):
        DiT(pipeline)


def test_known_class_with_other_arguments_is_refused():
    class SD3Transformer2DModel(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.transformer_blocks = blocks

        def forward(self, hidden_states, encoder_hidden_states, timestep):
            return hidden_states

    with pytest.raises(UnknownFamilyError, match=r"to take pooled_projections.*release"):
        arch.family_of(SD3Transformer2DModel(small_sd3().transformer.transformer_blocks))


def test_a_change_of_the_state_is_seen_from_its_block_on():
    """The stacks of the table are in forward order: an edit of block i's input changes block i's and later outputs."""
    for make in FAMILIES.values():
        pipeline = make()
        blocks = arch.bind(pipeline.transformer, arch.family_of(pipeline.transformer))
        clean = watch(pipeline)
        for i in (1, len(blocks) - 1):

            def edit(module, args, kwargs):
                return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1.5 * torch.arange(32) / 32}

            handle = blocks[i].module.register_forward_pre_hook(edit, with_kwargs=True)
            edited = watch(pipeline)
            handle.remove()
            changed = [not torch.equal(edited[b.fqn][2][1], clean[b.fqn][2][1]) for b in blocks]
            assert changed == [j >= i for j in range(len(blocks))]
