"""Hooks on `get_image_features` and `get_video_features`, which attach the tower's scores to the result.

Newer transformers encodes inside `generate()`, before the prompt is read; older releases inside `forward`.
In both cases the result travels on the object that the model's own method returns.
"""

from __future__ import annotations

import copy
import functools
import inspect
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import Adapter, Layout
from ..adapters.towers.capture import Capture
from ..hooks import Hooks, Wrapped, rebuilt
from ..selection import Selection
from ..streams import PixelReuse, Reuse, StreamState, TowerUse, current_stream
from ..temporal import Temporal
from ..tokens import TOWER_NEEDS, Needs, VisualTokens
from .forward_context import ENCODED, Admission, ForwardContext
from .frame_passes import FramePasses
from .prompt import EncodedVisuals, tensors_of
from .tower_frames import TowerFrames
from .tower_merging import EncoderMerging
from .tower_pixels import PixelSkipping
from .tower_reuse import FrameReuse
from .transformers_names import check_features


class VisionHooks:
    """Hooks on the vision side of a patched model.

    Args:
        adapter: the model's parts and geometry.
        needs: per modality, the values read from the tower.
        context: shared with the other hooks.
        gate: tells which calls are this patch's.
        timer: `timer(name)` is a context manager that times a stage.
        merging: per modality, the tower layers after which tokens are merged, if the tower allows it.
        merging_strategy: asked in these layers.
        reuse: per modality, the reuse inside the tower.
        temporal: per modality, () -> the strategy's attention across frames.
        used: called with the work of a tower that reuses: `used(modality, TowerUse)`.
        select: `select(VisualTokens) -> Selection`, called once for every frame of a stream, for its memory;
            None for a strategy that cannot choose before the prompt is known.
        handed_out: called with the tokens encoded for the user, outside of `forward`, `generate` and streams.
    """

    def __init__(
        self,
        adapter: Adapter,
        needs: dict[str, Needs],
        context: ForwardContext,
        gate: Admission,
        timer: Callable[[str], Any],
        merging: dict[str, tuple[int, ...]] | None = None,
        merging_strategy: Any = None,
        reuse: dict[str, Reuse | PixelReuse] | None = None,
        used: Callable[[str, TowerUse], None] | None = None,
        select: Callable[[VisualTokens], Selection] | None = None,
        handed_out: Callable[[EncodedVisuals], None] | None = None,
        temporal: dict[str, Callable[[], Temporal]] | None = None,
    ) -> None:
        self.adapter, self.needs, self.context, self.gate, self.timer = adapter, needs, context, gate, timer
        self.reuse, self.used, self.select, self.handed_out = reuse or {}, used, select, handed_out
        self.key = uuid.uuid4().hex
        self.wrapped = Wrapped()
        self.hooks: list[Any] = []  # each has refresh() and remove()
        self.merging = merging or {}
        self.temporal = temporal or {}
        self.passes = FramePasses(adapter, self.reuse, self.temporal)
        self._wrap_towers()
        for modality in adapter.modalities:
            name = f"get_{modality}_features"
            if hasattr(adapter.base, name):
                self.wrapped.wrap(adapter.base, name, getattr(self, f"_{modality}_features"))
            if modality in needs and modality in adapter.towers:
                active = functools.partial(self._active, modality)
                tower, layers = adapter.towers[modality], self.merging.get(modality, ())
                self.hooks.append(Hooks(functools.partial(tower.taps, needs[modality], active)))
                if merging_strategy is not None and layers and tower.can_merge:
                    self.hooks.append(EncoderMerging(tower, layers, merging_strategy, active))
                if modality in self.temporal:
                    self.hooks.append(TowerFrames(tower, self.temporal[modality], active))

    def _wrap_towers(self) -> None:
        """Wrap the layers of every tower that reuses, once where images and videos share it."""
        modules: set[int] = set()
        for modality, reuse in self.reuse.items():
            tower = self.adapter.towers[modality]
            if id(tower.module) not in modules:
                modules.add(id(tower.module))
                read = {layer for needs in self.needs.values() for layer in needs.tower_layers}
                if isinstance(reuse, PixelReuse):
                    self.hooks.append(PixelSkipping(tower, reuse, read, self._capture, modality))
                else:
                    self.hooks.append(FrameReuse(tower, reuse, read, self._capture, modality))

    def remove(self) -> None:
        for hooks in self.hooks:
            hooks.remove()
        self.hooks = []
        self.wrapped.remove()

    def _follow(self) -> None:
        """Look the towers and their parts up again: adapters or quantisation may have replaced them.

        Raises:
            RuntimeError: for a tower that cannot be read as the one that was patched.
        """
        try:
            now = self.adapter.make_towers()
            for modality, tower in self.adapter.towers.items():
                tower.follow(now[modality], modality in self.needs and self._reads(modality))
            for hooks in self.hooks:
                hooks.refresh()
        except (AttributeError, KeyError, IndexError, TypeError, NotImplementedError) as error:
            raise rebuilt(f"The vision tower can no longer be read ({error})") from error

    def _reads(self, modality: str) -> bool:
        """Whether a value inside the tower is read or changed."""
        return bool(self.needs[modality].tower_layers or self.merging.get(modality) or modality in self.reuse)

    def _capture(self) -> Capture | None:
        return self.context.capture

    def _active(self, modality: str) -> Capture | None:
        """The running capture; images and videos may share a tower, each with its own view."""
        capture = self.context.capture
        return capture if capture is not None and capture.modality == modality else None

    def _image_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._features(self._modality(args, kwargs), original, args, kwargs)

    def _modality(self, args: Any, kwargs: dict[str, Any]) -> str:
        """The modality of a call of `get_image_features`, which encodes videos too where it is alone."""
        call = self.context.call
        frames = None if call is None else call.given.get("pixel_values_videos")
        if frames is None or hasattr(self.adapter.base, "get_video_features"):
            return "image"
        return "video" if any(x is frames for x in (*args, *kwargs.values())) else "image"

    def _video_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._features("video", original, args, kwargs)

    @torch.compiler.disable
    def _features(
        self, modality: str, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        with self.gate.call() as served:
            self.context.disabled = self.gate.disabled()
            return self._encoded(modality, original, args, kwargs) if served else original(*args, **kwargs)

    def _encoded(self, modality: str, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        context = self.context
        if context.disabled or modality not in self.needs or context.capture is not None:
            return original(*args, **kwargs)
        self.gate.check()
        self._follow()
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        given = self._told() | bound.arguments | bound.arguments.get("kwargs", {})
        stream = current_stream(self.adapter.model)
        stream = None if stream is None else stream.bind(self.key)
        prompt = None if stream is None else context.prompt
        known = None if prompt is None else prompt.features_of(modality, stream, bound.arguments)
        if known is not None:
            if context.call is not None:
                context.call.encoded[modality] = getattr(known, ENCODED)
            return known
        frames = self.passes.of_reuse(modality, given, stream)
        context.capture = capture = Capture(modality, self.needs[modality], frames=frames)
        capture.temporal = self.passes.of_attention(modality, given, stream)
        try:
            with self.timer("tower"):
                output = original(*args, **kwargs)
        finally:
            context.capture = None
        self._commit(modality, capture)
        if isinstance(output, tuple):  # return_dict=False: not a call of generate() or forward()
            return output
        encoded = self._encode(modality, output, given, capture)
        if self.needs[modality].pixels:
            for item, pixels in zip(encoded.items, self.adapter.frame_pixels(modality, given), strict=True):
                item.pixels, item.encode = (
                    pixels,
                    functools.partial(self._encode_frames, modality, original, given),
                )
        if stream is not None:
            self._push(encoded, stream)
        setattr(output, ENCODED, encoded)
        if prompt is not None:
            prompt.pushed[modality] = stream, tensors_of(bound.arguments), output
        self._hand_on(modality, encoded, stream)
        return output

    def _commit(self, modality: str, capture: Capture) -> None:
        """Check what was read of a tower that has run, and keep what later frames reuse."""
        missing = capture.missing if modality in self.adapter.towers else []
        if missing:
            raise rebuilt(
                f"The vision tower ran without the projections that {missing[0][0]}({missing[0][1]}) is read"
                " from"
            )
        if capture.frames is not None:
            capture.frames.commit()
            if self.used is not None:
                self.used(modality, capture.frames.use)
        if capture.temporal is not None:
            capture.temporal.commit()

    def _hand_on(self, modality: str, encoded: EncodedVisuals, stream: StreamState | None) -> None:
        """Leave the record where the reader of the prompt looks for it."""
        context = self.context
        if context.call is not None:  # encoded inside forward
            context.call.encoded[modality] = encoded
        elif context.early is not None:  # encoded by the model's head
            context.early.encoded[modality] = encoded
        elif context.prompt is not None:
            context.prompt.encoded[modality] = encoded
            context.unread = True
        elif stream is None and self.handed_out is not None:
            self.handed_out(encoded)

    def read(self, modality: str, output: Any) -> EncodedVisuals | None:
        """The record in an output of `get_*_features`, None if it was made without a patch.

        Raises:
            ValueError: for an output of a strategy that reads or merges otherwise in the vision tower.
        """
        encoded: EncodedVisuals | None = getattr(output, ENCODED, None)
        if encoded is None or modality not in self.needs or self.gate.disabled():
            return encoded
        mine, theirs = self.needs[modality], encoded.needs
        lacking = (
            any(set(getattr(mine, x)) - set(getattr(theirs, x)) for x in TOWER_NEEDS)
            or mine.pixels > theirs.pixels
        )
        mixed_by = self.key if modality in self.temporal else None
        if lacking or encoded.merging != self.merging.get(modality, ()) or encoded.mixed_by != mixed_by:
            raise ValueError(
                f"These {modality} features were encoded under another strategy, which reads or merges other"
                f" things in the vision tower than the present one: call get_{modality}_features again."
            )
        return encoded

    def _push(self, encoded: EncodedVisuals, stream: StreamState) -> None:
        """Add these frames to a stream. Later questions about them use the memory before them."""
        memory, picks = copy.deepcopy(stream.memory), []
        for item in encoded.items:
            item.memory = copy.deepcopy(memory)
            if self.select is not None:
                with torch.no_grad():
                    picks.append(self.select(replace(item, memory=memory)))
        stream.memory = memory
        encoded.picks = picks if self.select is not None else None

    def _encode_frames(
        self, modality: str, original: Callable[..., Any], like: dict[str, Any], pixels: Tensor
    ) -> Tensor:
        """(k, cells, d) features of k further frames (k, 3, H, W), cells in raster order."""
        given = self.adapter.frame_arguments(
            modality, pixels.to(like[self.adapter.pixel_argument(like)]), like
        )
        with torch.no_grad():
            output = original(**given)
        features = self.adapter.split_features(modality, output, given)
        frames = []
        for f, layout in zip(features, self.adapter.layouts(modality, features, given), strict=True):
            place, first = layout.cells.to(f.device), 0
            for segment in layout.segments[: None if modality == "video" else 1]:
                frames.append(f[(place >= first) & (place < first + segment.size)])
                first += segment.size
        return torch.stack(frames)

    def _told(self) -> dict[str, Any]:
        """The prompt's arguments that the adapter wants in addition to those of `get_*_features`."""
        sources = [x.given for x in (self.context.call, self.context.prompt) if x is not None]
        told = (
            (n, next((g[n] for g in sources if g.get(n) is not None), None))
            for n in self.adapter.prompt_arguments
        )
        return {name: value for name, value in told if value is not None}

    def _encode(
        self, modality: str, output: Any, arguments: dict[str, Any], capture: Capture
    ) -> EncodedVisuals:
        check_features(output, self.adapter)
        features = self.adapter.split_features(modality, output, arguments)
        layouts = self.adapter.layouts(modality, features, arguments)
        counts = [len(layout.segments) for layout in layouts]
        parts = zip(features, layouts, capture.per_item(counts), capture.merged_per_item(counts), strict=True)
        tower = self.adapter.towers.get(modality)
        items = [self._tokens(modality, *part, tower) for part in parts]
        mixed_by = self.key if modality in self.temporal else None
        merging = self.merging.get(modality, ())
        return EncodedVisuals(modality, items, self.needs[modality], merging, mixed_by=mixed_by)

    @staticmethod
    def _tokens(
        modality: str,
        features: Tensor,
        layout: Layout,
        provided: dict[Any, Tensor],
        merged: Tensor | None,
        tower: Any,
    ) -> VisualTokens:
        if len(layout.cells) != len(features):
            raise RuntimeError(
                f"The layout of this {modality} has {len(layout.cells)} tokens, the model made"
                f" {len(features)}: please report the model and the input's size."
            )
        return VisualTokens(
            features=features,
            segments=layout.segments,
            cells=layout.cells.to(features.device),
            tower=None if tower is None else tower.info,
            modality=modality,
            merged=merged,
            provided=dict(provided),  # type: ignore[arg-type]
        )
