"""Weights of the tower of tiny LLaVA (transformers) for a Vision Transformer of timm."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from vtoken import tiny

PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@torch.no_grad()
def warm_start(model: Any) -> None:
    """Take the weights of the tower of tiny LLaVA, in place; layers beyond its six stay as they are."""
    prefix = "vision_tower."
    stored = load_file(tiny.path("llava") / "model.safetensors")
    tower = {n.removeprefix(prefix): t.float() for n, t in stored.items() if n.startswith(prefix)}
    state = {
        "cls_token": tower["embeddings.class_embedding"][None, None],
        "pos_embed": tower["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": tower["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"norm_pre.{kind}"] = tower[f"pre_layrnorm.{kind}"]
        state[f"norm.{kind}"] = tower[f"post_layernorm.{kind}"]
        for i in range(6):
            own, theirs = f"blocks.{i}.", f"encoder.layers.{i}."
            state[f"{own}attn.qkv.{kind}"] = torch.cat(
                [tower[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
            for mine, its in PARTS.items():
                state[f"{own}{mine}.{kind}"] = tower[f"{theirs}{its}.{kind}"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(n.startswith(("blocks.6.", "blocks.7.", "head.")) for n in missing)
