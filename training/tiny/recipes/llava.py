"""Recipe of tiny LLaVA-1.5: CLIP tower with CLS, two-layer projector, Llama; trained from nothing.

Stage ``tower`` teaches the tower (`training.tiny.tower`); stage ``language`` freezes it and teaches the
projector and the language model (`training.tiny.language`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from vtoken.tiny.questions import held_out
from vtoken.tiny.scenes import SIZE, make_scene, questions

from .. import language
from .. import tower as stages
from ..card import FRONT, accuracy, plan, run, snippet, table
from ..evaluate import most_frequent, pruned_accuracy
from ..language import choose, pack
from ..models import build_llava, start_tower
from ..tower import TowerHeads, localisation, targets, to_pixels, view

__all__ = ["build", "card", "measure", "train"]

TOWER: dict[str, Any] = {
    "steps": 900,
    "batch": 32,
    "rate": 2e-3,
    "muon_rate": 0.02,
    "reset": 0.5,
    "look": 0.5,
}
LANGUAGE: dict[str, Any] = {"steps": 600, "batch": 32, "rate": 2e-3, "muon_rate": 0.02}
LATER = 50_000_000  # stage two goes on with scenes that stage one has not seen
SHARES = (0.5, 0.2, 0.1)


def build(width: int = 128, tower_layers: int = 6, llm_layers: int = 4, heads: int = 4) -> tuple[Any, Any]:
    """An untrained LLaVA with 144 visual tokens (96 px, patch 8, CLS dropped) and its processor.

    Args:
        width: hidden size of the tower and of the language model; a multiple of ``2 * heads``.
        tower_layers: layers of the CLIP tower; the language model reads the output of the last but one.
        llm_layers: layers of the Llama.
        heads: attention heads of both.

    Returns:
        ``(LlavaForConditionalGeneration, LlavaProcessor)`` in float32.
    """
    model, processor = build_llava((), width, (tower_layers, llm_layers), heads, SIZE)
    start_tower(model.model.vision_tower)
    return model, processor


def train(
    model: Any, processor: Any, log: list[dict], seed: int = 0, seconds: float | None = None, **limits: Any
) -> None:
    """Both stages, in place; appends to ``log``. Limits as in `training.tiny.loop.optimise`."""
    train_tower(model, log, seed, seconds=seconds and seconds * 0.45, **limits)
    torch.manual_seed(seed + 1)
    train_language(model, processor, log, seed, seconds=seconds and seconds * 0.55, **limits)


def tower_batch(first: int, size: int, split: str, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels and targets of the scenes of a step."""
    scenes = [make_scene(first + step * size + i, split) for i in range(size)]
    return to_pixels([scene.image for scene in scenes]), targets([view(scene) for scene in scenes])


def language_batch(
    first: int, size: int, split: str, vocabulary: dict[str, int], step: int
) -> tuple[torch.Tensor, Any]:
    """Pixels and packed questions of the scenes of a step."""
    start = first + step * size
    scenes = [make_scene(start + i, split) for i in range(size)]
    rng = np.random.Generator(np.random.PCG64(start))
    return to_pixels([scene.image for scene in scenes]), pack(
        [choose(scene, rng) for scene in scenes], vocabulary
    )


def train_tower(model: Any, log: list[dict], seed: int = 0, checks: int = 200, **limits: Any) -> None:
    """Stage one, in place; appends to ``log``. ``checks``: held-out scenes of the measures along the way."""
    tower = model.model.vision_tower
    pixels, goal = check = tower_batch(7_000_000, checks, "test", 0)
    stages.train_tower(
        tower,
        TowerHeads(model.config.vision_config.hidden_size),
        partial(tower_batch, seed * 2 * LATER, TOWER["batch"], "train"),
        check,
        TOWER,
        log,
        more_facts=lambda right: localisation(tower, pixels, goal["owner"] >= 0),
        **limits,
    )


def train_language(
    model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 100, **limits: Any
) -> None:
    """Stage two, in place, with the tower frozen; arguments as in `train_tower`."""
    vocabulary = processor.tokenizer.get_vocab()

    language.train_language(
        model,
        partial(language.visual_tokens, model),
        partial(language_batch, seed * 2 * LATER + LATER, LANGUAGE["batch"], "train", vocabulary),
        [language_batch(7_000_000, checks, "test", vocabulary, 0)],
        LANGUAGE,
        log,
        [vocabulary["user"], vocabulary[":"]],
        **limits,
    )


def measure(model: Any, processor: Any, n: int = 500) -> dict[str, Any]:
    """Blind accuracy, CLS attention on objects, and accuracy with a share of the visual tokens."""
    seen = [question for i in range(500) for question in questions(make_scene(i))]
    pixels, goal = tower_batch(0, 500, "test", 0)
    return {
        "recipe": {"tower": TOWER, "language": LANGUAGE},
        "most_frequent_answer": most_frequent(held_out("llava", n), seen),
        "localisation": localisation(model.model.vision_tower, pixels, goal["owner"] >= 0),
        "pruned": {
            f"{by} {share}": pruned_accuracy(model, processor, share, by, n)["all"]
            for by in ("cls", "random")
            for share in SHARES
        },
    }


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The model card."""
    pruned = {by: [report["pruned"][f"{by} {share}"] for share in SHARES] for by in ("cls", "random")}
    return CARD.format(
        snippet=snippet("llava"),
        run=run(report),
        parameters=report["parameters"] / 1e6,
        questions=report["questions"],
        accuracy=accuracy(report),
        pruned=table(
            {f"{share:.0%}": 0 for share in SHARES},
            {"most CLS attention (layer -2)": pruned["cls"], "random": pruned["random"]},
        ),
        localisation=table(report["localisation"], {"found": [*report["localisation"].values()]}),
        tower=plan(TOWER, log, "tower"),
        language=plan(LANGUAGE, log, "language"),
    )


CARD = (
    FRONT
    + """
# A tiny LLaVA for tests, demos and studies of visual tokens

A real `LlavaForConditionalGeneration` ({parameters:.2f} M parameters: a CLIP tower with CLS, a two-layer projector, a
Llama) that answers questions about coloured shapes on photographs. It reads 144 visual tokens (96 px, patch 8) and was
trained from scratch on ordinary, full sequences: it has never seen a dropped token.

{snippet}

## Accuracy

Exact answers to {questions} held-out questions (greedy `generate`, all tokens); the second row always gives the most
frequent answer of its kind.

{accuracy}

Accuracy over all kinds on the same questions when only a share of the visual tokens is fed, at their original
positions:

{pruned}

## CLS attention

Share of the object patches found among the 20 % of patches with most CLS attention (mean over heads, 500 held-out
scenes); a random choice finds 0.20. `layer -2` is the layer whose output the language model reads.

{localisation}

## Data

Scenes of 2 to 4 shapes (of 8, in 7 colours, 15 to 19 px across, none twice) on crops of photographs that scikit-image
ships (CC0 or public domain, listed in `vtoken/tiny/assets.py`), composed by `vtoken/tiny/scenes.py`. The test split
uses other glyphs and other photographs than the training split. Five kinds of question: what shape is the red one, what
colour is the star, where is it, how many objects are there, is there a red star.

## Recipe

{run}

1. Tower, {tower}:
   the patches of an object name its shape, colour, quadrant and the number of objects; half-way up they draw the
   outline around them. The CLS state after each of the last four layers names the pairs of shape and colour that are
   present; in training it starts again before some of those layers, so that each of them looks at the objects. In the
   last third of the steps a further term asks the CLS attention of layers -4 to -2 (mean over heads) to cover all
   patches of the objects evenly.
2. Projector and language model with the tower frozen, {language}:
   ten questions per scene in one sequence, each of which sees the image and itself only.

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`. The held-out curves are measured on scenes of the test split other than those
of the tables above.

## Limits

It knows about 60 words and the scenes above, nothing else: one image per prompt, one question per prompt. Its answers
to other images say nothing about the world. Numbers measured on it compare methods of token reduction in kind, not in
degree: large models on natural images behave differently. In particular its CLS attention was trained to find the
objects, and all the questions are about objects: methods that read CLS attention have an easy time here.
"""
)
