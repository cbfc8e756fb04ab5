"""Frames and prompts through a model's own processor and its own `get_*_features`."""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.base import Adapter
from ..adapters.encoded import ENCODED
from ..kernels import gather_merge
from ..tokens import Selection, concat_selections
from .memory import Step, change_between

GAP = 16  # steps that a gap between remembered frames counts for at most in multimodal rope

_LOCKS: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()  # one per tokenizer


class Stand:
    """Stands in for a processor's part: notes what the part gave, or gives what it was told without reading pixels."""

    def __init__(self, part: Any, given: Any = None) -> None:
        self.part, self.given = part, given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.given is None:
            self.given = self.part(*args, **kwargs)
            return self.given
        return copy.copy(self.given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for
            raise AttributeError(name)
        return getattr(self.part, name)


@dataclass
class PromptInputs:
    """A prompt about some steps, ready for `generate`.

    Attributes:
        arguments: of `generate`, on the model's device: `input_ids` (1, n), masks, `position_ids`, and the features.
        visual: (n,) bool, which tokens are visual.
        seconds: times of the frames that it is about.
    """

    arguments: dict[str, Any]
    visual: Tensor
    seconds: tuple[float, ...]

    @property
    def length(self) -> int:
        return int(self.arguments["input_ids"].shape[1])


class Frames:
    """Turns frames into `Step`s, and steps into prompts.

    Args:
        adapter: the model's parts.
        processor: the model's processor.
        prompt: "{frames}" and "{question}" in a text of one's own; None asks the processor's chat template.
        system: system message for the chat template.
        fps: frames per second, None to take the median distance between frames.
        options: further arguments of the processor.

    Raises:
        ValueError: if the processor reads neither videos nor images, or has no chat template and no prompt was given.
    """

    def __init__(
        self,
        adapter: Adapter,
        processor: Any,
        prompt: str | None,
        system: str | None,
        fps: float | None,
        options: dict[str, Any],
    ) -> None:
        self.options = options
        self.adapter, self.processor, self.system, self.fps = adapter, processor, system, fps
        name = type(processor).__name__
        video = getattr(processor, "video_processor", None) is not None and getattr(processor, "video_token", None)
        if not video and getattr(processor, "image_processor", None) is None:
            raise ValueError(f"A stream needs the model's processor, found {name}: load it with AutoProcessor.")
        self.media = "video" if video else "image"
        self.part = f"{self.media}_processor"
        self.token = getattr(processor, f"{self.media}_token")
        if prompt is None and getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f'This {name} has no chat template: pass prompt="... {{frames}} ... {{question}} ...", the text of a prompt.'
            )
        self.prompt = prompt
        self.unit = int(getattr(getattr(processor, self.part), "temporal_patch_size", 1) if video else 1)
        tokenizer = getattr(processor, "tokenizer", processor)
        self.lock = _LOCKS.setdefault(tokenizer, threading.Lock())
        self.reset()

    def reset(self) -> None:
        self.sample: dict[str, Any] | None = None
        self.before: Tensor | None = None
        self.rows = self.tail = 0
        self.modality = ""
        self.timed = False
        self.shape: tuple[Any, int, Any] = (Tensor, 2, None)

    # -- frames -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode(self, frames: Sequence[np.ndarray], seconds: Sequence[float], patch: Any, remember: bool = True) -> Step:
        """One step of `unit` frames (h, w, 3) uint8; fewer are filled up with the last one.

        Args:
            patch: what `vtoken.patch` put on the model, None if nothing.
            remember: whether the next step's change is measured from this one.
        """
        frames = [*frames, *[frames[-1]] * (self.unit - len(frames))]
        inputs = self._process(frames)
        model, base = self.adapter.model, self.adapter.base
        method = getattr(base, f"get_{self.modality}_features")
        names = inspect.signature(method).parameters
        arguments = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k in names}
        output = method(**arguments, return_dict=True)
        pieces = self.adapter.split_features(self.modality, output, arguments)
        rows = torch.cat(pieces)
        if len(rows) != self.rows + self.tail:
            raise RuntimeError(
                f"The processor foresees {self.rows + self.tail} visual tokens per step, the model made {len(rows)}: use the "
                "processor that belongs to this model."
            )
        first = output.pooler_output
        self.shape = (type(first), first.ndim if isinstance(first, Tensor) else first[0].ndim, type(output))
        layouts = self.adapter.layouts(self.modality, pieces, arguments)
        offsets = np.cumsum([0] + [sum(s.size for s in x.segments) for x in layouts[:-1]]).tolist()
        cells = torch.cat([torch.where(x.cells < 0, -1, x.cells.cpu() + o) for x, o in zip(layouts, offsets)])
        segments = [s for x in layouts for s in x.segments]
        keep, kept_rows = self._select(patch, output, rows)
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

    def _select(self, patch: Any, output: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ask the strategy of a patched model: ascending indices of what stays, and its features."""
        encoded = getattr(output, ENCODED, None)
        if patch is None or encoded is None or patch.state.disabled:
            return torch.arange(len(rows), device=rows.device), rows
        picks = [patch._select(item) for item in encoded.items]
        selection: Selection = concat_selections(picks, [len(item) for item in encoded.items])
        keep = selection.keep.to(rows.device)
        into, weight = selection.into, selection.weight
        if into is None or weight is None:
            return keep, rows[keep]
        return keep, gather_merge(rows[None], keep[None], into[None].to(rows.device), weight[None].to(rows.device))[0]

    def _process(self, frames: Sequence[np.ndarray]) -> Mapping[str, Any]:
        """The processor's inputs of one step; the first also tells how many placeholders a step and a video's end have."""
        stand = Stand(getattr(self.processor, self.part))
        inputs = self._run(self.token, stand, frames, [0.0] * len(frames), 1.0)
        if self.sample is None:
            self.modality = "video" if "pixel_values_videos" in inputs else "image"
            self.sample = {k: _hollow(v) for k, v in stand.given.items() if k != "video_metadata"}
            one, two = (self._placeholders(self._replay(self._marks(n), n, [], 1.0)) for n in (1, 2))
            self.rows, self.tail = int(two.sum() - one.sum()), int(2 * one.sum() - two.sum())
            runs = int((two.int().diff() == 1).sum()) + int(two[0])
            self.timed = hasattr(self.adapter.base, "get_rope_index") and runs == 1
        return inputs

    def _run(self, text: str, stand: Stand, frames: Sequence[Any], times: Sequence[float], fps: float) -> Any:
        """The processor on one prompt, with `stand` in place of the part that reads pixels."""
        media: dict[str, Any] = {"images": list(frames)}
        if self.media == "video":
            facts = _facts(times, len(frames), fps)
            media = {"videos": [np.stack(list(frames))], "video_metadata": [facts], "do_sample_frames": False}
        processor = copy.copy(self.processor)
        setattr(processor, self.part, stand)
        with self.lock:
            return processor(text=[text], return_tensors="pt", **media, **self.options)

    def _replay(self, text: str, steps: int, times: Sequence[float], fps: float) -> Any:
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
        return self._run(text, Stand(getattr(self.processor, self.part), given), frames, times, fps)

    def _placeholders(self, inputs: Any) -> Tensor:
        """(n,) bool."""
        return self.adapter.find_placeholders(inputs["input_ids"])[self.modality][0]

    # -- prompts ------------------------------------------------------------------------------------------------
    def _marks(self, steps: int) -> str:
        """The placeholders of so many steps before the processor expands them."""
        return self.token * (steps if self.media == "image" else 1)

    def text(self, question: str, steps: int) -> str:
        """The prompt as text, placeholders not yet expanded."""
        if self.prompt is not None:
            return self.prompt.replace("{frames}", self._marks(steps)).replace("{question}", question)
        count = steps if self.media == "image" else 1
        content = [{"type": self.media}] * count + [{"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def inputs(self, question: str, steps: Sequence[Step], renumber: bool = False) -> PromptInputs:
        """The prompt about remembered steps: the processor's own, less the placeholders of tokens that were not kept.

        Positions are those of the whole prompt; `renumber` closes their gaps where they count tokens. In multimodal rope
        without time stamps in the text, a gap between steps counts as the frames that would fill it, `GAP` at most.
        """
        self._check(question)
        fps = self.fps or _usual_fps(steps)
        places = self._times(steps, fps)
        times = [t for s in steps for t in (*s.seconds, *[s.seconds[-1]] * (self.unit - len(s.seconds)))]
        full = self._replay(self.text(question, len(steps)), places[-1] + 1, times, fps)
        visual = self._placeholders(full)
        columns = visual.nonzero()[:, 0]
        if len(columns) != (places[-1] + 1) * self.rows + self.tail:
            raise RuntimeError(
                f"The prompt of {places[-1] + 1} steps has {len(columns)} visual placeholders, expected "
                f"{(places[-1] + 1) * self.rows + self.tail}: a prompt of one's own has {{frames}} once."
            )
        keep = ~visual
        for place, step in zip(places, steps, strict=True):
            keep[columns[place * self.rows + step.kept]] = True
        tail = steps[-1].tail
        if tail is not None and len(tail) == self.tail:
            keep[columns[len(columns) - self.tail :]] = True
        device, length = self.adapter.model.device, visual.shape[0]
        arguments: dict[str, Any] = {
            k: v[:, keep].to(device) for k, v in full.items() if isinstance(v, Tensor) and v.shape == (1, length)
        }
        arguments["position_ids"] = self._positions(full, keep, renumber).to(device)
        arguments["mm_encoder_outputs"] = {self.modality: self.features_of(steps)}
        return PromptInputs(arguments, visual[keep], tuple(t for s in steps for t in s.seconds))

    def around(self, question: str) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of a prompt in front of the frames and behind them, and placeholders of a video's end; (n,) int64 each.

        Raises ValueError where the processor writes text between frames.
        """
        self._check(question)
        full = self._replay(self.text(question, 2), 2, [], 1.0)
        ids, places = full["input_ids"][0], self._placeholders(full).nonzero()[:, 0]
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 != len(places):
            raise ValueError(
                f"memory='rekv' needs frames without text between them, and {type(self.processor).__name__} writes some: use "
                "memory='recent'."
            )
        return ids[:first], ids[last + 1 :], ids[last + 1 - self.tail : last + 1]

    def ids_of(self, question: str) -> Tensor:
        """(n,) int64, the question alone."""
        with self.lock:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            return tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"][0]

    def _check(self, question: str) -> None:
        if not question.strip():
            raise ValueError("The question is empty: ask something.")
        if self.token in question:
            raise ValueError(
                f"The question must not contain {self.token}, which stands for frames in this model's prompts."
            )

    def _times(self, steps: Sequence[Step], fps: float) -> list[int]:
        """The place of every step among the steps of the video that the prompt is about."""
        if not self.timed:
            return list(range(len(steps)))
        places = [0]
        for a, b in itertools.pairwise(steps):
            gap = round((b.seconds[0] - a.seconds[0]) * fps / self.unit)
            places.append(places[-1] + min(max(gap, 1), GAP))
        return places

    def _positions(self, full: Any, keep: Tensor, renumber: bool) -> Tensor:
        base = self.adapter.base
        if hasattr(base, "get_rope_index"):
            names = inspect.signature(base.get_rope_index).parameters
            rope = base.get_rope_index(**{k: v for k, v in full.items() if k in names})[0][..., keep]
            return torch.cat([torch.arange(rope.shape[-1]).expand(1, 1, -1).to(rope), rope])
        return (torch.arange(int(keep.sum())) if renumber else keep.nonzero()[:, 0])[None]

    def features_of(self, steps: Sequence[Step]) -> Any:
        """What `get_*_features` would have returned for these steps."""
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


def _usual_fps(steps: Sequence[Step]) -> float:
    """Frames per second by the median distance between frames of a step, or else between steps."""
    seconds = [s.seconds for s in steps]
    gaps = [b - a for s in seconds for a, b in itertools.pairwise(s)] or [
        b[0] - a[0] for a, b in itertools.pairwise(seconds)
    ]
    return 1.0 / float(np.median(gaps)) if gaps else 1.0


def _hollow(value: Any) -> Any:
    """Pixels without their memory: the same shape, all zero."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.zeros((), dtype=value.dtype).expand(value.shape)
    return value


def _repeated(name: str, value: Any, count: int) -> Any:
    """What an image processor gives for one image, for several of the same size."""
    if name == "batch_num_images":
        return torch.tensor([count])
    if isinstance(value, Tensor) and value.is_floating_point():
        return value[:1].expand(value.shape[0] * count, *value.shape[1:])
    if isinstance(value, Tensor):
        return value.repeat(count, *[1] * (value.ndim - 1))
    return value * count if isinstance(value, list) else value


def _longer(value: Any, steps: int) -> Any:
    """What a video processor gives for one step, for a video of several."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == (1, 3) and not value.is_floating_point():
        return value * torch.tensor([steps, 1, 1])
    return value[:, :1].expand(-1, value.shape[1] * steps, *value.shape[2:]) if value.ndim == 5 else value
