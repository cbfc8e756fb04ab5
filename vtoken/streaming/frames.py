"""Encode frames with a model's processor and `get_*_features`, and build prompts without pixels."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.base import Adapter
from .memory import Step, change_between

# all state in `Frames` that a stream changes
STREAM_FACTS = ("sample", "before", "rows", "tail", "modality", "timed", "shape")
_LOCKS: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()  # one per tokenizer


class PartStub:
    """Replaces a part of a processor: records its output, or returns a given one without reading pixels."""

    def __init__(self, part: Any, given: Any = None) -> None:
        self.part, self.given = part, given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.given is None:
            self.given = self.part(*args, **kwargs)
            return self.given
        return copy.copy(self.given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # attributes that copy and pickle look for
            raise AttributeError(name)
        return getattr(self.part, name)


class Frames:
    """Turns frames into `Step`s, and texts about steps into the processor's inputs.

    Args:
        adapter: the model's parts.
        processor: the model's processor.
        options: further arguments of the processor.

    Raises:
        ValueError: if the processor reads neither videos nor images.
    """

    def __init__(self, adapter: Adapter, processor: Any, options: dict[str, Any]) -> None:
        self.adapter, self.processor, self.options = adapter, processor, options
        name = type(processor).__name__
        video = getattr(processor, "video_processor", None) is not None and getattr(
            processor, "video_token", None
        )
        if not video and getattr(processor, "image_processor", None) is None:
            raise ValueError(
                f"A stream needs the model's processor, found {name}: load it with AutoProcessor."
            )
        self.media = "video" if video else "image"
        self.part = f"{self.media}_processor"
        self.token = getattr(processor, f"{self.media}_token")
        self.unit = int(getattr(getattr(processor, self.part), "temporal_patch_size", 1) if video else 1)
        tokenizer = getattr(processor, "tokenizer", processor)
        self.lock = _LOCKS.setdefault(tokenizer, threading.Lock())
        self.reset()

    def reset(self) -> None:
        """Delete the stream's state."""
        self.sample: dict[str, Any] | None = None
        self.before: Tensor | None = None
        self.rows = self.tail = 0
        self.modality = ""
        self.timed = False
        self.shape: tuple[Any, int, Any] = (Tensor, 2, None)

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """Restore the previous state of the stream if the block raises."""
        before = {name: getattr(self, name) for name in STREAM_FACTS}
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            raise

    # -- frames ----------------------------------------------------------------------------------------------
    def check(self, frame: np.ndarray) -> None:
        """Raise ValueError if the processor cannot read the stream's first frame, (h, w, 3) uint8."""
        self._process([frame] * self.unit)

    @torch.no_grad()
    def encode(
        self, frames: Sequence[np.ndarray], seconds: Sequence[float], patch: Any, remember: bool = True
    ) -> Step:
        """Encode one step of `unit` frames (h, w, 3) uint8; fewer are filled up with the last one.

        Args:
            patch: the model's patch, None if it has none.
            remember: whether the next step's change is measured against this one.
        """
        frames = [*frames, *[frames[-1]] * (self.unit - len(frames))]
        inputs = self._process(frames)
        model, base = self.adapter.model, self.adapter.base
        method = getattr(base, f"get_{self.modality}_features")
        names = inspect.signature(method).parameters
        arguments = {
            k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k in names
        }
        output = method(**arguments, return_dict=True)
        pieces = self.adapter.split_features(self.modality, output, arguments)
        rows = torch.cat(pieces)
        if len(rows) != self.rows + self.tail:
            raise RuntimeError(
                f"The processor foresees {self.rows + self.tail} visual tokens per step, the model made"
                f" {len(rows)}: use the processor that belongs to this model."
            )
        first = output.pooler_output
        self.shape = (type(first), first.ndim if isinstance(first, Tensor) else first[0].ndim, type(output))
        layouts = self.adapter.layouts(self.modality, pieces, arguments)
        offsets = np.cumsum([0] + [sum(s.size for s in x.segments) for x in layouts[:-1]]).tolist()
        cells = torch.cat([torch.where(x.cells < 0, -1, x.cells.cpu() + o) for x, o in zip(layouts, offsets)])
        segments = [s for x in layouts for s in x.segments]
        everything = torch.arange(len(rows), device=rows.device)
        keep, kept_rows = (everything, rows) if patch is None else patch.encode(output, rows)
        own = rows[: self.rows]
        change = change_between(self.before, own)
        if remember:
            self.before = own
        inside = keep < self.rows
        deepstack = getattr(output, "deepstack_features", None)
        if deepstack is not None:
            deepstack = torch.stack([torch.cat(list(level)) for level in deepstack])[:, keep[inside]]
        places = keep[inside].cpu()
        return Step(
            seconds=tuple(float(s) for s in seconds),
            features=kept_rows[inside],
            kept=places,
            rows=self.rows,
            cells=cells[places],
            grid=segments[0].grid if len(segments) == 1 else None,
            tail=kept_rows[~inside] if self.tail else None,
            deepstack=deepstack,
            change=change,
        )

    def _process(self, frames: Sequence[np.ndarray]) -> Mapping[str, Any]:
        """The processor's inputs of one step; the first one also counts placeholders."""
        stub = PartStub(getattr(self.processor, self.part))
        try:
            inputs = self._run(self.token, stub, frames, [0.0] * len(frames), 1.0)
        except Exception as error:
            high, wide = frames[0].shape[:2]
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"The model's processor cannot read a frame of {wide} x {high} pixels: {why}"
            ) from error
        if self.sample is None:
            self.modality = "video" if "pixel_values_videos" in inputs else "image"
            self.sample = {k: _hollow(v) for k, v in stub.given.items() if k != "video_metadata"}
            one, two = (self.placeholders(self.replay(self.marks(n), n, [], 1.0)) for n in (1, 2))
            self.rows, self.tail = int(two.sum() - one.sum()), int(2 * one.sum() - two.sum())
            runs = int((two.int().diff() == 1).sum()) + int(two[0])
            self.timed = hasattr(self.adapter.base, "get_rope_index") and runs == 1
        return inputs

    def _run(
        self, text: str, stub: PartStub, frames: Sequence[Any], times: Sequence[float], fps: float
    ) -> Any:
        """Run the processor on one prompt, with `stub` in place of the part that reads pixels."""
        media: dict[str, Any] = {"images": list(frames)}
        if self.media == "video":
            facts = _facts(times, len(frames), fps)
            media = {"videos": [np.stack(list(frames))], "video_metadata": [facts], "do_sample_frames": False}
        processor = copy.copy(self.processor)
        setattr(processor, self.part, stub)
        with self.lock:
            return processor(text=[text], return_tensors="pt", **media, **self.options)

    def replay(self, text: str, steps: int, times: Sequence[float], fps: float) -> Any:
        """The processor's inputs for a prompt about so many steps, without pixels."""
        from transformers.video_utils import VideoMetadata

        assert self.sample is not None
        if self.media == "image":
            given = {k: _repeated(k, v, steps) for k, v in self.sample.items()}
        else:
            given = {k: _longer(v, steps) for k, v in self.sample.items()}
            given["video_metadata"] = [VideoMetadata(**_facts(times, steps * self.unit, fps))]
        blank = np.zeros((2, 2, 3), np.uint8)
        frames = [blank] * (steps * self.unit)
        return self._run(text, PartStub(getattr(self.processor, self.part), given), frames, times, fps)

    def placeholders(self, inputs: Any) -> Tensor:
        """(n,) bool, the placeholders among the tokens."""
        return self.adapter.find_placeholders(inputs["input_ids"])[self.modality][0]

    def marks(self, steps: int) -> str:
        """The placeholders of so many steps, before the processor expands them."""
        return self.token * (steps if self.media == "image" else 1)

    def features_of(self, steps: Sequence[Step]) -> Any:
        """The output of `get_*_features` for these steps."""
        device = self.adapter.model.device
        tail = steps[-1].tail
        rows = torch.cat([s.features for s in steps] + ([] if tail is None else [tail])).to(device)
        kind, ndim, output = self.shape
        rows = rows.view(*[1] * (ndim - 2), *rows.shape)
        extra: dict[str, Any] = {}
        if steps[0].deepstack is not None:
            deep = torch.cat([s.deepstack for s in steps if s.deepstack is not None], 1).to(device)
            extra["deepstack_features"] = [[level] for level in deep]
        return output(pooler_output=rows if issubclass(kind, Tensor) else [rows], **extra)


def _facts(times: Sequence[float], count: int, fps: float) -> dict[str, Any]:
    """Metadata of a video of `count` frames; frame numbers are times at the given rate."""
    numbers: list[Any] = [t * fps for t in times] if len(times) == count else list(range(count))
    numbers = [int(n) if n == int(n) else n for n in numbers]
    return {"total_num_frames": count, "fps": fps, "frames_indices": numbers, "duration": count / fps}


def _hollow(value: Any) -> Any:
    """Pixels of the same shape, all zero, that take no memory."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.zeros((), dtype=value.dtype).expand(value.shape)
    return value


def _repeated(name: str, value: Any, count: int) -> Any:
    """An image processor's output for one image, repeated for several images of the same size."""
    if name == "batch_num_images":
        return torch.tensor([count])
    if isinstance(value, Tensor) and value.is_floating_point():
        return value[:1].expand(value.shape[0] * count, *value.shape[1:])
    if isinstance(value, Tensor):
        return value.repeat(count, *[1] * (value.ndim - 1))
    return value * count if isinstance(value, list) else value


def _longer(value: Any, steps: int) -> Any:
    """A video processor's output for one step, extended to a video of several steps."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == (1, 3) and not value.is_floating_point():
        return value * torch.tensor([steps, 1, 1])
    return value[:, :1].expand(-1, value.shape[1] * steps, *value.shape[2:]) if value.ndim == 5 else value
