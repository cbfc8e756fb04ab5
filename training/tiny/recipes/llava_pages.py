"""Recipe of tiny LLaVA for pages: 256 visual tokens of two letters each, read in rows and columns.

Stage ``tower`` teaches a tower to read (`training.tiny.pages_tower`), stage ``projector`` freezes it and
teaches the projector to name what it read by the embeddings of the language model, stage ``language`` teaches
the projector and the language model to answer (`training.tiny.pages_language`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from vtoken.tiny.pages import CELL, SIDE, make_page, questions, vocabulary
from vtoken.tiny.questions import held_out

from .. import language, pages_tower
from ..card import FRONT, accuracy, plan, run, snippet, table
from ..evaluate import most_frequent, pruned_accuracy
from ..language import pack
from ..looking import Look
from ..models import build_llava, start_tower
from ..pages_language import LOOKS, SLOTS, WIDTH, Codes, choose, look_targets, start_projector, start_reading
from ..pages_tower import RELATIONS, PageHeads, start_neighbours, targets
from ..tower import localisation, to_pixels

__all__ = ["build", "card", "measure", "train"]

TOWER: dict[str, Any] = {
    "steps": 900,
    "batch": 6,
    "rate": 2e-3,
    "muon_rate": 0.02,
    "reset": 0.5,
    "look": 0.25,
}
PROJECTOR: dict[str, Any] = {"steps": 600, "batch": 8, "rate": 2e-3, "muon_rate": 0.02}
LANGUAGE: dict[str, Any] = {"steps": 660, "batch": 4, "rate": 2e-3, "muon_rate": 0.02, "reading": 1.0}
THETA = 1e6  # of the rotary positions: a head matches texts over 256 tokens by its slow angles
SHARES = (0.5, 0.2, 0.1)
FOUND = 0.5  # share of the patches among which text is looked for
LATER = 50_000_000  # stage two goes on with pages that stage one has not seen
CHECK = 7_000_000  # pages of the test split for the measures along the way


def build(width: int = 128, tower_layers: int = 6, llm_layers: int = 4, heads: int = 4) -> tuple[Any, Any]:
    """An untrained LLaVA with 256 visual tokens (256 px, patch 16, CLS dropped) and its processor.

    Args:
        width: hidden size of the tower and of the language model; a multiple of ``2 * heads``.
        tower_layers: layers of the CLIP tower; the language model reads the output of the last but one.
        llm_layers: layers of the Llama.
        heads: attention heads of both.

    Returns:
        ``(LlavaForConditionalGeneration, LlavaProcessor)`` in float32.
    """
    model, processor = build_llava(vocabulary(), width, (tower_layers, llm_layers), heads, SIDE, CELL, THETA)
    start_tower(model.model.vision_tower)
    return model, processor


def train(
    model: Any, processor: Any, log: list[dict], seed: int = 0, seconds: float | None = None, **limits: Any
) -> None:
    """All stages, in place; appends to ``log``. Limits as in `optimise`."""
    start_neighbours(model.model.vision_tower, tower_batch(LATER, 6, "train", 0)[0])
    train_tower(model, log, seed, seconds=seconds and seconds * 0.55, **limits)
    torch.manual_seed(seed + 1)
    train_projector(model, processor, log, seed, seconds=seconds and seconds * 0.03, **limits)
    train_language(model, processor, log, seed, seconds=seconds and seconds * 0.42, **limits)


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


def train_projector(
    model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 24, **limits: Any
) -> None:
    """Stage two and the start of the language model, in place; arguments as in `train_tower`."""
    codes = Codes(model.config.text_config.hidden_size)
    start_reading(model, processor.tokenizer.get_vocab(), codes)
    start_projector(
        model,
        tower_batch(seed * 2 * LATER + LATER, 12 * checks, "train", 0),
        tower_batch(CHECK, checks, "test", 0),
        codes,
        PROJECTOR,
        log,
        **limits,
    )


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
    """Stage three, in place, with the tower frozen; arguments as in `train_tower`."""
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
        "recipe": {"tower": TOWER, "projector": PROJECTOR, "language": LANGUAGE},
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
    last = [entry for entry in log if entry["stage"] == "tower" and "held_out_text" in entry][-1]
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
        projector=plan(PROJECTOR, log, "projector").replace("scenes", "pages"),
        language=plan(LANGUAGE, log, "language").replace("scenes", "pages"),
    )


CARD = (
    FRONT
    + """
# A tiny LLaVA that reads pages, for tests, demos and studies of visual tokens

A real `LlavaForConditionalGeneration` ({parameters:.2f} M parameters: a CLIP tower with CLS, a two-layer projector, a
Llama) that answers questions about pages with 20 to 56 words and numbers in rows and columns. It reads 256 visual
tokens (256 px, patch 16), two letters each. It was trained on full sequences: it has never seen a dropped token.

{snippet}

## Accuracy

Exact answers to {questions} held-out questions (greedy `generate`, all tokens); the second row always gives the most
frequent answer of its kind.

{accuracy}

Accuracy over all kinds on the first {few} of these questions when only a share of the visual tokens is fed, at their
original positions:

{pruned}

## Where the text is

Text lies on {text:.0%} of the patches. Linear read-outs of the tower's output name on these patches of held-out pages
the entry itself (`text`) and the number of a word or the word of a number (`partner`):

{readouts}

Share of the text patches found among the 50 % of patches with most CLS attention (mean over heads, 60 held-out pages);
a random choice finds 0.50. `layer -2` is the layer whose output the language model reads.

{localisation}

## Data

Pages composed by `vtoken/tiny/pages.py`: one to three blocks, each with a word and a two-digit number per row.
The 32 words have four capitals, 11 to 13 px high, and lie on two patches; each half of a word occurs in no other word.
The 36 numbers have digits that are not alike (1, 2, 4, 6, 7, 9) and lie on one patch. Text is dark on plain paper or on
a pale photograph. No word and no number is twice on a page. The glyphs come from fonts that matplotlib ships
(`vtoken/tiny/letters.py`), the photographs from scikit-image (`vtoken/tiny/assets.py`). The test split uses other font
families, other photographs and other layouts (another gap between word and number) than the training split. Three kinds
of question: which number belongs to a word, which word belongs to a number, is a word on the page.

## Recipe

{run}
All starts from random weights, but for the heads named below and the tower's sine positions.

1. Tower, {tower}:
   text patches name the entry and its partner, after the second layer the entry alone, after the first their letters;
   all patches name their row and column. In two layers one head is shown the word of each number, on its left, and one
   the number of each word, on its right; they start as heads that look two patches away.
   The CLS state after each of the last four layers names the words on the page; in training it starts again before some
   of those layers. In the last two thirds of the steps a further term asks the CLS attention of layers -4 to -2 (mean
   over heads) to cover all text patches evenly.
2. Projector with the tower frozen, {projector}:
   a visual token comes to hold the embedding of its text plus that of its partner, turned by a random rotation.
3. Projector and language model with the tower frozen, {language}:
   sixteen questions per page in one sequence, each of which sees the image and itself only. One head of layer 0 starts
   as one that takes the word or number of a question to the end of the prompt, one head of layers 2 and 3 each as one
   that looks for it from there. A further term trains the latter two to look at the patches that show it.

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`; `note` there says how this run differed from the recipe. The held-out curves
are measured on pages of the test split other than those of the tables above.

## Limits

It knows 32 words and 36 numbers and the pages above, nothing else: one image per prompt, one question per prompt. Its
answers to other images say nothing about the world. Numbers measured on it compare methods of token reduction in kind,
not in degree: large models on natural documents behave differently. Its tower was trained to name in the patches of an
entry what that entry goes with, and its language model to look up the text of the question, so that an answer is read
from one or two patches: a method has to read the question.
"""
)
