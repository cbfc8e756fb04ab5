"""Parts of a vision tower's transformer layer, which can compute some of its tokens only."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...hooks import Hook


class Block(ABC):
    """A pre-norm layer: `x += attention(norm1(x)); x += mlp(norm2(x))`.

    Args:
        layer: the layer, whose parts are looked up at every use.

    Attributes:
        norm1, attention, norm2, mlp: its modules.
        heads: attention heads.
        width: channels inside the attention, all heads side by side.
        scale: factor on the logits.
    """

    names: ClassVar[dict[str, str]]  # names of the modules in the layer
    heads: int
    width: int
    scale: float

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def norm1(self) -> nn.Module:
        return getattr(self.layer, self.names["norm1"])

    @property
    def attention(self) -> Any:
        return getattr(self.layer, self.names["attention"])

    @property
    def norm2(self) -> nn.Module:
        return getattr(self.layer, self.names["norm2"])

    @property
    def mlp(self) -> nn.Module:
        return self.layer.mlp

    @abstractmethod
    def key(self, x: Tensor) -> Tensor:
        """(..., C) after norm1 -> keys (..., C), heads side by side, before rotary embedding."""

    @abstractmethod
    def query_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C) after norm1 -> queries and values (..., C)."""

    @abstractmethod
    def out(self, x: Tensor) -> Tensor:
        """The output projection of attention output (..., C), heads side by side."""

    @abstractmethod
    def watch(self, record: Callable[[str, Tensor], None]) -> list[Hook]:
        """Hooks that call `record` with "key", "value", "attention" and "mlp" of a full forward."""

    @property
    @abstractmethod
    def key_flops(self) -> int:
        """FLOPs of the projection of one token's key, two per multiply-add."""

    @property
    @abstractmethod
    def chosen_flops(self) -> int:
        """FLOPs of a computed token beyond its key, in a frame that reuses; without attention."""

    def dense_flops(self, windows: Sequence[int]) -> int:
        """FLOPs of the layer on one frame whose attention is cut into windows of these lengths."""
        linear = sum(windows) * linear_flops(self.attention, self.mlp)
        return linear + 4 * self.width * sum(n * n for n in windows)


def linear_flops(*modules: nn.Module) -> int:
    """FLOPs per token of the linear layers among the modules and their children; adapters count as layers."""
    every: list[Any] = [m for module in modules for m in module.modules() if not any(m.children())]
    return sum(2 * int(m.in_features) * int(m.out_features) for m in every if hasattr(m, "in_features"))


# partial objects and not closures, so that a deep copy of the model records for itself
def _note(record: Callable[[str, Tensor], None], name: str, module: nn.Module, args: Any, out: Any) -> None:
    record(name, out[0] if isinstance(out, tuple) else out)


def _note_fused(record: Callable[[str, Tensor], None], module: nn.Module, args: Any, out: Tensor) -> None:
    _, key, value = out.chunk(3, -1)
    record("key", key)
    record("value", value)


class SplitBlock(Block):
    """CLIP and SigLIP: one projection each for queries, keys and values."""

    names = {"norm1": "layer_norm1", "attention": "self_attn", "norm2": "layer_norm2"}

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.heads, self.scale = int(self.attention.num_heads), float(self.attention.scale)
        self.width = self.heads * int(self.attention.head_dim)

    def key(self, x: Tensor) -> Tensor:
        return self.attention.k_proj(x)

    def query_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention.q_proj(x), self.attention.v_proj(x)

    def out(self, x: Tensor) -> Tensor:
        return self.attention.out_proj(x)

    def watch(self, record: Callable[[str, Tensor], None]) -> list[Hook]:
        a = self.attention
        parts = {"key": a.k_proj, "value": a.v_proj, "attention": a, "mlp": self.mlp}
        return [Hook(part, functools.partial(_note, record, name)) for name, part in parts.items()]

    @property
    def key_flops(self) -> int:
        return linear_flops(self.attention.k_proj)

    @property
    def chosen_flops(self) -> int:
        a = self.attention
        return linear_flops(a.q_proj, a.v_proj, a.out_proj, self.mlp)


class FusedBlock(Block):
    """The Qwen-VL towers: one projection for all three; slices of its rows compute keys alone."""

    names = {"norm1": "norm1", "attention": "attn", "norm2": "norm2"}

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.heads, self.scale = int(self.attention.num_heads), float(self.attention.scaling)
        self.width = self.heads * int(self.attention.head_dim)

    @property
    def _sliceable(self) -> bool:
        """Whether the projection is a plain matrix: not quantised, adapted or offloaded."""
        qkv = self.attention.qkv
        return type(qkv) is nn.Linear and "forward" not in qkv.__dict__ and not qkv.weight.is_meta

    def _rows(self, x: Tensor, part: int) -> Tensor:
        qkv = self.attention.qkv
        if not self._sliceable:
            return qkv(x).chunk(3, -1)[part]
        bias = None if qkv.bias is None else qkv.bias.chunk(3)[part]
        return F.linear(x, qkv.weight.chunk(3)[part], bias)

    def key(self, x: Tensor) -> Tensor:
        return self._rows(x, 1)

    def query_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._sliceable:
            query, _, value = self.attention.qkv(x).chunk(3, -1)
            return query, value
        return self._rows(x, 0), self._rows(x, 2)

    def out(self, x: Tensor) -> Tensor:
        return self.attention.proj(x)

    def watch(self, record: Callable[[str, Tensor], None]) -> list[Hook]:
        parts = {"attention": self.attention, "mlp": self.mlp}
        hooks = [Hook(part, functools.partial(_note, record, name)) for name, part in parts.items()]
        return [Hook(self.attention.qkv, functools.partial(_note_fused, record)), *hooks]

    @property
    def key_flops(self) -> int:
        return linear_flops(self.attention.qkv) // (3 if self._sliceable else 1)

    @property
    def chosen_flops(self) -> int:
        qkv = linear_flops(self.attention.qkv)
        return linear_flops(self.attention.proj, self.mlp) + (qkv - qkv // 3 if self._sliceable else qkv)
