"""Stable Diffusion 3 and 3.5: joint blocks, two streams, dual attention in some SD3.5 blocks."""

from __future__ import annotations

from madit.arch.base import BlockTable, Family, Modulation, Update

_SIX = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")

JOINT = BlockTable(
    cls="JointTransformerBlock",
    kind="dual",
    inputs={"img": "hidden_states", "txt": "encoder_hidden_states"},
    outputs={"txt": 0, "img": 1},
    modulation=(Modulation("img", "norm1.linear", _SIX), Modulation("txt", "norm1_context.linear", _SIX)),
    updates=(
        Update("update_msa", "img", "attn", 0, "gate_msa"),
        Update("update_msa", "txt", "attn", 1, "gate_msa"),
        Update("update_msa2", "img", "attn2", None, "gate_msa2"),
        Update("update_mlp", "img", "ff", None, "gate_mlp"),
        Update("update_mlp", "txt", "ff_context", None, "gate_mlp"),
    ),
    norms=("norm1.norm", "norm2"),
)

SD3 = Family(
    name="sd3",
    transformers=("SD3Transformer2DModel",),
    stacks=("transformer_blocks",),
    blocks={"JointTransformerBlock": JOINT},
    arguments={
        "latent": "hidden_states",
        "timestep": "timestep",
        "text_tokens": "encoder_hidden_states",
        "pooled_text": "pooled_projections",
    },
    timestep_scale=1.0,
    cfg="batched",
    embed="pos_embed",
    final_norm="norm_out.norm",
)
