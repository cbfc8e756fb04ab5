"""Recipe of tiny LLaVA for pages: the tiny LLaVA extended to 576 visual tokens, which reads words and numbers.

Its language model starts from the shipped tiny LLaVA's. Stage ``tower`` teaches a new tower to read
(`training.tiny.pages_tower`); stage ``language`` freezes it and teaches the projector and the language model
(`training.tiny.pages_language`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from vtoken.tiny import load
from vtoken.tiny.pages import SIDE, make_page, questions, vocabulary
from vtoken.tiny.questions import held_out

from .. import language, pages_tower
from ..card import FRONT, accuracy, plan, run, snippet, table
from ..evaluate import most_frequent, pruned_accuracy
from ..language import pack
from ..looking import Look
from ..models import build_llava, start_from, start_tower
from ..pages_language import LOOKS, SLOTS, WIDTH, choose, look_targets, start_words
from ..pages_tower import ENTRIES, RELATIONS, PageHeads, start_neighbours, targets
from ..tower import localisation, to_pixels

__all__ = ["build", "card", "measure", "train"]

TOWER: dict[str, Any] = {
    "steps": 1500,
    "batch": 2,
    "rate": 2e-3,
    "muon_rate": 0.01,
    "reset": 0.5,
    "look": 0.25,
}
LANGUAGE: dict[str, Any] = {"steps": 1200, "batch": 2, "rate": 2e-3, "muon_rate": 0.02, "reading": 1.0}
SHARES = (0.5, 0.2, 0.1)
FOUND = 0.5  # share of the patches among which text is looked for
LATER = 50_000_000  # stage two goes on with pages that stage one has not seen
CHECK = 7_000_000  # pages of the test split for the measures along the way


def build(width: int = 128, tower_layers: int = 6, llm_layers: int = 4, heads: int = 4) -> tuple[Any, Any]:
    """An untrained LLaVA with 576 visual tokens (192 px, patch 8, CLS dropped) and its processor.

    Args:
        width: hidden size of the tower and of the language model; a multiple of ``2 * heads``.
        tower_layers: layers of the CLIP tower; the language model reads the output of the last but one.
        llm_layers: layers of the Llama.
        heads: attention heads of both.

    Returns:
        ``(LlavaForConditionalGeneration, LlavaProcessor)`` in float32.
    """
    model, processor = build_llava(vocabulary(), width, (tower_layers, llm_layers), heads, SIDE)
    start_tower(model.model.vision_tower)
    return model, processor


def warm_start(model: Any) -> None:
    """The shipped tiny LLaVA's language model, in place; new words come after those that it knows.

    Its tower and its projector are no start: what their layers add is several times as long as the
    positions, which the next layers then cannot read.
    """
    theirs = load("llava")[0].state_dict().items()
    known = {name: value for name, value in theirs if "language_model" in name or name.startswith("lm_head")}
    start_from(model.state_dict().items(), known)


def train(
    model: Any, processor: Any, log: list[dict], seed: int = 0, seconds: float | None = None, **limits: Any
) -> None:
    """Warm start and both stages, in place; appends to ``log``. Limits as in `optimise`."""
    warm_start(model)
    start_neighbours(model.model.vision_tower, tower_batch(LATER, 6, "train", 0)[0], longer=True)
    heads = train_tower(model, log, seed, seconds=seconds and seconds * 0.55, **limits)
    start_words(model, processor.tokenizer.get_vocab(), ENTRIES[1:], heads.entries[1:])
    torch.manual_seed(seed + 1)
    train_language(model, processor, log, seed, seconds=seconds and seconds * 0.45, **limits)


def tower_batch(first: int, size: int, split: str, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels and targets of the pages of a step."""
    pages = [make_page(first + step * size + i, split) for i in range(size)]
    return to_pixels([page.image for page in pages]), targets(pages)


def train_tower(model: Any, log: list[dict], seed: int = 0, checks: int = 24, **limits: Any) -> PageHeads:
    """Stage one, in place; appends to ``log`` and returns the read-outs. ``checks``: held-out pages."""
    tower = model.model.vision_tower
    pixels, goal = check = tower_batch(CHECK, checks, "test", 0)
    heads = PageHeads(model.config.vision_config.hidden_size)
    pages_tower.train_tower(
        tower,
        heads,
        partial(tower_batch, seed * 2 * LATER, TOWER["batch"], "train"),
        check,
        TOWER,
        log,
        lambda: localisation(tower, pixels, goal["owner"] >= 0, FOUND),
        **limits,
    )
    return heads


def language_batch(
    first: int, size: int, split: str, vocabulary: dict[str, int], step: int
) -> tuple[torch.Tensor, Any, dict[str, torch.Tensor]]:
    """Pixels, packed questions and attention targets of the pages of a step."""
    start = first + step * size
    pages = [make_page(start + i, split) for i in range(size)]
    rng = np.random.Generator(np.random.PCG64(start))
    asked = [choose(page, rng) for page in pages]
    packed = pack(asked, vocabulary, SLOTS, WIDTH)
    return to_pixels([page.image for page in pages]), packed, look_targets(pages, asked)


def train_language(
    model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 24, **limits: Any
) -> None:
    """Stage two, in place, with the tower frozen; arguments as in `train_tower`."""
    vocabulary = processor.tokenizer.get_vocab()
    user = [vocabulary["user"], vocabulary[":"]]

    looks = Look(model, LOOKS, len(user))
    language.train_language(
        model,
        partial(language.visual_tokens, model),
        partial(language_batch, seed * 2 * LATER + LATER, LANGUAGE["batch"], "train", vocabulary),
        [language_batch(CHECK, checks, "test", vocabulary, 0)],
        LANGUAGE,
        log,
        user,
        width=WIDTH,
        reading=looks,
        **limits,
    )
    looks.remove()


def measure(model: Any, processor: Any, n: int = 500) -> dict[str, Any]:
    """Blind accuracy, CLS attention on text, and accuracy with a share of the visual tokens."""
    seen = [question for i in range(200) for question in questions(make_page(i))]
    pixels, goal = tower_batch(0, 60, "test", 0)
    few = max(1, n // 5)
    return {
        "recipe": {"tower": TOWER, "language": LANGUAGE},
        "most_frequent_answer": most_frequent(held_out("llava_pages", n), seen),
        "text_patches": (goal["owner"] >= 0).float().mean().item(),
        "localisation": localisation(model.model.vision_tower, pixels, goal["owner"] >= 0, FOUND),
        "pruned": {
            f"{by} {share}": pruned_accuracy(model, processor, share, by, few, name="llava_pages")["all"]
            for by in ("cls", "random")
            for share in SHARES
        },
    }


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The model card."""
    pruned = {by: [report["pruned"][f"{by} {share}"] for share in SHARES] for by in ("cls", "random")}
    last = [entry for entry in log if "held_out_text" in entry][-1]
    return CARD.format(
        snippet=snippet("llava_pages"),
        run=run(report),
        parameters=report["parameters"] / 1e6,
        questions=report["questions"],
        few=report["questions"] // 5,
        accuracy=accuracy(report),
        pruned=table(
            {f"{share:.0%}": 0 for share in SHARES},
            {"most CLS attention (layer -2)": pruned["cls"], "random": pruned["random"]},
        ),
        text=report["text_patches"],
        localisation=table(report["localisation"], {"found": [*report["localisation"].values()]}),
        readouts=table(dict.fromkeys(RELATIONS), {"right": [last[f"held_out_{name}"] for name in RELATIONS]}),
        tower=plan(TOWER, log, "tower").replace("scenes", "pages"),
        language=plan(LANGUAGE, log, "language").replace("scenes", "pages"),
    )


CARD = (
    FRONT
    + """
# A tiny LLaVA that reads pages, for tests, demos and studies of visual tokens

A real `LlavaForConditionalGeneration` ({parameters:.2f} M parameters: a CLIP tower with CLS, a two-layer projector, a
Llama) that answers questions about pages with 20 to 60 words and numbers in rows and columns. It reads 576 visual
tokens (192 px, patch 8). It was trained on full sequences: it has never seen a dropped token.

{snippet}

## Accuracy

Exact answers to {questions} held-out questions (greedy `generate`, all tokens); the second row always gives the most
frequent answer of its kind.

{accuracy}

Accuracy over all kinds on the first {few} of these questions when only a share of the visual tokens is fed, at their
original positions:

{pruned}

## Where the text is

Text lies on {text:.0%} of the patches. Linear read-outs of the tower's output name on these patches of held-out pages the entry itself (`text`), the word that it belongs to (`word`),
the word above its column (`head`) and the entry on its left (`left`), "none" included:

{readouts}

Share of the text patches found among the 50 % of patches with most CLS attention (mean over heads, 60 held-out pages);
a random choice finds 0.50. `layer -2` is the layer whose output the language model reads.

{localisation}

## Data

Pages composed by `vtoken/tiny/pages.py`: tables (a column of words, one to four columns of two-digit numbers, a word
above each of these) and lists (one to three blocks of a word and a number per row), 40 words of three or four
capitals, 7 or 8 px high, each in a cell of 8 px that is a patch, dark on plain paper or on a pale photograph. No word and no number is twice on a page. The glyphs come from fonts
that matplotlib ships (`vtoken/tiny/letters.py`), the photographs from scikit-image (`vtoken/tiny/assets.py`). The test
split uses other font families, other photographs and other layouts (three columns of numbers or two blocks, other
gaps) than the training split. Four kinds of question: which number belongs to a word (under another), which
word belongs to a number, what is right of an entry, is a word on the page.

## Recipe

{run}
The language model starts from that of the shipped tiny LLaVA. The tower starts from random weights, sine positions and
heads that look at neighbouring patches, along rows and along columns.

1. Tower, {tower}:
   text patches name the entry and its relations as above, and half-way up the entry, after the second layer the letters
   around, after the first their own letter.
   The CLS state after each of the last four layers names the words on the page; in training it starts again before some
   of those layers. In the last two thirds of the steps a further term asks the CLS attention of layers -4 to -2 (mean
   over heads) to cover all text patches evenly.
2. Projector and language model with the tower frozen, {language}:
   twenty questions per page in one sequence, each of which sees the image and itself only. The embeddings of words and
   numbers start from those of the tower's read-outs. A further term trains one head of the layers 2 and 3 to look, from
   where the answer is read, at the patches that the question asks about.

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`. The held-out curves are measured on pages of the test split other than those
of the tables above.

## Limits

It knows 40 words and 90 numbers and the pages above, nothing else: one image per prompt, one question per prompt. Its
answers to other images say nothing about the world. Numbers measured on it compare methods of token reduction in kind,
not in degree: large models on natural documents behave differently. Its tower was trained to name in the patches of an
entry what that entry goes with, so that an answer is read from one to eight patches.
"""
)
