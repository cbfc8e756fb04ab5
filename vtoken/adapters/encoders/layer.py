"""A transformer layer of an encoder in two halves, attention and MLP, made of the layer's own modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...tokens import EncoderShape


@dataclass
class Heads:
    """Queries, keys and values of a layer, (rows, heads, n, head_dim) each, as its softmax sees them.

    Attributes:
        content: keys before rotary embedding; `key` itself in layers without.
        gate: (rows, n, heads * head_dim) factor on the attention's output, None in layers without.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    content: Tensor
    gate: Tensor | None = None

    def attend(self, scale: float, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
        """Softmax attention, (rows, n, heads * head_dim).

        Args:
            scale: factor on the logits.
            bias: (rows, n) added to the logits of every key, None for none.
            dropout: probability on the attention weights.
        """
        mask = None if bias is None else bias.to(self.query.dtype)[:, None, None, :]
        mixed = F.scaled_dot_product_attention(
            self.query, self.key, self.value, mask, dropout_p=dropout, scale=scale
        )
        return mixed.transpose(1, 2).flatten(2)

    def mean_key(self) -> Tensor:
        """(rows, n, head_dim) float32 or float64, the mean over heads of the keys before rotary embedding."""
        return full(self.content).mean(1)

    def first_row(self, scale: float, bias: Tensor | None) -> Tensor:
        """(rows, n) float32 or float64, the softmaxed attention of token 0, the mean over heads."""
        logits = (full(self.query[:, :, :1]) * scale) @ full(self.key).mT
        if bias is not None:
            logits = logits + bias[:, None, None, :]
        return logits.softmax(-1)[:, :, 0].mean(1)


class EncoderLayer(ABC):
    """A layer `x += attention(x); x += mlp(x)`, whose modules are looked up at every use.

    Subclasses know the names of one library. Whether they are right for a layer is tested on random tokens
    before the layer is used, see `differs`.

    Args:
        module: the layer.
    """

    transposed = False  # whether the layer takes (n, rows, C)

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def known(self) -> bool:
        """Whether all parts of the layer have names that the subclass knows."""
        return True

    @abstractmethod
    def heads(self, x: Tensor, call: Mapping[str, Any]) -> Heads:
        """Queries, keys and values from the residual stream (rows, n, C); `call` holds the arguments."""

    @abstractmethod
    def mixed(self, attended: Tensor, heads: Heads) -> Tensor:
        """(rows, n, C) that the attention adds, from its output (rows, n, heads * head_dim)."""

    @abstractmethod
    def mlp(self, x: Tensor) -> Tensor:
        """(rows, n, C) that the MLP adds to x."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """Factor on the attention logits."""

    @property
    @abstractmethod
    def inner(self) -> int:
        """Channels inside the attention, all heads side by side."""

    @property
    @abstractmethod
    def attention_dropout(self) -> float:
        """Probability of a dropped attention weight at present, 0 in eval mode."""

    @property
    @abstractmethod
    def parts(self) -> tuple[nn.Module, nn.Module]:
        """The attention and the MLP, to count their work."""

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call beyond x, by name.

        Raises:
            ValueError: for a mask, which does not fit a sequence that becomes shorter.
        """
        given = {k: v for k, v in kwargs.items() if v is not None and v is not False}
        masks = [k for k in given if "mask" in k or "causal" in k]
        if masks or any(a is not None for a in args):
            raise ValueError(
                f"A layer of a patched encoder takes no mask, found {', '.join(masks) or 'one'}: leave it "
                f"out,"
                " or call the model inside `with vtoken.disabled(model)`."
            )
        return given

    def forward(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The whole layer from its halves, as the module itself computes it."""
        heads = self.heads(x, call)
        x = x + self.mixed(heads.attend(self.scale, None, self.attention_dropout), heads)
        return x + self.mlp(x)


def full(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds per token of the linear layers in a module."""
    total = 0
    for m in module.modules():
        if isinstance(m, nn.MultiheadAttention):
            total += 3 * m.embed_dim * m.embed_dim
        if hasattr(m, "in_features") and not any(m.children()):
            total += int(m.in_features) * int(m.out_features)  # type: ignore[arg-type]
    return total


def shape_of(layer: EncoderLayer, shape: EncoderShape, drops: bool) -> EncoderShape:
    """A shape with the work of a layer's halves."""
    attention, mlp = layer.parts
    return replace(
        shape,
        attention_macs=linear_macs(attention),
        mlp_macs=linear_macs(mlp),
        width=layer.inner,
        drops=drops,
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(rows, n, heads * head_dim) -> (rows, heads, n, head_dim)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def packs_weights(module: Any) -> bool:
    """Whether a module's first use in evaluation changes its weights, as bitsandbytes packs those of 4 bits,
    which can then no longer be trained.
    """
    return any(hasattr(p, "quant_state") for p in module._parameters.values())


@torch.no_grad()
def differs(layer: EncoderLayer, call: Mapping[str, Any], tokens: int) -> float:
    """Largest difference between a layer and its halves on random tokens, relative to what the layer adds.

    Args:
        layer: in any mode; it is put into eval mode for the comparison, but for what packs weights, and back.
        call: further arguments of the layer.
        tokens: length of the sequence.
    """
    norm = next(
        m
        for m in layer.module.modules()
        if isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim == 1
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, len(norm.weight), generator=generator).to(norm.weight)
    training = {m: m.training for m in layer.module.modules()}
    for m in training:
        m.training = packs_weights(m)
    try:
        out = layer.module(x.transpose(0, 1) if layer.transposed else x, **call)
        out = out[0] if isinstance(out, tuple) else out
        out = out.transpose(0, 1) if layer.transposed else out
        mine = layer.forward(x, call)
    finally:
        for m, was in training.items():
            m.training = was
    added = (out - x).float().abs().max().clamp(min=1e-6)
    return float((out - mine).float().abs().max() / added)
