"""Recipe of the tiny LLaVA for cluttered scenes: the tiny LLaVA at 192 px, 576 visual tokens, trained on.

Stage ``tower`` goes on from the shipped tiny LLaVA, with its 12 x 12 positions stretched to 24 x 24; stage
``language`` freezes the tower and teaches the projector and the language model, whose attention is shown the
object that a question names (`training.tiny.looking`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vtoken.tiny import load
from vtoken.tiny.clutter import SIDE, SIZES, held_out, make_clutter, questions, size_of, vocabulary
from vtoken.tiny.scenes import Question, Scene, SceneObject

from .. import language
from .. import tower as stages
from ..card import FRONT, accuracy, plan, run, snippet, table
from ..evaluate import most_frequent
from ..language import choose_kinds, pack
from ..looking import Look
from ..models import build_llava, start_from
from ..tower import TowerHeads, View, localisation, targets, to_pixels

__all__ = ["build", "card", "measure", "train"]

TOWER: dict[str, Any] = {"steps": 400, "batch": 8, "rate": 2e-3, "muon_rate": 0.02, "reset": 0.5, "look": 0.5}
LANGUAGE: dict[str, Any] = {"steps": 900, "batch": 8, "rate": 2e-3, "muon_rate": 0.02, "reading": 0.5}
LATER = 50_000_000  # stage two goes on with scenes that stage one has not seen
CHECK = 7_000_000
SLOTS, WIDTH = 16, 10  # questions per scene; tokens of "where is the red star ? assistant : top left"
WANTED = {"size": 6, "where": 5, "exists": 5}
LOOKS = (2, 3)  # layers of the language model whose first head looks from the question's end


def build(width: int = 128, tower_layers: int = 6, llm_layers: int = 4, heads: int = 4) -> tuple[Any, Any]:
    """An untrained LLaVA with 576 visual tokens (192 px, patch 8, CLS dropped) and its processor.

    Arguments and result as those of the recipe of the tiny LLaVA.
    """
    return build_llava(vocabulary(), width, (tower_layers, llm_layers), heads, SIDE)


def warm_start(model: Any) -> None:
    """The shipped tiny LLaVA's weights, in place: tower positions stretched, embeddings of the words it knows."""
    theirs = load("llava")[0].state_dict()
    name = next(name for name in theirs if name.endswith("position_embedding.weight"))
    grid = theirs[name][1:].unflatten(0, (12, 12)).permute(2, 0, 1)[None]
    wide = F.interpolate(grid, (SIDE // 8, SIDE // 8), mode="bilinear")[0].permute(1, 2, 0).flatten(0, 1)
    theirs[name] = torch.cat([theirs[name][:1], wide])
    start_from(model.state_dict().items(), theirs)


def train(
    model: Any, processor: Any, log: list[dict], seed: int = 0, seconds: float | None = None, **limits: Any
) -> None:
    """Warm start and both stages, in place; appends to ``log``. Limits as in `optimise`."""
    warm_start(model)
    train_tower(model, log, seed, seconds=seconds and seconds * 0.4, **limits)
    torch.manual_seed(seed + 1)
    train_language(model, processor, log, seed, seconds=seconds and seconds * 0.6, **limits)


def view(scene: Scene) -> View:
    """A scene as a whole."""
    parts = zip(*((o.shape, o.colour, size_of(o)) for o in scene.objects), strict=True)
    return View(scene.masks(), *parts)


def tower_batch(first: int, size: int, split: str, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels and targets of the scenes of a step."""
    scenes = [make_clutter(first + step * size + i, split) for i in range(size)]
    goal = targets([view(scene) for scene in scenes], size_names=tuple(SIZES))
    return to_pixels([scene.image for scene in scenes]), goal


def choose(scene: Scene, rng: np.random.Generator) -> list[tuple[Question, SceneObject | None]]:
    """Sixteen questions about a scene with the object that each names, of all kinds."""
    pool = questions(scene)
    return choose_kinds(pool, rng, WANTED, SLOTS, kind=lambda pair: pair[0].kind)


def language_batch(
    first: int, size: int, split: str, vocabulary: dict[str, int], step: int
) -> tuple[torch.Tensor, Any, dict[str, torch.Tensor]]:
    """Pixels, packed questions and attention targets of the scenes of a step."""
    start = first + step * size
    scenes = [make_clutter(start + i, split) for i in range(size)]
    rng = np.random.Generator(np.random.PCG64(start))
    asked = [choose(scene, rng) for scene in scenes]
    at = np.full((size, SLOTS), -1)
    shows = np.zeros((size, SLOTS, (SIDE // 8) ** 2), bool)
    for i, (scene, some) in enumerate(zip(scenes, asked, strict=True)):
        owners = view(scene).owners()
        for slot, (question, item) in enumerate(some):
            at[i, slot] = (
                slot * WIDTH + len(question.text.split()) + 2
            )  # after the text: "?", "assistant", ":"
            if item is not None:
                shows[i, slot] = owners == scene.objects.index(item)
    goal = {"at": torch.from_numpy(at), "shows": torch.from_numpy(shows)}
    packed = pack([[q for q, _ in some] for some in asked], vocabulary, SLOTS, WIDTH)
    return to_pixels([scene.image for scene in scenes]), packed, goal


def train_tower(model: Any, log: list[dict], seed: int = 0, checks: int = 24, **limits: Any) -> None:
    """Stage one, in place; appends to ``log``. ``checks``: held-out scenes of the measures along the way."""
    tower = model.model.vision_tower
    pixels, goal = check = tower_batch(CHECK, checks, "test", 0)
    stages.train_tower(
        tower,
        TowerHeads(model.config.vision_config.hidden_size, size_names=tuple(SIZES)),
        partial(tower_batch, seed * 2 * LATER, TOWER["batch"], "train"),
        check,
        TOWER,
        log,
        more_facts=lambda right: localisation(tower, pixels, goal["owner"] >= 0),
        **limits,
    )


def train_language(
    model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 24, **limits: Any
) -> None:
    """Stage two, in place, with the tower frozen; arguments as in `train_tower`."""
    vocabulary = processor.tokenizer.get_vocab()

    look = Look(model, LOOKS)
    language.train_language(
        model,
        partial(language.visual_tokens, model),
        partial(language_batch, seed * 2 * LATER + LATER, LANGUAGE["batch"], "train", vocabulary),
        [language_batch(CHECK, checks, "test", vocabulary, 0)],
        LANGUAGE,
        log,
        [vocabulary["user"], vocabulary[":"]],
        width=WIDTH,
        reading=look,
        **limits,
    )
    look.remove()


def measure(model: Any, processor: Any, n: int = 500) -> dict[str, Any]:
    """Blind accuracy and CLS attention on objects."""
    seen = [question for i in range(200) for question, _ in questions(make_clutter(i))]
    pixels, goal = tower_batch(0, 100, "test", 0)
    return {
        "recipe": {"tower": TOWER, "language": LANGUAGE},
        "most_frequent_answer": most_frequent(held_out(n), seen),
        "localisation": localisation(model.model.vision_tower, pixels, goal["owner"] >= 0),
    }


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The model card."""
    return CARD.format(
        snippet=snippet("llava_clutter"),
        run=run(report),
        parameters=report["parameters"] / 1e6,
        questions=report["questions"],
        accuracy=accuracy(report),
        localisation=table(report["localisation"], {"found": [*report["localisation"].values()]}),
        tower=plan(TOWER, log, "tower"),
        language=plan(LANGUAGE, log, "language"),
    )


CARD = (
    FRONT
    + """
# A tiny LLaVA for cluttered scenes

A real `LlavaForConditionalGeneration` ({parameters:.2f} M parameters: a CLIP tower with CLS, a two-layer projector, a
Llama) that answers questions about one of 15 to 30 coloured shapes of three sizes on photographs. It reads 576 visual
tokens (192 px, patch 8), as many as LLaVA-1.5. It has never seen a dropped token.

{snippet}

## Accuracy

Exact answers to {questions} held-out questions (greedy `generate`, all tokens); the second row always gives the most
frequent answer of its kind.

{accuracy}

## CLS attention

Share of the object patches found among the 20 % of patches with most CLS attention (mean over heads, 100 held-out
scenes); a random choice finds 0.20. `layer -2` is the layer whose output the language model reads.

{localisation}

## Data

Scenes of 15 to 30 shapes (of 8, in 7 colours, about 12, 17 and 24 px across, no pair of shape and colour twice) in rows
on crops of photographs that scikit-image ships (CC0 or public domain, listed in `vtoken/tiny/assets.py`), composed by
`vtoken/tiny/clutter.py`. The test split uses other glyphs, other photographs and other layouts than the training split.
Every question names an object by two attributes: what size is the red star, where is the red star, is there a red star.

## Recipe

{run}
It starts from the weights of the shipped tiny LLaVA, its tower's positions stretched from 12 x 12 to 24 x 24.

1. Tower, {tower}: as that of the tiny LLaVA, with the size of an object in place of their number.
2. Projector and language model with the tower frozen, {language}:
   sixteen questions per scene in one sequence, each of which sees the image and itself only. One head of the last two
   layers is shown the visual tokens of the object that a question names.

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`; `note` there says how this run differed from the recipe.

## Limits

It knows about 60 words and the scenes above, nothing else: one image per prompt, one question per prompt. Numbers
measured on it compare methods of token reduction in kind, not in degree. Its CLS attention was trained to find the
objects, but at small budgets all objects are more than fit: a method has to read the question.
"""
)
