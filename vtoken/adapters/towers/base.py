"""Base of towers: attention of a vision tower, read from its projections whatever its kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...hooks import Hook, rebuilt
from ...kernels import attention_rows, received_attention
from ...tokens import Needs, TowerInfo
from ..encoders.layer import EncoderLayer
from ..encoders.transformers import TransformersLayer
from .capture import Capture

if TYPE_CHECKING:
    from .blocks import Block


class Tower:
    """A vision tower, as strategies see it.

    Subclasses find the attention modules and turn their projections into heads. The default serves towers
    with `q_proj` and `k_proj` over a batch of segments (CLIP, SigLIP).

    Args:
        module: the tower.
        feature_layer: the layer whose output feeds the projector.
        pool: (..., patches) -> (..., cells) if the model pools patches, None if a patch is a cell.
    """

    has_cls = False
    rows_are_frames = False  # whether a layer reads (frames, tokens, C)
    equal_grids = False  # whether one forward is a batch of square grids of one size

    def __init__(
        self, module: nn.Module, feature_layer: int, pool: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.module, self.pool = module, pool
        self.info = TowerInfo(
            len(self.layers), feature_layer, self.has_cls, self.global_layers(), self.num_heads()
        )

    @property
    def layers(self) -> list[nn.Module]:
        """The present transformer layers, first to last."""
        return self.find_layers()

    def follow(self, found: Tower, read: bool) -> None:
        """Continue with the module of `found`, the same tower looked up again.

        Args:
            read: whether values inside are read, which requires the shape of the patched tower.

        Raises:
            RuntimeError: if it has another shape.
        """
        if read and found.info != self.info:
            raise rebuilt(
                f"The vision tower has {found.info.num_layers} layers of another kind than when it was"
                " patched"
            )
        self.module, self.info = found.module, found.info

    # -- to override -----------------------------------------------------------------------------------------
    def find_layers(self) -> list[nn.Module]:
        """The transformer layers, first to last."""
        holder: Any = getattr(self.module, "vision_model", self.module)
        return list(holder.encoder.layers)

    def global_layers(self) -> tuple[int, ...]:
        """The layers in which all patches of a segment attend to each other."""
        return tuple(range(len(self.layers)))

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        return self.layers[layer].self_attn  # type: ignore[return-value]

    def projections(self, layer: int) -> tuple[nn.Module, ...]:
        """The modules whose outputs are queries and keys, (segments, tokens, heads * head_dim)."""
        attention = self.attention(layer)
        return attention.q_proj, attention.k_proj  # type: ignore[return-value]

    def num_heads(self) -> int:
        """Attention heads per layer."""
        return int(self.attention(0).num_heads)  # type: ignore[arg-type]

    def scale(self, layer: int) -> float:
        """Factor on the attention logits of a layer."""
        return float(self.attention(layer).head_dim) ** -0.5  # type: ignore[arg-type]

    def received(self, capture: Capture, query: Tensor, key: Tensor, layer: int) -> Tensor:
        """(segments, tokens) attention received by each token, from (segments, heads, tokens, head_dim)."""
        return received_attention(query, key, self.scale(layer))

    def to_cells(self, value: Tensor) -> Tensor:
        """Values per patch (..., patches) -> per cell (..., cells), the mean over the patches of a cell."""
        return value if self.pool is None else self.pool(value)

    def block(self, layer: int) -> Block:
        """The parts of a layer, for towers whose layers can compute some tokens only."""
        raise NotImplementedError(f"{type(self).__name__} cannot compute a part of the tokens of a layer.")

    def split_layers(self) -> list[EncoderLayer]:
        """The layers in halves, for towers inside which tokens can be merged between attention and MLP."""
        return [TransformersLayer(module) for module in self.layers]

    @property
    def can_mix(self) -> bool:
        """Whether frames can attend to each other between a layer's attention and its MLP."""
        return self.rows_are_frames and all(layer.known for layer in self.split_layers())

    def frame_grids(self, args: Any, kwargs: dict[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of the patches of every frame of a forward with these arguments."""
        pixels: Tensor = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        patch: Any = self.module.config.patch_size  # type: ignore[union-attr]
        return [(pixels.shape[-2] // patch, pixels.shape[-1] // patch)] * len(pixels)

    def frame_patches(self, args: Any, kwargs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Per frame, the places that are computed together, with the same arguments as `frame_grids`.

        Returns:
            (rows, columns, patches, values), pixels in the units of the tower's input; and (rows, columns,
            patches) int64, the tokens of these patches among those of the frame, without CLS.
        """
        pixels: Tensor = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        side: Any = self.module.config.patch_size  # type: ignore[union-attr]
        patches = pixels.unfold(2, side, side).unfold(3, side, side)  # (frames, 3, rows, columns, side, side)
        each = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)[:, :, :, None]
        tokens = torch.arange(each.shape[1] * each.shape[2]).view(*each.shape[1:3], 1)
        return [(frame, tokens) for frame in each]

    def on_grid(
        self, values: list[Tensor], grids: list[tuple[int, int]], args: Any, kwargs: dict[str, Any]
    ) -> list[Tensor]:
        """Per frame, values of its patches in the tower's order (patches,) -> (rows, columns)."""
        return [value.view(grid) for value, grid in zip(values, grids, strict=True)]

    @property
    def embedding(self) -> nn.Module | None:
        """The module that embeds the pixels of each patch alone, in the order of `frame_patches`, if any."""
        return None

    @property
    def mergers(self) -> list[nn.Module]:
        """Modules that make one row of the patches of each place alone, from a layer's output."""
        return []

    # -- provided --------------------------------------------------------------------------------------------
    @property
    def can_reuse(self) -> bool:
        """Whether some tokens of a frame can be computed and the others taken from an earlier frame."""
        return type(self).block is not Tower.block

    @property
    def width(self) -> int:
        """Channels of the layers."""
        config: Any = self.module.config
        return int(getattr(config, "embed_dim", None) or config.hidden_size)

    @property
    def can_merge(self) -> bool:
        """Whether tokens may be merged inside: a patch is a cell, and all segments have one length."""
        return self.equal_grids and self.pool is None and type(self).to_cells is Tower.to_cells

    @property
    def provides(self) -> frozenset[str]:
        kinds = {"received_attention", "keys"} | ({"states"} if self.rows_are_frames else set())
        return frozenset(kinds | {"cls_attention", "cls_logits"} if self.has_cls else kinds)

    def taps(self, needs: Needs, active: Callable[[], Capture | None]) -> list[Hook]:
        """Hooks on the projections of the layers in `needs`; they act while `active()` is a Capture."""
        hooks: list[Hook] = []
        for layer in sorted(needs.tower_layers):
            query, key = self.projections(layer)
            hooks.append(Hook(query, functools.partial(self._on_query, active, layer)))
            hooks.append(Hook(key, functools.partial(self._on_key, active, layer)))
        hooks += [
            Hook(self.layers[i], functools.partial(self._on_output, active, i))
            for i in sorted(set(needs.states))
        ]
        return hooks

    def _on_output(
        self, active: Callable[[], Capture | None], layer: int, module: Any, args: Any, out: Any
    ) -> None:
        capture = active()
        if capture is not None and (capture.temporal is None or layer < capture.temporal.first):
            hidden = out[0] if isinstance(out, tuple) else out
            capture.add("states", layer, self.maps(hidden[:, None]))

    def maps(self, hidden: Tensor) -> Tensor:
        """Hidden states (segments, frames, tokens, C) as square maps (segments, frames, rows, columns, C)."""
        patches = hidden[:, :, int(self.has_cls) :]
        side = math.isqrt(patches.shape[2])
        if side * side != patches.shape[2]:
            raise rebuilt(f"The vision tower has {patches.shape[2]} patches, which are no square")
        return patches.unflatten(2, (side, side))

    def _on_query(
        self, active: Callable[[], Capture | None], layer: int, module: Any, args: Any, out: Any
    ) -> None:
        capture = active()
        if capture is not None:
            capture.pending["query", layer] = out

    def _on_key(
        self, active: Callable[[], Capture | None], layer: int, module: Any, args: Any, out: Any
    ) -> None:
        capture = active()
        query = None if capture is None else capture.pending.pop(("query", layer), None)
        if capture is None or query is None:
            return
        with torch.no_grad():
            self.record(capture, layer, self.heads(query, layer), self.heads(out, layer))

    def heads(self, x: Tensor, layer: int) -> Tensor:
        """(segments, tokens, heads * head_dim), or already split -> (segments, heads, tokens, head_dim)."""
        if not isinstance(x, Tensor):
            raise rebuilt(
                f"A projection in layer {layer} of the vision tower answers with a {type(x).__name__}"
            )
        if x.ndim == 4:
            return x
        return x.view(*x.shape[:2], -1, int(self.attention(layer).head_dim)).transpose(1, 2)  # type: ignore[arg-type]

    def record(self, capture: Capture, layer: int, query: Tensor, key: Tensor) -> None:
        """Add the wanted values of one layer; query and key: (segments, heads, tokens, head_dim)."""
        first = int(self.has_cls)

        def cells(value: Tensor) -> Tensor:
            return self.to_cells(value if capture.merged is None else capture.merged.per_patch(value))

        if layer in capture.needs.cls_attention:
            rows = attention_rows(query[:, :, :1], key, self.scale(layer))[:, :, 0, 1:]
            capture.add("cls_attention", layer, cells(rows))
        if layer in capture.needs.cls_logits:
            # the mean over heads of q_h k_h is the product of all heads side by side, divided by their number
            logits = torch.einsum("shd,shnd->sn", query[:, :, 0].float(), key[:, :, 1:].float())
            capture.add("cls_logits", layer, cells(logits * (self.scale(layer) / query.shape[1])))
        if layer in capture.needs.received_attention:
            capture.add(
                "received_attention", layer, cells(self.received(capture, query, key, layer)[:, first:])
            )
        if layer in capture.needs.keys:
            flat = key[:, :, first:].transpose(1, 2).flatten(2)
            capture.add("keys", layer, cells(flat.transpose(1, 2)).transpose(1, 2))
