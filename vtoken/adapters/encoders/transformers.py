"""transformers' vision encoders: CLIP, SigLIP, ViT, DeiT, DINOv2 (with registers) and those built alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .encoder import Encoder, Forwards, register_encoder
from .layer import EncoderLayer, Heads, split_heads
from .run import EncoderRun

# by role, the names that a layer's parts have in one model or another
ROLES = {
    "norm1": ("layer_norm1", "layernorm_before", "norm1", "rms_norm1"),
    "attention": ("self_attn", "attention"),
    "norm2": ("layer_norm2", "layernorm_after", "norm2", "rms_norm2"),
    "mlp": ("mlp", "ffn"),
    "query": ("q_proj", "query"),
    "key": ("k_proj", "key"),
    "value": ("v_proj", "value"),
    "out": ("out_proj", "o_proj", "output"),
    "head_dim": ("head_dim", "attention_head_size"),
}


def _part(module: Any, role: str) -> Any:
    found = next((getattr(module, n) for n in ROLES[role] if hasattr(module, n)), None)
    if found is None:
        raise AttributeError(f"{type(module).__name__} has none of {', '.join(ROLES[role])}")
    return found


class TransformersLayer(EncoderLayer):
    """A pre-norm layer with one projection each for queries, keys and values."""

    @property
    def known(self) -> bool:
        """Whether the layer has all parts under known names, and no norms of queries and keys."""
        try:
            for role in LAYER:
                _part(self.module, role)
            for role in ("query", "key", "value", "head_dim"):
                _part(self._inner, role)
            _part(self._attention, "out")
        except AttributeError:
            return False
        norms = (getattr(self._inner, name, None) for name in ("q_norm", "k_norm"))
        return all(norm is None or isinstance(norm, nn.Identity) for norm in norms)

    @property
    def _attention(self) -> Any:
        return _part(self.module, "attention")

    @property
    def _inner(self) -> Any:
        """The module with the projections; DINOv2's attention of older transformers holds it."""
        return getattr(self._attention, "attention", self._attention)

    def _after(self, branch: Tensor, i: int) -> Tensor:
        """Layer scale, dropout and stochastic depth of half i, where a layer has them."""
        for name in (f"layer_scale{i}", "dropout", "drop_path"):
            part = getattr(self.module, name, None)
            branch = part(branch) if isinstance(part, nn.Module) else branch
        return branch

    def heads(self, x: Tensor, call: Mapping[str, Any]) -> Heads:
        a, x = self._inner, _part(self.module, "norm1")(x)
        parts = (_part(a, role)(x) for role in ("query", "key", "value"))
        query, key, value = (split_heads(p, p.shape[-1] // int(_part(a, "head_dim"))) for p in parts)
        return Heads(query, key, value, key)

    def mixed(self, attended: Tensor, heads: Heads) -> Tensor:
        out = _part(self._attention, "out")
        return self._after(out.dropout(out.dense(attended)) if hasattr(out, "dense") else out(attended), 1)

    def mlp(self, x: Tensor) -> Tensor:
        return self._after(_part(self.module, "mlp")(_part(self.module, "norm2")(x)), 2)

    @property
    def scale(self) -> float:
        return float(_part(self._inner, "head_dim")) ** -0.5

    @property
    def inner(self) -> int:
        return int(_part(self._inner, "query").out_features)

    @property
    def attention_dropout(self) -> float:
        a = self._inner
        names = ("attention_dropout", "dropout_prob", "dropout")
        p = next((getattr(a, n) for n in names if isinstance(getattr(a, n, None), float)), 0.0)
        return float(p) if a.training else 0.0

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self._attention, _part(self.module, "mlp")


def _layers_of(trunk: Any) -> list[nn.Module]:
    """The layers of a vision tower, empty if it has none of the known kind."""
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) and _is_layer(module[0]):
            return list(module)
    return []


LAYER = ("norm1", "attention", "norm2", "mlp")


def _is_layer(module: nn.Module) -> bool:
    return all(any(hasattr(module, n) for n in ROLES[role]) for role in LAYER)


@register_encoder
class TransformersEncoder(Encoder):
    """The vision tower of a transformers model."""

    library = "transformers"

    @classmethod
    def find(cls, model: Any) -> Any:
        if not hasattr(getattr(model, "config", None), "model_type"):
            return None
        for module in model.modules():
            embeddings = getattr(module, "embeddings", None)
            if any(hasattr(embeddings, n) for n in ("patch_embedding", "patch_embeddings")) and _layers_of(
                module
            ):
                return module
        return None

    @property
    def modules(self) -> list[nn.Module]:
        return _layers_of(self.trunk)

    def layer(self, module: nn.Module) -> EncoderLayer:
        return TransformersLayer(module)

    @property
    def _embeddings(self) -> Any:
        return self.trunk.embeddings

    @property
    def has_cls(self) -> bool:
        return any(
            isinstance(getattr(self._embeddings, n, None), Tensor) for n in ("class_embedding", "cls_token")
        )

    @property
    def prefix(self) -> int:
        registers = getattr(self._embeddings, "register_tokens", None)
        distilled = isinstance(getattr(self._embeddings, "distillation_token", None), Tensor)
        return self.has_cls + distilled + (0 if registers is None else registers.shape[1])

    @property
    def grid(self) -> tuple[int, int]:
        config = self.trunk.config
        size, patch = (
            (n, n) if isinstance(n, int) else tuple(n) for n in (config.image_size, config.patch_size)
        )
        return size[0] // patch[0], size[1] // patch[1]

    def refusal(self) -> str | None:
        if type(self.trunk).__name__.endswith("Backbone"):
            return "makes maps of its layers, which need all tokens"
        if any(not hasattr(self.trunk.config, n) for n in ("image_size", "patch_size")):
            return "does not read images of one size cut into patches"
        if sum(map(_is_layer, self.trunk.modules())) > len(self.layers):
            return "has more than one sequence of layers"
        if any(getattr(m, "gradient_checkpointing", False) for m in self.trunk.modules()):
            return "has gradient checkpointing on, which computes layers twice: turn it off"
        return None

    def probe(self, tokens: int) -> dict[str, Any]:
        # an argument without default in some layers, unknown to others
        named = "attention_mask" in inspect.signature(type(self.modules[0]).forward).parameters
        return {"attention_mask": None} if named else {}

    def wrap(self, wrap: Callable[..., None], forwards: Forwards) -> None:
        # some towers leave the hidden states to a module around them, which shares their configuration
        for module in self.model.modules():
            around = getattr(module, "config", None) is self.trunk.config
            if module is self.trunk or (around and any(m is self.trunk for m in module.modules())):
                wrap(module, "forward", HiddenStates(forwards))


class HiddenStates:
    """The forward of a tower whose `hidden_states` all have the length of the unpatched tower's."""

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards

    def __call__(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        out, run = original(*args, **kwargs), self.forwards.current()
        if run is None:
            return out
        maps = getattr(out, "attentions", None)
        if maps is not None and len(maps) < run.ends:
            raise ValueError(
                "Layers that merge tokens make no attention maps: leave output_attentions out, or call the"
                " model inside `with vtoken.disabled(model)`."
            )
        if isinstance(out, tuple):
            return tuple(self._spread(run, x) if _are_states(x) else x for x in out)
        if _are_states(getattr(out, "hidden_states", None)):
            out.hidden_states = self._spread(run, out.hidden_states)
        return out

    def _spread(self, run: EncoderRun, states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The output of every layer, preceded by what the first one reads; None for those not asked for.

        Some releases leave that first one out where layers are named. The last output is spread
        already, and all are where a module inside did it.
        """
        whole = run.images, run.shape.patches + run.shape.prefix
        first = len(states) - run.ends
        return tuple(
            x if x is None or x.shape[:2] == whole else run.spread(x, i - first) for i, x in enumerate(states)
        )


def _are_states(x: Any) -> bool:
    return (
        isinstance(x, tuple)
        and any(s is not None for s in x)
        and all(s is None or (isinstance(s, Tensor) and s.ndim == 3) for s in x)
    )
