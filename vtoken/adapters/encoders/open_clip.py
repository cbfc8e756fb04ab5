"""open_clip's own vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import Encoder, Forwards, Intermediates, register_encoder
from .layer import EncoderLayer, Heads, split_heads
from .low_rank import READABLE, base_of, packed_weight, unreadable


class OpenClipLayer(EncoderLayer):
    """`ResidualAttentionBlock`, whose attention is torch's own module, also inside peft's LoRA."""

    @property
    def _attention(self) -> Any:
        return base_of(self.module.attn)

    def heads(self, x: Tensor, call: Mapping[str, Any]) -> Heads:
        a = self._attention
        qkv = F.linear(self.module.ln_1(x), packed_weight(self.module.attn), a.in_proj_bias)
        query, key, value = (split_heads(part, a.num_heads) for part in qkv.chunk(3, -1))
        return Heads(query, key, value, key)

    def mixed(self, attended: Tensor, heads: Heads) -> Tensor:
        return self.module.ls_1(self._attention.out_proj(attended))

    def mlp(self, x: Tensor) -> Tensor:
        return self.module.ls_2(self.module.mlp(self.module.ln_2(x)))

    @property
    def scale(self) -> float:
        return float(self._attention.head_dim) ** -0.5

    @property
    def inner(self) -> int:
        return int(self._attention.embed_dim)

    @property
    def attention_dropout(self) -> float:
        return float(self._attention.dropout) if self._attention.training else 0.0

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.module.attn, self.module.mlp


class SequenceFirstLayer(OpenClipLayer):
    """The same in a transformer that was built with `batch_first=False`."""

    transposed = True


@register_encoder
class OpenClipEncoder(Encoder):
    """The image tower of an open_clip model; the text tower stays as it is."""

    library = "open_clip"

    @classmethod
    def find(cls, model: Any) -> Any:
        visual = getattr(model, "visual", model)
        known = type(model).__module__.startswith("open_clip.")
        return visual if known and hasattr(getattr(visual, "transformer", None), "resblocks") else None

    @property
    def modules(self) -> list[nn.Module]:
        return list(self.trunk.transformer.resblocks)

    def layer(self, module: nn.Module) -> EncoderLayer:
        return OpenClipLayer(module) if self.trunk.transformer.batch_first else SequenceFirstLayer(module)

    @property
    def prefix(self) -> int:
        return 1

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.trunk.grid_size)  # type: ignore[return-value]

    def refusal(self) -> str | None:
        if getattr(self.trunk.transformer, "grad_checkpointing", False):
            return "has gradient checkpointing on, which computes layers twice: turn it off"
        if not isinstance(getattr(self.trunk, "patch_dropout", nn.Identity()), nn.Identity):
            return "drops patches at random while it trains (patch_dropout)"
        found = (unreadable(m.attn) for m in self.modules if hasattr(m, "attn"))
        if wrapped := next(filter(None, found), None):
            return f"has {wrapped}, and {READABLE} it first"
        return None

    def wrap(self, wrap: Callable[..., None], forwards: Forwards) -> None:
        wrap(
            self.trunk,
            "forward_intermediates",
            Intermediates(len(self.layers), self.prefix, self._size, forwards),
        )

    def _size(self, images: Tensor) -> tuple[int, int]:
        height, width = self.trunk.patch_size
        return images.shape[-2] // height, images.shape[-1] // width
