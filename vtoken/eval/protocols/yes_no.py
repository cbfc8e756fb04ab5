"""Yes-or-no protocols of three harnesses: the prompt, and the parsing of an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

ASKED_PLAINLY = " Please answer yes or no."
PUNCTUATION = ';/[]"{}()=+\\_->@`<,?!'


@dataclass(frozen=True)
class YesNo:
    """A protocol for yes-or-no questions.

    Attributes:
        prompt: the text of a question as the data set words it.
        read: "yes", "no" or "" (neither) from a model's answer.
        max_new_tokens: of an answer.
    """

    prompt: Callable[[str], str]
    read: Callable[[str], str]
    max_new_tokens: int


def strict(text: str) -> str:
    """The requested answer and nothing else: yes or no in any case, perhaps with a full stop."""
    found = re.fullmatch(r"\s*(yes|no)\.?\s*", text, re.IGNORECASE)
    return found[1].lower() if found else ""


def lmms_eval(text: str) -> str:
    """lmms-eval 0.7.2: full stops removed, "y" and "n" alone, else yes, then no in the first four characters.

    So "Yesterday" is yes, and "Nothing", "Know" and "Not sure" are no.
    """
    text = text.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "")
    return next((word for word in ("yes", "no") if word in text[:4]), "")


def vlmevalkit(text: str) -> str:
    """VLMEvalKit without a judge: the one of the words yes and no that occurs; neither or both is no answer.

    Punctuation becomes a space, or vanishes where the text has it next to a space, or has a comma between
    digits anywhere. So "(yes)no" has both words, and "yes(no) (" is the one word "yesno".
    """
    text = text.lower()
    bare = text
    numbers = re.search(r"\d,\d", text) is not None
    for mark in PUNCTUATION:
        bare = bare.replace(mark, "" if numbers or f"{mark} " in text or f" {mark}" in text else " ")
    words = re.sub(r"(?<!\d)\.(?!\d)", "", bare, count=32).split()
    both = [word for word in ("yes", "no") if word in words]
    return both[0] if len(both) == 1 else ""


PROTOCOLS = {
    "strict": YesNo(str.strip, strict, 16),
    "lmms-eval": YesNo(
        lambda question: (
            question.strip().replace(ASKED_PLAINLY, "")
            + "\nAnswer the question using a single word or phrase."
        ),
        lmms_eval,
        16,
    ),
    "vlmevalkit": YesNo(str, vlmevalkit, 512),
}
