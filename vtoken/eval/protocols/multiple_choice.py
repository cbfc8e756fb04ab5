"""Multiple-choice protocols of three harnesses: frame sampling, prompt, and the letter of an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import subtitles

SUBJECTS = (
    "answer",
    "correct answer",
    "best answer",
    "correct option",
    "best option",
    "choice",
    "correct choice",
)
PHRASES = [f"{the}{subject} is" for subject in SUBJECTS for the in ("the ", "")]
PHRASES += ["i choose", "i select", "i pick", "my answer is", "my choice is"]
PHRASES += ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]


def strict(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """The requested letter and nothing else: bare, as in "(B)", "B." or "B:", or one whole option."""
    found = re.fullmatch(rf"\s*\(?([{letters}])[).:]?\s*", text)
    if found:
        return found[1]
    return next(
        (c for c, option in zip(letters, options) if text.strip().casefold() == option.strip().casefold()), ""
    )


def lmms_eval(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """lmms-eval 0.7.2: the most telling place of a letter, and of equal ones the last.

    From strong to weak: an answer that starts or ends with the letter; the first of each letter after a
    phrase such as "the answer is", where capitals inside of words count too; "(A)"; "A."; "A:"; "A)"; "A ";
    and any capital at all. So "The answer is B. Dogs bark" is D.
    """
    for mark in (None, *",.!?;:'\""):
        text = text.strip(mark)
    padded, core, found = f" {text} ", text.strip(), []
    for letter in letters:
        if core[:1] == letter and not core[1:2].isalpha():
            found.append((10, 0, letter))
        if core[-1:] == letter and not core[-2:-1].isalpha():
            found.append((9, 0, letter))
        shapes = (f"({letter})", f"{letter}.", f"{letter}:", f"{letter})", f"{letter} ")
        found += [(6 - i, padded.rfind(s), letter) for i, s in enumerate(shapes) if s in padded]
    lower = padded.lower()
    for phrase in PHRASES:
        if phrase in lower:
            after = lower.index(phrase) + len(phrase)
            found += [(7, padded.find(c, after), c) for c in letters if c in padded[after:]]
    found = found or [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(found)[2] if found else ""


# the two without a comma are one prefix each in VLMEvalKit's list for four options, and therefore never found
FOUR = ["The best answer is", "The correct answer is", "The answer is", "The answer"]
FOUR += ["The best option isThe correct option is", "Best answer:Best option:", "Answer:", "Option:"]
EIGHT = ["Final Answer:", "The best answer is", "The correct answer is", "The answer is", "The answer"]
EIGHT += ["The best option is", "The correct option is", "Best answer:", "Best option:", "Answer:", "Option:"]


def vlmevalkit(text: str, letters: str, options: Sequence[str] = ()) -> str:
    """VLMEvalKit without a judge: prefixes removed, then the first capital that is a letter.

    The capital counts inside a word too, so "Definitely C" is D. Up to four letters the prefixes are those of
    Video-MME, of which two are misspelt so that "Best answer: C" is B; with more they are those of its
    version 2.
    """
    text = text.strip()
    for prefix in FOUR if len(letters) <= 4 else EIGHT:
        text = text.replace(prefix, "")
    found = re.search(f"[{letters}]", text)
    return found[0] if found else ""


def respond(letters: str, what: str) -> str:
    """The benchmark's own instruction (Fu et al., arXiv 2405.21075)."""
    listed = f"{', '.join(letters[:-1])}, or {letters[-1]}"
    return (
        f"Select the best answer to the following multiple-choice question based on the {what}. "
        f"Respond with only the letter ({listed}) of the correct option."
    )


SUBTITLED = "video and the subtitles"


def prompt_strict(question: str, letters: str, said: str | None) -> str:
    if not said:
        return f"{respond(letters, 'video')}\n{question}\nThe best answer is:"
    listed = f"This video's subtitles are listed below:\n{said}\n"
    return f"{listed}{respond(letters, SUBTITLED)}\n{question}\nThe best answer is:"


def prompt_lmms_eval(question: str, letters: str, said: str | None) -> str:
    """lmms-eval's prompt: mentions subtitles also where there are none; ends in two different ways."""
    ask = f"{respond(letters, SUBTITLED)}\n{question}\n"
    if said is None:
        return f"{ask}\nAnswer with the option's letter from the given choices directly."
    return f"This video's subtitles are listed below: \n{said}\n{ask}The best answer is:"


def prompt_vlmevalkit(question: str, letters: str, said: str | None) -> str:
    listed = "" if said is None else f"This video's subtitles are listed below:\n{said}\n"
    return (
        f"\nThese are the frames of a video. {listed}{respond(letters, 'video')}\nQuestion:"
        f" {question}\nAnswer: "
    )


def middles(total: int, n: int) -> list[int]:
    """The middle frame of each of n equal parts."""
    return [int((i + 0.5) * total / n) for i in range(n)]


def ends(total: int, n: int) -> list[int]:
    """n frames from the first to the last, rounded down as by `numpy.linspace`."""
    return np.linspace(0, total - 1, n, dtype=int).tolist()


def inner(total: int, n: int) -> list[int]:
    """The n frames between n + 1 equal parts."""
    return [int(i * (total / (n + 1))) for i in range(1, n + 1)]


@dataclass(frozen=True)
class Choice:
    """A protocol for multiple-choice questions about videos.

    Attributes:
        prompt: the text, from the question with its options, the letters, and the subtitles (None: without).
        read: a letter or "", from a model's answer, the letters and the options.
        sample: n frame numbers of `total`.
        said: the subtitles of sampled frames, see `subtitles`.
        frames: default number of sampled frames.
        max_new_tokens: of an answer.
    """

    prompt: Callable[[str, str, str | None], str]
    read: Callable[[str, str, Sequence[str]], str]
    sample: Callable[[int, int], list[int]]
    said: subtitles.Said
    frames: int
    max_new_tokens: int


PROTOCOLS = {
    "strict": Choice(prompt_strict, strict, middles, subtitles.at_frames, 32, 16),
    "lmms-eval": Choice(prompt_lmms_eval, lmms_eval, ends, subtitles.lmms_eval, 32, 16),
    "vlmevalkit": Choice(prompt_vlmevalkit, vlmevalkit, inner, subtitles.vlmevalkit, 8, 512),
}
