"""`answer`: from a video to a model's answer in one call, with the time of every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .asking import prompt, to_model
from .checks import checked, found
from .limits import STANDARD, Limits
from .patching import patch_of, report
from .stage_times import now, phases

STAGES = ("read", "process", "tower", "choose", "prefill", "decode", "rest")


@dataclass(frozen=True)
class VideoAnswer:
    """One answer about one video.

    Attributes:
        text: the answer, without special tokens.
        frames: presentation times of the frames that the model has seen, in seconds.
        tokens: length of the prompt before any visual token was dropped.
        new_tokens: tokens of the answer.
        seconds: times of the stages `STAGES`: "read" decodes the frames, "process" resizes and cuts them
            into patches, "choose" is what the strategy takes, "prefill" the LLM's first forward, "decode" the
            others. "read" and "process" may overlap with the answer before, see `answers`.
        report: of a patched model, None of one that is not.
    """

    text: str
    frames: tuple[float, ...]
    tokens: int
    new_tokens: int
    seconds: dict[str, float]
    report: Any

    def __str__(self) -> str:
        times = ", ".join(f"{name} {self.seconds[name]:.2f} s" for name in STAGES)
        seen, new = len(self.frames), self.new_tokens
        counts = (
            f"{seen} frame{'s' * (seen != 1)}, {self.tokens} tokens in the prompt,"
            f" {new} new token{'s' * (new != 1)}"
        )
        return "\n".join([counts, times] + ([] if self.report is None else [str(self.report)]))


@checked
def answer(
    model: Any,
    processor: Any,
    video: Any,
    question: str,
    *,
    frames: int | None = None,
    fps: float | None = None,
    scaled: bool = False,
    max_new_tokens: int | None = None,
    on_text: Callable[[str], Any] | None = None,
    limits: Limits | None = STANDARD,
    clock: Literal["wall", "cpu"] = "wall",
    **generate: Any,
) -> VideoAnswer:
    """Ask a model, patched or not, one question about one video.

    The frames are those that the processor itself would take, see `vtoken.video.sample`; only they are
    decoded, and they stay uint8 until they are on the model's device.

    Args:
        model: a transformers model that reads videos; one call at a time.
        processor: its processor.
        video: path, address or file object, see `vtoken.video.open_video`; or a `SampledVideo`, to ask
            several questions about frames that are read once.
        question: the question; it goes through the processor's chat template if there is one.
        frames, fps, scaled, limits: see `vtoken.video.sample`; not for a `SampledVideo`, which has them.
        max_new_tokens: tokens of the answer at most; 128, or what a `generation_config` says.
        on_text: called with each piece of the answer as it comes.
        clock: of the stages; "cpu" for the processor time of this process, on a CPU that others use too.
        generate: further arguments of `model.generate`; decoding is greedy unless these, or their
            `generation_config`, say otherwise.

    Raises:
        vtoken.video.VideoError: the video cannot be read.
        ValueError: the processor reads no videos, or refuses these frames or this question; more than one
            returned sequence is asked for; frames are asked for of a `SampledVideo`.
        RuntimeError: the model is answering another question.
    """
    _check_one_answer(generate)
    from .video import SampledVideo

    if isinstance(video, SampledVideo) and (frames is not None or fps is not None or scaled):
        raise ValueError(
            "A SampledVideo has its frames: leave frames=, fps= and scaled= out, or give the file."
        )
    taken = dict(frames=frames, fps=fps, scaled=scaled, limits=limits)
    prepared = _prepare(model, processor, video, question, taken, clock)
    options = _options(max_new_tokens, generate)
    return _generate(model, processor, prepared, on_text, options, clock)


@checked
def answers(
    model: Any,
    processor: Any,
    asked: Iterable[tuple[Any, str]],
    *,
    frames: int | None = None,
    fps: float | None = None,
    scaled: bool = False,
    max_new_tokens: int | None = None,
    limits: Limits | None = STANDARD,
    **generate: Any,
) -> Iterator[VideoAnswer]:
    """As `answer` for each (video, question); the next video is read while the model answers.

    A pair is taken from `asked` before the answer to the one before it is given.
    Raises as `answer` does, when it is the turn of the video in question.
    """
    _check_one_answer(generate)
    taken = dict(frames=frames, fps=fps, scaled=scaled, limits=limits)
    return _in_turn(model, processor, asked, taken, _options(max_new_tokens, generate))


def _options(max_new_tokens: int | None, generate: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`: a short greedy answer where nothing else is said."""
    given = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    configured = generate.get("generation_config") is not None
    return ({} if configured else {"max_new_tokens": 128, "do_sample": False}) | given | generate


def _check_one_answer(generate: dict[str, Any]) -> None:
    if of_patch := {"budget", "strategy"} & set(generate):
        raise ValueError(
            f"vtoken.answer asks a model as it is, found {min(of_patch)}=: call it within"
            " vtoken.applied(model, strategy, budget=...)."
        )
    count = generate.get("num_return_sequences") or getattr(
        generate.get("generation_config"), "num_return_sequences", None
    )
    if count not in (None, 1):
        raise ValueError(
            f"An answer is one text, found num_return_sequences={count}: leave it out, or use model.generate."
        )


def _in_turn(
    model: Any, processor: Any, asked: Iterable[tuple[Any, str]], taken: dict[str, Any], options: Any
) -> Iterator[VideoAnswer]:
    with ThreadPoolExecutor(1, "vtoken-read") as reader:
        waiting = None
        turns = _turns(reader, asked, lambda pair: _prepare(model, processor, *_two(pair), taken))
        for coming in turns:
            if waiting is not None:
                yield _generate(model, processor, waiting.result(), None, options)
            waiting = coming
        if waiting is not None:
            yield _generate(model, processor, waiting.result(), None, options)


def _turns(
    reader: ThreadPoolExecutor, asked: Iterable[tuple[Any, str]], prepare: Callable[[Any], _Prepared]
) -> Iterator[Future[_Prepared]]:
    """What comes of each question in turn; an error of `asked` itself comes after the answers before it."""
    try:
        for pair in asked:
            yield reader.submit(prepare, pair)
    except Exception as error:
        last: Future[_Prepared] = Future()
        last.set_exception(error)
        yield last


def _two(pair: Any) -> tuple[Any, str]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], str)):
        raise ValueError(f"vtoken.answers takes (video, question) pairs, found {found(pair)}.")
    return pair[0], pair[1]


@dataclass(frozen=True)
class _Prepared:
    inputs: Any
    frames: tuple[float, ...]
    seconds: dict[str, float]


def _prepare(
    model: Any, processor: Any, video: Any, question: str, taken: dict[str, Any], clock: str = "wall"
) -> _Prepared:
    from .video import SampledVideo, fast_processor, sample
    from .video.errors import brief

    if not hasattr(processor, "video_processor"):
        raise ValueError(
            f"{type(processor).__name__} reads no videos: use a model that does, such as LLaVA-OneVision or"
            " Qwen2.5-VL."
        )
    start = now(None, clock)
    if not isinstance(video, SampledVideo):
        video = sample(video, processor=processor, **taken)
    read = now(None, clock)
    on_device = replace(video, frames=video.frames.to(model.device))
    text = prompt(processor, question, "video")
    try:
        inputs = fast_processor(processor)(text=[text], **on_device.inputs, return_tensors="pt")
    except (ValueError, IndexError, StopIteration) as error:  # the last from transformers 5.17
        count, _, height, width = video.frames.shape
        raise ValueError(
            f"{type(processor).__name__} refuses this question about {count} frame{'s' * (count > 1)} of"
            f" {width} x {height} ({brief(error)}): try other frames=, at least 2, and a question without"
            " marks of images and videos."
        ) from error
    inputs = to_model(model, inputs)
    end = now(None, clock)
    return _Prepared(inputs, video.seconds, {"read": read - start, "process": end - read})


@torch.no_grad()
def generate_timed(
    model: Any, inputs: Any, options: dict[str, Any], clock: str = "wall"
) -> tuple[Any, dict[str, float]]:
    """The output of `model.generate`, and seconds of its stages."""
    with phases(model, clock, steps="decode") as watch:
        out = model.generate(**inputs, **options)
        seconds = {"decode": 0.0} | watch.seconds()
    seconds["prefill"] = seconds.pop("llm")
    return out, seconds


def _generate(
    model: Any,
    processor: Any,
    prepared: _Prepared,
    on_text: Any,
    options: dict[str, Any],
    clock: str = "wall",
) -> VideoAnswer:
    if on_text is not None:
        options = options | {"streamer": _streamer(processor.tokenizer, on_text)}
    length = prepared.inputs["input_ids"].shape[1]
    out, measured = generate_timed(model, prepared.inputs, options, clock)
    new = getattr(out, "sequences", out)[0, length:]
    seconds = measured | prepared.seconds
    return VideoAnswer(
        text=processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
        frames=prepared.frames,
        tokens=length,
        new_tokens=len(new),
        seconds={name: seconds[name] for name in STAGES},
        report=None if patch_of(model) is None else report(model),
    )


def _streamer(tokenizer: Any, on_text: Callable[[str], Any]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
