"""Answers of a session, complete or streamed in pieces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .prompts import PromptInputs


@dataclass(frozen=True)
class Answer:
    """One answer of the model.

    Attributes:
        text: the answer, without special tokens.
        seconds: duration from the question to the last token.
        first_token_seconds: duration from the question to the first token.
        tokens: length of the prompt that the LLM read.
        visual_tokens: visual tokens among them.
        new_tokens: tokens of the answer.
        frames_used: times of the frames that the answer has seen, in seconds of the stream.
        time: the time in question; that of the latest frame if none was given.
    """

    text: str
    seconds: float
    first_token_seconds: float
    tokens: int
    visual_tokens: int
    new_tokens: int
    frames_used: tuple[float, ...]
    time: float


@dataclass
class Asked:
    """A question with everything that its answer may see, taken from a session at one moment."""

    began: float
    prompt: PromptInputs
    time: float


@torch.no_grad()
def generate_answer(
    model: Any,
    tokenizer: Any,
    asked: Asked,
    options: dict[str, Any],
    streamer: Any = None,
    stopped: threading.Event | None = None,
) -> Answer:
    """Generate the answer.

    Args:
        options: further arguments of `generate`.
        streamer: receives the tokens as they come.
        stopped: ends the answer once it is set.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    first: list[float] = []

    class Watch(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
            if not first:
                first.append(time.perf_counter())
            stop = stopped is not None and stopped.is_set()
            return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)

    criteria = StoppingCriteriaList([*options.get("stopping_criteria", []), Watch()])
    given = options | {"stopping_criteria": criteria} | ({} if streamer is None else {"streamer": streamer})
    out = model.generate(**asked.prompt.arguments, **given)
    new = getattr(out, "sequences", out)[0, asked.prompt.length :]
    end = time.perf_counter()
    return Answer(
        text=tokenizer.decode(new, skip_special_tokens=True).strip(),
        seconds=end - asked.began,
        first_token_seconds=(first[0] if first else end) - asked.began,
        tokens=asked.prompt.length,
        visual_tokens=int(asked.prompt.visual.sum()),
        new_tokens=len(new),
        frames_used=asked.prompt.seconds,
        time=asked.time,
    )


class AnswerStream(Iterator[str]):
    """A running answer: yields pieces of text as they are generated. `close` ends it early.

    Attributes:
        answer: the complete answer, once the pieces are exhausted or the stream is closed; None before.
    """

    def __init__(self, tokenizer: Any, generate: Callable[..., Answer]) -> None:
        from transformers import TextIteratorStreamer

        self.answer: Answer | None = None
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._pieces: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

        def run() -> None:
            try:
                self.answer = generate(streamer=self._pieces, stopped=self._stopped)
            except BaseException as error:
                self._error = error
                self._pieces.end()

        self._thread = threading.Thread(target=run, name="vtoken-answer", daemon=True)
        self._thread.start()

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        for piece in self._pieces:
            if piece:
                return piece
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop generating; unread pieces are lost."""
        self._stopped.set()
        self._thread.join()
