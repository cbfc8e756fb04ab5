"""timm's vision transformers: plain blocks, blocks with norms after them, and EVA's with rotary embedding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .encoder import Encoder, Forwards, Intermediates, register_encoder
from .layer import EncoderLayer, Heads
from .run import EncoderRun


class TimmLayer(EncoderLayer):
    """`Block`, `ResPostBlock`, `EvaBlock` and `EvaBlockPostNorm`."""

    @property
    def norms_after(self) -> bool:
        """Whether a norm follows attention and MLP instead of preceding them."""
        return "PostNorm" in type(self.module).__name__ or "ResPost" in type(self.module).__name__

    def _before(self, x: Tensor, norm: str) -> Tensor:
        return x if self.norms_after else getattr(self.module, norm)(x)

    def _after(self, branch: Tensor, i: int) -> Tensor:
        """Layer scale (or the norm after it) and stochastic depth of half i."""
        m = self.module
        if self.norms_after:
            branch = getattr(m, f"norm{i}")(branch)
        elif hasattr(m, f"ls{i}"):
            branch = getattr(m, f"ls{i}")(branch)
        elif getattr(m, f"gamma_{i}", None) is not None:
            branch = getattr(m, f"gamma_{i}") * branch
        return getattr(m, f"drop_path{i}")(branch)

    def heads(self, x: Tensor, call: Mapping[str, Any]) -> Heads:
        a = self.module.attn
        x = self._before(x, "norm1")
        query, key, value = _projected(a, x)
        query, key = a.q_norm(query), a.k_norm(key)
        gate = None if getattr(a, "gate", None) is None else a.gate(x).sigmoid()
        content, rope = key, call.get("rope")
        if rope is not None:
            half = getattr(a, "rotate_half", False)
            query, key = (_rotated(x, rope, half).type_as(value) for x in (query, key))
        return Heads(query, key, value, content, gate)

    def mixed(self, attended: Tensor, heads: Heads) -> Tensor:
        a = self.module.attn
        attended = a.norm(attended)
        if heads.gate is not None:
            attended = attended * heads.gate
        return self._after(a.proj_drop(a.proj(attended)), 1)

    def mlp(self, x: Tensor) -> Tensor:
        return self._after(self.module.mlp(self._before(x, "norm2")), 2)

    @property
    def scale(self) -> float:
        return float(self.module.attn.scale)

    @property
    def inner(self) -> int:
        return int(self.module.attn.num_heads * self.module.attn.head_dim)

    @property
    def attention_dropout(self) -> float:
        drop = self.module.attn.attn_drop
        return float(drop.p) if drop.training else 0.0

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.module.attn, self.module.mlp


def _projected(a: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values (rows, heads, n, head_dim) of normed tokens."""
    if getattr(a, "qkv", None) is None:
        return [p(x).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)]
    if getattr(a, "q_bias", None) is None:
        qkv = a.qkv(x)
    elif a.qkv_bias_separate:
        qkv = a.qkv(x) + torch.cat((a.q_bias, a.k_bias, a.v_bias))
    else:
        qkv = F.linear(x, a.qkv.weight, torch.cat((a.q_bias, a.k_bias, a.v_bias)))
    return list(qkv.unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))


def _rotated(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """Rotary embedding of the last tokens, as many as `rope` has rows."""
    from timm.layers import apply_rot_embed_cat

    first = x.shape[2] - rope.shape[-2]
    return torch.cat([x[:, :, :first], apply_rot_embed_cat(x[:, :, first:], rope, half=half)], 2)


@register_encoder
class TimmEncoder(Encoder):
    """A timm model with `blocks`, alone, as `features_only` or as the image tower of an open_clip model."""

    library = "timm"

    @classmethod
    def find(cls, model: Any) -> Any:
        if type(model).__module__.startswith("open_clip."):
            trunk = getattr(getattr(model, "visual", model), "trunk", None)
        elif type(model).__module__.startswith("timm."):
            trunk = getattr(model, "model", model)
        else:
            return None
        plain = isinstance(getattr(trunk, "blocks", None), nn.Module) and hasattr(trunk, "num_prefix_tokens")
        return trunk if plain else None

    @property
    def modules(self) -> list[nn.Module]:
        return list(self.trunk.blocks)

    def layer(self, module: nn.Module) -> EncoderLayer:
        return TimmLayer(module)

    @property
    def prefix(self) -> int:
        return int(self.trunk.num_prefix_tokens)

    @property
    def has_cls(self) -> bool:
        return getattr(self.trunk, "cls_token", None) is not None

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.trunk.patch_embed.grid_size)  # type: ignore[return-value]

    def embedding_macs(self) -> int:
        if sum(p.ndim == 4 for p in self.trunk.patch_embed.parameters()) < 2:
            return super().embedding_macs()
        # a stem of several convolutions, each on a grid of its own
        stem = copy.deepcopy(self.trunk.patch_embed).to("meta")
        dtype = next(stem.parameters()).dtype
        with FlopCounterMode(display=False) as counter:
            stem(torch.empty(1, 3, *stem.img_size, device="meta", dtype=dtype))
        return counter.get_total_flops() // 2 // (self.grid[0] * self.grid[1])

    def refusal(self) -> str | None:
        if not hasattr(self.trunk, "patch_embed"):
            return "packs images of any shape and masks what it pads"
        if getattr(self.trunk, "rope_mixed", False):
            return "has a rotary embedding of its own in every layer"
        if getattr(self.trunk, "grad_checkpointing", False):
            return "has gradient checkpointing on, which computes layers twice: turn it off"
        return None

    def probe(self, tokens: int) -> dict[str, Any]:
        rope = getattr(self.trunk, "rope", None)
        return {} if rope is None else {"rope": rope.get_embed(shape=self.grid)[: tokens - self.prefix]}

    def follow(self, run: EncoderRun, call: dict[str, Any]) -> dict[str, Any]:
        """The rotary embedding of the patches whose places the tokens take."""
        rope = call.get("rope")
        if rope is None or run.kept is None:
            return call
        places = run.kept[:, run.prefix :] - run.shape.prefix
        if rope.ndim == 2:
            return call | {"rope": rope[places][:, None]}
        # one for every image, whose patches are dropped at random while the encoder is trained
        return call | {"rope": rope.gather(2, places[:, None, :, None].expand(-1, -1, -1, rope.shape[3]))}

    def wrap(self, wrap: Callable[..., None], forwards: Forwards) -> None:
        if hasattr(self.trunk, "forward_intermediates"):
            wrap(
                self.trunk,
                "forward_intermediates",
                Intermediates(len(self.layers), self.prefix, self._size, forwards),
            )

    def _size(self, images: Tensor) -> tuple[int, int]:
        return self.trunk.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
