"""StreamSession: answers a model's questions about a running stream of frames."""

from __future__ import annotations

import inspect
import threading
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import transformers

from ..adapters.base import Adapter
from ..adapters.registry import adapter_for
from ..checks import checked
from ..patching import disabled
from ..streams import StreamState, stream
from .answers import Answer, AnswerStream, Asked, generate_answer
from .calls import Calls
from .choice import SharedPatch, make_memory
from .frames import Frames
from .memory import Step
from .pictures import picture_of, resized_to, time_of
from .prompts import Prompts
from .rekv import ReKVMemory


class StreamSession:
    """One stream of frames, and questions about it at any moment.

    Every frame passes once through the model's own processor, vision tower and projector; the visual tokens
    that the strategy keeps go into a memory of bounded size. A question becomes the model's ordinary prompt,
    and its placeholders are filled from the memory. While nothing has been pruned or deleted, the answer is
    that of `model.generate` on the same frames. The stream may run forever: memory, prompt length and work
    per frame stay constant.

    `push` may be called by one thread while others ask; `reset` waits until running questions have been
    taken, `close` until their answers end. An answer sees only frames up to its time.

    Args:
        model: a transformers model that reads videos, or several images; patched or not.
        processor: its processor.
        strategy: patches the model while the session is open, see `vtoken.patch`; sessions with equal
            strategies share the patch. None leaves the model as it is, patched or not.
        budget, options: those of the strategy.
        memory: "recent" keeps visual tokens, see `vtoken.streaming.RecentMemory`; "rekv" keeps the LLM's keys
            and values and retrieves per question, see `vtoken.streaming.ReKVMemory`, for models without
            multimodal rope.
        frames: keep the newest frames alone, so many ("recent"); a multiple of those that the vision tower
            joins into one step (2 for Qwen-VL). A frame that waits for its second is seen in addition.
        max_bytes: upper bound of the memory in bytes; None for 256 MiB ("recent") or 4 GiB ("rekv").
        max_tokens: visual tokens of a prompt ("recent"); None for as many as the LLM's positions allow.
        memory_options: `sinks`, `recent` (in steps), `history_tokens` of "recent"; `n_local`, `topk`,
            `chunk`, `metric`, `disk` of "rekv".
        prompt: text of a prompt with {frames} and {question}, for processors without a chat template.
        system: system message for processors with a chat template.
        fps: frames per second of the stream; None to take the median distance between frames. It determines
            time positions of Qwen2.5-VL, and the time of frames that are pushed without one.
        processor_options: further arguments of the processor, such as `size`; a processor that shrinks long
            videos as a whole (Qwen3-VL) sees one step at a time here.
        max_new_tokens: tokens of an answer, unless the question says otherwise.
        adapter: as in `vtoken.patch`.

    Raises:
        TypeError, ValueError: as `vtoken.patch`; for a memory, a processor or a strategy that cannot serve a
            stream.

    Example:
        with vtoken.StreamSession(model, processor, "stc_pruner", budget=0.3) as session:
            for frame in vtoken.video.open_video("clip.mp4"):
                session.push(frame.image, frame.seconds)
            print(session.ask("What did the person put on the table?").text)
    """

    @checked
    def __init__(
        self,
        model: Any,
        processor: Any,
        strategy: Any = None,
        budget: float | int | None = None,
        *,
        memory: str = "recent",
        frames: int | None = None,
        max_bytes: int | None = None,
        max_tokens: int | None = None,
        memory_options: dict[str, Any] | None = None,
        prompt: str | None = None,
        system: str | None = None,
        fps: float | None = None,
        processor_options: dict[str, Any] | None = None,
        max_new_tokens: int = 128,
        adapter: str | type[Adapter] | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("fps", fps), ("max_new_tokens", max_new_tokens)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, found {value}.")
        self.adapter = adapter_for(model, adapter)
        if "mm_encoder_outputs" not in inspect.signature(self.adapter.base.forward).parameters:
            raise ValueError(
                f"A StreamSession hands visual features to the model, and {type(model).__name__} of"
                f" transformers {transformers.__version__} does not take any: use transformers 5.18 or newer."
            )
        self.model, self.processor = model, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.frames = Frames(self.adapter, processor, processor_options or {})
        self.prompts = Prompts(self.frames, prompt, system, fps)
        self.max_new_tokens = max_new_tokens
        self.closed = False
        self._waiting: list[tuple[np.ndarray, float]] = []
        self._last: float | None = None
        self._size: tuple[int, int] | None = None
        self._pushed = self._asked = 0
        self.state = StreamState()
        self._answering, self._taking = Calls(), Calls()  # locks are taken in this order
        self._encoding, self._remembering = threading.Lock(), threading.Lock()
        self._shared = SharedPatch(self.adapter, strategy, budget, options)
        self._patch = self._shared.patch
        try:
            self.memory = make_memory(
                memory,
                self.adapter,
                self.prompts,
                self._shared.renumbers,
                max_bytes,
                max_tokens,
                memory_options or {},
                frames,
            )
        except BaseException:
            self._shared.release()
            raise

    # -- the stream ------------------------------------------------------------------------------------------
    def push(self, frame: Any, t: float | None = None) -> Step | None:
        """Add the stream's next frame.

        Args:
            frame: (h, w, 3) uint8 RGB array or tensor, a PIL image, or a frame of a `VideoReader`, which
                knows its time. Frames of another size than the first are resized to it.
            t: its time in seconds, later than the frame before; None for the next of `fps` per second.

        Returns:
            The step that was added: the kept tokens and their cells; None while the tower waits for a second
                frame.

        Raises:
            TypeError: for a frame that is not a picture, or a time that is not a number.
            ValueError: for a frame that is empty or too large, a time that is not later than the previous
                frame, or a frame larger than the memory.
            RuntimeError: if the session is closed.

        A call that raises leaves the session as it was.
        """
        image, seconds = picture_of(frame)
        t = seconds if t is None else t
        t = None if t is None else time_of(t)
        with self._encoding:
            self._check_open()
            if t is None:
                t = 0.0 if self._last is None else self._last + 1 / (self.prompts.fps or 1.0)
            if self._last is not None and t <= self._last:
                raise ValueError(
                    f"Frames come in the order of their times: found {t} s after {self._last} s."
                )
            return self._push(image, t)

    def _push(self, image: np.ndarray, t: float) -> Step | None:
        """Encode a frame and add it, or leave the session as it was."""
        step = ready = None
        state, size = self.state.fork(), self._size or image.shape[:2]
        waiting = [*self._waiting, (resized_to(image, size), t)]
        with self.frames.unless_it_fails():
            if self._size is None:
                self.frames.check(image)
            if len(waiting) == self.frames.unit:
                step, waiting = self._encode(waiting, state), []
                ready = self.memory.prepare(step)
            with self._remembering:
                if ready is not None:
                    self.memory.add(ready)  # type: ignore[arg-type]
                self.state.adopt(state)
                self._waiting, self._last, self._size = waiting, t, size
                self._pushed += 1
        return step

    def _encode(
        self, frames: list[tuple[np.ndarray, float]], state: StreamState, remember: bool = True
    ) -> Step:
        """Encode one step and advance `state`; `remember` as in `Frames.encode`."""
        images, seconds = zip(*frames, strict=True)
        with self._shared.used(), stream(self.model, state):
            return self.frames.encode(images, seconds, self._patch, remember)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("This StreamSession is closed: make a new one.")
        if not self._shared.is_there():
            raise RuntimeError(
                "The model was patched or unpatched while a session used it: make a new session."
            )

    def reset(self) -> None:
        """Delete the stream's state; the next frame begins another. Running answers are about the old one."""
        with self._taking.alone("be reset"), self._encoding, self._remembering:
            self._forget()

    def _forget(self) -> None:
        self.memory.reset()
        self.frames.reset()
        self.state.reset()
        self._waiting, self._last, self._size = [], None, None
        self._pushed = self._asked = 0

    @property
    def stats(self) -> dict[str, Any]:
        """Numbers of the stream so far.

        `frames`, `steps` in memory, `forgotten` steps, `tokens` and `bytes` in memory with their bounds,
        `state_bytes` of the strategy's own state (constant), `first` time in memory, `last` time,
        `questions`.
        """
        with self._remembering:
            steps = self.memory.view()
            return {
                "frames": self._pushed,
                "steps": len(steps),
                "forgotten": self.memory.forgotten,
                "tokens": self.memory.visual_tokens,
                "max_tokens": self.memory.max_tokens,
                "max_steps": getattr(self.memory, "max_steps", None),
                "bytes": self.memory.nbytes,
                "max_bytes": self.memory.max_bytes,
                "state_bytes": self.state.nbytes,
                "first": steps[0].seconds[0] if steps else None,
                "last": self._last,
                "questions": self._asked,
            }

    # -- questions -------------------------------------------------------------------------------------------
    def ask(self, text: str, t: float | None = None, **generate: Any) -> Answer:
        """Answer a question about the stream.

        Args:
            text: the question.
            t: the answer sees only frames up to this time; None for all so far.
            generate: further arguments of `model.generate`, such as `max_new_tokens`.

        Raises:
            TypeError: if the question is not a text, or `t` not a number.
            ValueError: for an empty question; if the memory holds no frame up to `t`.
            RuntimeError: if the session is closed.
        """
        with self._answering.one():
            return self._answer(self._take(text, t), generate)

    def stream_answer(self, text: str, t: float | None = None, **generate: Any) -> AnswerStream:
        """`ask` as an iterator of pieces of the answer's text; the question is taken at once."""
        self._answering.enter()
        try:
            asked = self._take(text, t)

            def answer(**more: Any) -> Answer:
                try:
                    with self._answering.within():
                        return self._answer(asked, generate, **more)
                finally:
                    self._answering.leave()

            return AnswerStream(self.tokenizer, answer)
        except BaseException:
            self._answering.leave()
            raise

    def _take(self, text: str, t: float | None) -> Asked:
        """Collect everything that an answer needs, at one moment of the stream."""
        began = time.perf_counter()
        self.prompts.check(text)
        t = None if t is None else time_of(t)
        with self._taking.one():
            self._check_open()
            steps, last = self._view(t)
            if last is None:
                raise ValueError("There is no frame to ask about yet: push one first.")
            if not steps:
                raise ValueError(f"The memory holds no frame up to {t} s: ask about a later time.")
            if isinstance(self.memory, ReKVMemory):
                prompt = self.memory.inputs(text, steps)
            else:
                prompt = self.prompts.inputs(text, steps, self._shared.renumbers)
            with self._remembering:
                self._asked += 1
        return Asked(began, prompt, last if t is None else t)

    def _view(self, t: float | None, alone: bool = False) -> tuple[list[Any], float | None]:
        """Steps of the memory up to a time, and the time of the latest frame.

        A frame whose second one is still missing is encoded for this answer only; `alone` admits no frame
        that is pushed meanwhile.
        """
        with self._encoding if alone else nullcontext():
            with self._remembering:
                steps: list[Any] = list(self.memory.view(t))
                waiting, last = self._waiting, self._last
            waiting = [w for w in waiting if t is None or w[1] <= t]
            if not waiting:
                return steps, last
            if alone:
                with self.frames.unless_it_fails():
                    return [*steps, self._encode(waiting, self.state.fork(), remember=False)], last
        return self._view(t, alone=True)

    def _answer(self, asked: Asked, options: dict[str, Any], **more: Any) -> Answer:
        options = {"max_new_tokens": self.max_new_tokens} | options
        if self._patch is None:
            return generate_answer(self.model, self.tokenizer, asked, options, **more)
        with self._shared.used(), disabled(self.model):  # the frames were pruned when they came
            return generate_answer(self.model, self.tokenizer, asked, options, **more)

    # -- the end ---------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Delete the stream's state, and take off the session's patch unless another session uses it.

        It waits for running answers in other threads. Raises RuntimeError from within one of them.
        """
        with self._answering.alone("be closed"), self._taking.alone("be closed"), self._encoding:
            if self.closed:
                return
            with self._remembering:
                self.closed = True
                self._forget()
            self._shared.release()

    def __enter__(self) -> StreamSession:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
