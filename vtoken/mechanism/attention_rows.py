"""Attention rows of the LLM, recomputed from its projections for the wanted queries only."""

from __future__ import annotations

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.encoders.encoder import kind_of
from ..adapters.encoders.layer import packs_weights
from ..hooks import rebuilt
from ..kernels import attention_rows
from ..kernels.reference import full_precision


def check_projections(decoder: nn.Module, name: str, kind: str) -> None:
    """Raise ValueError unless this decoder has `q_proj` and `k_proj` and rotates them as `rotate` does."""
    modules: list[Any] = [getattr(layer, "self_attn", None) for layer in decoder.layers]  # type: ignore[union-attr]
    parts = ("q_proj", "k_proj", "head_dim", "scaling")
    if not all(hasattr(attention, part) for attention in modules for part in parts):
        raise ValueError(
            f"{name} reads the LLM's attention, which vtoken recomputes from q_proj and k_proj; the LLM of"
            f" this {kind} model has no such projections: use a projector strategy."
        )
    odd = {n for a in modules for n, _ in a.named_children() if "norm" in n} - {"q_norm", "k_norm", "v_norm"}
    if odd:
        raise ValueError(
            f"{name} reads the LLM's attention, which vtoken recomputes with norms before the rotary"
            f" embedding; the LLM of this {kind} model has {', '.join(sorted(odd))}: use a projector"
            " strategy."
        )
    turned = all(map(turns_halves, {type(a) for a in modules}))
    if not turned or not all(getattr(a, "use_rope", True) for a in modules):
        raise ValueError(
            f"{name} reads the LLM's attention, which vtoken recomputes with rotary embeddings that turn the"
            f" two halves of a head in every layer; the LLM of this {kind} model has others: use a projector"
            " strategy."
        )
    if any(getattr(a, "attn_logit_softcapping", None) is not None for a in modules):
        raise ValueError(
            f"{name} reads the LLM's attention, which vtoken recomputes without a soft cap; the LLM of this"
            f" {kind} model caps its attention logits: use a projector strategy."
        )
    kinds = getattr(decoder.config, "layer_types", None) or [""] * len(modules)
    alike = {(kind_of(a), layer): a for a, layer in zip(modules, kinds, strict=True)}
    if not all(_rows_are_its_own(decoder, a, layer) for (_, layer), a in alike.items()):
        raise ValueError(
            f"{name} reads the LLM's attention, and the rows that vtoken recomputes are not those of the"
            f" {type(modules[0]).__name__} of this {kind} model: use a projector strategy."
        )


def projects_visual_tokens(decoder: Any) -> bool:
    """Whether the first layers can run alone, and each norms what `heads` reads."""
    try:
        check_projections(decoder, "", "")
    except (ValueError, AttributeError):
        return False
    return hasattr(decoder, "norm") and all(hasattr(layer, "input_layernorm") for layer in decoder.layers)


@torch.no_grad()
def products(layer: Any, query: Tensor, features: Tensor) -> Tensor:
    """(heads, n) float32: scaled products, without positions, of a query and keys in a layer of the LLM.

    Args:
        query: (d,), what enters the layer at the token that looks.
        features: (n, d), what enters it at the tokens that are looked at.
    """
    attention = layer.self_attn
    weight = next(layer.parameters())  # norms may have none
    place = query.device if weight.is_meta else weight.device  # offloaded weights come where their input is
    normed = [layer.input_layernorm(x[None].to(place, query.dtype)) for x in (query[None], features)]
    q, k = (heads(attention, x, which) for x, which in zip(normed, "qk", strict=True))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q @ k.mT)[0, :, 0].float() * attention.scaling  # type: ignore[no-any-return]


@torch.no_grad()
def _rows_are_its_own(decoder: Any, attention: Any, layer_type: str, tokens: int = 8) -> bool:
    """Whether `rows_of_attention` gives what an attention module computes itself, on a few random tokens.

    True where it cannot be tried: weights that are not loaded or in pieces.
    """
    weights = [getattr(p, "weight", None) for p in (attention.q_proj, attention.k_proj)]
    if any(w is None or w.is_meta or _sharded(w) for w in weights) or not hasattr(attention, "config"):
        return True
    alone = _without_dropout(attention)
    alone.config = copy.copy(attention.config)
    alone.config._attn_implementation_internal = "eager"
    noise = torch.randn(1, tokens, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    try:
        return _rows_agree(noise.to(weights[0].device, decoder.dtype), decoder, alone, layer_type)
    except Exception:  # of a module that takes or gives other things
        return False


@full_precision
def _rows_agree(hidden: Tensor, decoder: Any, attention: Any, layer_type: str) -> bool:
    """Whether an eager attention module gives the rows that `rows_of_attention` does, of hidden (1, n, D)."""
    n, device, dtype = hidden.shape[1], hidden.device, hidden.dtype
    mask = torch.full((n, n), torch.finfo(dtype).min, device=device, dtype=dtype).triu(1)[None, None]
    takes = inspect.signature(type(attention).forward).parameters
    shared: dict[str, Any] = {"shared_kv_states": {}} if "shared_kv_states" in takes else {}
    rotary = _tables(decoder, hidden, layer_type)
    out = type(attention).forward(
        attention, hidden_states=hidden, position_embeddings=rotary, attention_mask=mask, **shared
    )
    own = next(x for x in out if isinstance(x, Tensor) and x.shape[-2:] == (n, n))[0].float()
    made = rows_of_attention(attention, hidden, rotary, torch.arange(n, device=device))
    lengths = [heads(attention, hidden, which).float().norm(dim=-1).max().item() for which in "qk"]
    # logits are rounded to the dtype, and large where projections have large biases
    rounding = max(torch.finfo(dtype).eps, 5e-4) * lengths[0] * lengths[1] * attention.scaling
    off = (own.clamp(min=1e-6).log() - made.clamp(min=1e-6).log()).abs()[own > 1e-3].max().item()
    return bool(off < 0.02 + 2 * rounding)


def _without_dropout(module: Any) -> Any:
    """The module as in evaluation, with the same weights; the model itself may be in training (LoRA)."""
    alone = copy.copy(module)
    alone.training = packs_weights(module)
    alone._modules = {
        n: None if part is None else _without_dropout(part) for n, part in module._modules.items()
    }
    return alone


def _tables(decoder: Any, hidden: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, n, rotary_dim) of distant positions, as the decoder's layers are given them."""
    typed = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None] * 37
    return rotary_tables(decoder, hidden, positions, *[layer_type] * typed)


def rotary_tables(decoder: Any, like: Tensor, positions: Tensor, *kind: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, n, rotary_dim) of the dtype of `like`, of positions (B, n) on all axes."""
    try:
        return decoder.rotary_emb(like, positions, *kind)  # type: ignore[no-any-return]
    except (IndexError, RuntimeError):  # of three axes
        return decoder.rotary_emb(like, positions.expand(3, *positions.shape), *kind)  # type: ignore[no-any-return]


def turns_halves(attention: type) -> bool:
    """Whether the module in which an attention class was written rotates as `rotate` does, if it tells.

    Cohere and GLM turn neighbouring channels (x[::2], x[1::2]) instead of halves, GLM-V in `rotate_half_llm`
    beside the vision tower's `rotate_half`.
    """
    for cls in attention.__mro__:
        names = vars(sys.modules.get(cls.__module__, sys))
        functions = [f for name, f in names.items() if name.startswith("rotate_half")]
        if functions:
            return all(f(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0] for f in functions)
    return True


def heads(attention: Any, x: Tensor, which: str) -> Tensor:
    """(B, n, D) -> (B, heads, n, head_dim), projected and normed."""
    projection = getattr(attention, f"{which}_proj", None)
    if projection is None:
        raise rebuilt(f"The LLM's attention has no {which}_proj, from which its rows are computed")
    check_whole(projection, which, "a projector strategy")
    x = projection(x)
    x = x.view(*x.shape[:2], -1, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    return (x if norm is None else norm(x)).transpose(1, 2)


def check_whole(projection: Any, which: str, instead: str) -> None:
    """Raise NotImplementedError, which advises to use `instead`, if this process has a piece of it only."""
    if _sharded(getattr(projection, "weight", None)):
        raise NotImplementedError(
            f"A strategy that reads the LLM's attention computes it again from {which}_proj, whose weights"
            f" are in pieces here (FSDP, tensor parallel): use {instead}, or DistributedDataParallel."
        )


def _sharded(weight: Any) -> bool:
    """Whether this process has a piece of a weight only; FSDP frees the others after a layer's forward."""
    if not isinstance(weight, Tensor) or weight.is_meta:  # weights that accelerate loads for the call
        return False
    if hasattr(weight, "placements"):
        return True
    return not weight.numel() or weight.ndim < 2 or not weight.untyped_storage().size()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, heads, n, head_dim) by tables (B, n, rotary_dim)."""
    dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    head, tail = x[..., :dim], x[..., dim:]
    a, b = head.chunk(2, -1)
    return torch.cat([head * cos + torch.cat([-b, a], -1) * sin, tail], -1)


def rows_of_attention(
    attention: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    rows: Tensor,
    key: Tensor | None = None,
    past: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Softmaxed rows of one prompt, (heads, r, n) float32.

    Args:
        attention: the self-attention module.
        hidden: (1, n, D), its input.
        rotary: cosines and sines, (1, n, rotary_dim).
        rows: (r,) int64.
        key: (1, kv_heads, n, head_dim) from the cache, None to compute them.
        past: (1, kv_heads, p, head_dim), keys of earlier forwards; they count in the softmax, and the result
            leaves them out.
        seen: (r, n) bool, the tokens that each row may see; None if each sees the tokens before it.
    """
    cos, sin = rotary
    query = rotate(heads(attention, hidden[:, rows], "q"), cos[:, rows], sin[:, rows])
    if key is None:
        key = rotate(heads(attention, hidden, "k"), cos, sin)
    if seen is None:
        seen = torch.arange(hidden.shape[1], device=hidden.device)[None] <= rows[:, None]
    if past is None:
        return attention_rows(query, key, attention.scaling, seen[None])[0]
    seen = torch.cat([seen.new_ones(len(rows), past.shape[2]), seen], 1)
    probabilities = attention_rows(query, torch.cat([past, key], 2), attention.scaling, seen[None])[0]
    return probabilities[..., past.shape[2] :]
