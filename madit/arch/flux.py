"""Flux.1: dual-stream blocks, then single-stream blocks over text and image tokens together."""

from __future__ import annotations

from madit.arch.base import BlockTable, Family, Modulation, Update

_SIX = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
_STATE = {"img": "hidden_states", "txt": "encoder_hidden_states"}
_RETURNS = {"txt": 0, "img": 1}

DUAL = BlockTable(
    cls="FluxTransformerBlock",
    kind="dual",
    inputs=_STATE,
    outputs=_RETURNS,
    modulation=(Modulation("img", "norm1.linear", _SIX), Modulation("txt", "norm1_context.linear", _SIX)),
    updates=(
        Update("update_msa", "img", "attn", 0, "gate_msa"),
        Update("update_msa", "txt", "attn", 1, "gate_msa"),
        Update("update_mlp", "img", "ff", None, "gate_mlp"),
        Update("update_mlp", "txt", "ff_context", None, "gate_mlp"),
    ),
    norms=("norm1.norm", "norm2"),
)

# One AdaLN serves both streams; it is listed under "img".
SINGLE = BlockTable(
    cls="FluxSingleTransformerBlock",
    kind="single",
    inputs=_STATE,
    outputs=_RETURNS,
    modulation=(Modulation("img", "norm.linear", ("shift", "scale", "gate")),),
    updates=(
        Update("update", "img", "proj_out", None, "gate", joint=True),
        Update("update", "txt", "proj_out", None, "gate", joint=True),
    ),
    norms=("norm.norm",),
    joint_norms=("norm.norm",),
)

FLUX = Family(
    name="flux",
    transformers=("FluxTransformer2DModel",),
    stacks=("transformer_blocks", "single_transformer_blocks"),
    blocks={"FluxTransformerBlock": DUAL, "FluxSingleTransformerBlock": SINGLE},
    arguments={
        "latent": "hidden_states",
        "timestep": "timestep",
        "text_tokens": "encoder_hidden_states",
        "pooled_text": "pooled_projections",
        "guidance": "guidance",
    },
    timestep_scale=1e-3,
    cfg="two_calls",
    embed="x_embedder",
    final_norm="norm_out.norm",
    packed=True,
)
