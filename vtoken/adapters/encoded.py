"""The vision side: what `get_image_features` and `get_video_features` gave, with the scores their tower made on the way.

Newer transformers encodes inside `generate()`, before the prompt is read; older releases inside `forward`. Either way the
result travels on the very object that the model's own method returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..tokens import Needs, VisualTokens
from .base import Adapter, Layout
from .sequence import ENCODED, State, Wrapped
from .towers.base import Capture


@dataclass
class EncodedVisuals:
    """All images, or all videos, of one batch in placeholder order."""

    modality: str
    items: list[VisualTokens]

    @property
    def total(self) -> int:
        return sum(len(item) for item in self.items)


class VisionWatch:
    """Hooks on the vision side of a patched model.

    Args:
        adapter: the model's parts and geometry.
        needs: per modality what is read from the tower.
        state: shared with the sequence hooks.
        timer: `timer(name)` is a context manager that times a stage.
    """

    def __init__(self, adapter: Adapter, needs: dict[str, Needs], state: State, timer: Callable[[str], Any]) -> None:
        self.adapter, self.needs, self.state, self.timer = adapter, needs, state, timer
        self.wrapped = Wrapped()
        self.handles: list[Any] = []
        for modality in adapter.modalities:
            name = f"get_{modality}_features"
            if hasattr(adapter.base, name):
                self.wrapped.wrap(adapter.base, name, getattr(self, f"_{modality}_features"))
            if modality in needs and modality in adapter.towers:
                self.handles += adapter.towers[modality].tap(needs[modality], self._active)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.wrapped.remove()

    def _active(self) -> Capture | None:
        return self.state.capture

    def _image_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._features("image", original, args, kwargs)

    def _video_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._features("video", original, args, kwargs)

    def _features(self, modality: str, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        state = self.state
        if state.disabled or modality not in self.needs or state.capture is not None:
            return original(*args, **kwargs)
        state.capture = capture = Capture(self.needs[modality])
        try:
            with self.timer("tower"):
                output = original(*args, **kwargs)
        finally:
            state.capture = None
        if isinstance(output, tuple):  # return_dict=False: not a call of generate() or forward()
            return output
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        encoded = self._encode(modality, output, dict(bound.arguments), capture)
        setattr(output, ENCODED, encoded)
        if state.call is not None:  # encoded inside forward
            state.call.encoded[modality] = encoded
        elif state.generating is not None:
            state.generating.encoded[modality] = encoded
        return output

    def _encode(self, modality: str, output: Any, arguments: dict[str, Any], capture: Capture) -> EncodedVisuals:
        features = self.adapter.split_features(modality, output, arguments)
        layouts = self.adapter.layouts(modality, features, arguments)
        captured = capture.joined()
        tower = self.adapter.towers.get(modality)
        items, start = [], 0
        for f, layout in zip(features, layouts, strict=True):
            stop = start + len(layout.segments)
            provided = {key: value[start:stop] for key, value in captured.items()}
            items.append(self._tokens(modality, f, layout, tower, provided))
            start = stop
        for (what, layer), value in captured.items():
            if len(value) != start:
                raise RuntimeError(
                    f"{what}({layer}) was read for {len(value)} segments but the layout has {start}: "
                    f"{type(self.adapter).__name__} does not know this kind of input."
                )
        return EncodedVisuals(modality, items)

    @staticmethod
    def _tokens(modality: str, features: Tensor, layout: Layout, tower: Any, provided: dict[Any, Tensor]) -> VisualTokens:
        if len(layout.cells) != len(features):
            raise RuntimeError(
                f"The layout of this {modality} has {len(layout.cells)} tokens, the model made {len(features)}: "
                "please report the model and the input's size."
            )
        return VisualTokens(
            features=features,
            segments=layout.segments,
            cells=layout.cells.to(features.device),
            tower=None if tower is None else tower.info,
            modality=modality,
            provided=dict(provided),  # type: ignore[arg-type]
        )


@dataclass
class Prompt:
    """A running `generate()`: a chunked prefill sees only pieces of this."""

    input_ids: Tensor | None
    encoded: dict[str, EncodedVisuals] = field(default_factory=dict)


def generating(state: State, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` with a note of its prompt."""
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    outer, state.generating = state.generating, Prompt(ids if isinstance(ids, Tensor) else None)
    try:
        return original(*args, **kwargs)
    finally:
        state.generating = outer
