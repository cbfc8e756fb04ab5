"""Parts of the last stage of the recipe of pages: questions of a step, and where the answers are looked for.

Answers alone teach slowly which of forty texts a question means. So one head of two layers learns to look
from the end of the prompt, where the answer is read, at the patches that the question asks about: the number
that belongs to a word, the number whose word is asked for, the entry right of another, the word itself; or at
the start of the prompt, if the word is not on the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vtoken.tiny.pages import FIGURES, WORDS, Page, questions
from vtoken.tiny.scenes import Question

from .language import choose_kinds
from .pages_tower import targets

SLOTS = 20  # questions per page
WIDTH = 11  # tokens per question: "which number belongs to tree under cat ? assistant : 47"
WANTED = {"number": 6, "word": 4, "right": 5, "exists": 5}
LOOKS = (2, 3)  # layers whose first head looks


def choose(page: Page, rng: np.random.Generator) -> list[Question]:
    """Twenty questions about a page in drawn wordings, of all kinds."""
    return choose_kinds(questions(page, rng), rng, WANTED, SLOTS)


def asked_entry(page: Page, question: Question) -> int:
    """The index of the entry that the answer is read from, -1 if the word is not on the page."""
    named = [word for word in question.text.rstrip("?.").split() if word in WORDS or word in FIGURES]
    for i, entry in enumerate(page.entries):
        if question.kind in ("number", "right"):
            found = entry.text == question.answer
        else:
            found = entry.text == named[0]
        if found:
            return i
    return -1


def look_targets(pages: Sequence[Page], asked: Sequence[Sequence[Question]]) -> dict[str, torch.Tensor]:
    """The goal of `training.tiny.looking.Look`: where each prompt ends, and the patches that its answer is
    read from.
    """
    owners = targets(pages)["owner"].numpy()
    at = np.full((len(pages), SLOTS), -1)
    shows = np.zeros((len(pages), SLOTS, owners.shape[1]), bool)
    for i, (page, some) in enumerate(zip(pages, asked)):
        for slot, question in enumerate(some):
            text = question.text.replace("?", " ?").replace(".", " .")
            at[i, slot] = slot * WIDTH + len(text.split()) + 1  # after the text come "assistant" and ":"
            entry = asked_entry(page, question)
            shows[i, slot] = (owners[i] == entry) & (entry >= 0)
    return {"at": torch.from_numpy(at), "shows": torch.from_numpy(shows)}


@torch.no_grad()
def start_words(model: Any, vocabulary: dict[str, int], texts: Sequence[str], entries: torch.Tensor) -> None:
    """Start the language model's two embeddings of words and numbers from the tower's read-outs, in place.

    Args:
        model: with words that it knows already, whose mean length the new rows get.
        vocabulary: ids of all words.
        texts: words and numbers.
        entries: their embeddings in the read-outs, ``(len(texts), width)``.
    """
    ids = torch.tensor([vocabulary[text] for text in texts])
    known = torch.ones(len(vocabulary), dtype=torch.bool)
    known[ids] = False
    rows = entries - entries.mean(0)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        weight[ids] = rows / rows.norm(dim=1).mean() * weight[known].norm(dim=1).mean()
