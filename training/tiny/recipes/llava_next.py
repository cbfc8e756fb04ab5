"""Recipe of tiny LLaVA-NeXT: tiny LLaVA extended to wide and tall images with small objects.

It starts from the shipped tiny LLaVA. Stage ``tower`` teaches its tower crops of 64 px (64 patches) and base
images; stage ``language`` freezes it and teaches the projector, the newline token and the language model the
long layout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from vtoken.tiny import load
from vtoken.tiny.questions import answers, held_out, score
from vtoken.tiny.scenes import questions
from vtoken.tiny.scenes_wide import SMALL, cut, make_wide

from .. import language
from .. import tower as stages
from ..card import FRONT, accuracy, plan, run, snippet, table
from ..evaluate import most_frequent
from ..language import choose, pack
from ..models import build_tokenizer, clip_llava, clip_pixels, clip_reading, generation_config
from ..tower import TowerHeads, View, hidden_states, localisation, targets

__all__ = ["build", "card", "measure", "train"]

TOWER: dict[str, Any] = {
    "steps": 300,
    "batch": 16,
    "rate": 1e-3,
    "muon_rate": 0.01,
    "reset": 0.5,
    "look": 0.5,
}
LANGUAGE: dict[str, Any] = {"steps": 350, "batch": 16, "rate": 1e-3, "muon_rate": 0.01}
TILE = SMALL.tile
LATER = 50_000_000  # stage two goes on with scenes that stage one has not seen
CHECK = 7_000_000  # scenes of the test split for the measures along the way


def build(width: int = 128, tower_layers: int = 6, llm_layers: int = 4, heads: int = 4) -> tuple[Any, Any]:
    """An untrained LLaVA-NeXT (64 visual tokens per 64 px crop, a base image, six crops) and its processor.

    Args:
        width: hidden size of the tower and of the language model; a multiple of ``2 * heads``.
        tower_layers: layers of the CLIP tower; the language model reads the output of the last but one.
        llm_layers: layers of the Llama.
        heads: attention heads of both.

    Returns:
        ``(LlavaNextForConditionalGeneration, LlavaNextProcessor)`` in float32.
    """
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = build_tokenizer()
    pinpoints = [list(size) for size in SMALL.pinpoints]
    kind = partial(LlavaNextConfig, image_grid_pinpoints=pinpoints)
    config = clip_llava(kind, tokenizer, width, (tower_layers, llm_layers), heads, TILE)
    model = LlavaNextForConditionalGeneration(config).float()
    model.generation_config = generation_config(tokenizer)
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(**clip_pixels(TILE), image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        **clip_reading(),
    )
    return model, processor


@torch.no_grad()
def warm_start(model: Any) -> None:
    """The shipped tiny LLaVA's weights, in place; of its 12 x 12 tower positions the first 8 x 8."""
    theirs = load("llava")[0].state_dict()
    for name, value in model.state_dict().items():
        if name.endswith("position_embedding.weight"):
            cls, grid = theirs[name][:1], theirs[name][1:].unflatten(0, (12, 12))
            value.copy_(torch.cat([cls, grid[: TILE // 8, : TILE // 8].flatten(0, 1)]))
        elif name in theirs and theirs[name].shape == value.shape:
            value.copy_(theirs[name])


def train(
    model: Any, processor: Any, log: list[dict], seed: int = 0, seconds: float | None = None, **limits: Any
) -> None:
    """Warm start and both stages, in place; appends to ``log``. Limits as in `optimise`."""
    warm_start(model)
    train_tower(model, processor, log, seed, seconds=seconds and seconds * 0.3, **limits)
    train_language(model, processor, log, seed, seconds=seconds and seconds * 0.7, **limits)


def views(processor: Any, first: int, size: int, split: str) -> tuple[torch.Tensor, list[View], torch.Tensor]:
    """Views of some scenes: all base images, all crops with an object, every fourth empty crop.

    Returns pixels ``(n, 3, 64, 64)``, what they show, and which of them are base images, ``(n,)`` bool.
    """
    pixels, seen, base = [], [], []
    for i in range(first, first + size):
        scene = make_wide(i, split)
        crops = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"][0]
        forms, colours = [o.shape for o in scene.objects], [o.colour for o in scene.objects]
        for k, (crop, masks) in enumerate(zip(crops, cut(scene))):
            if k == 0 or masks.any() or (i + k) % 4 == 0:
                pixels.append(crop)
                seen.append(View.of(masks, forms, colours))
                base.append(k == 0)
    return torch.stack(pixels), seen, torch.tensor(base)


def tower_batch(
    processor: Any, first: int, size: int, step: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels and targets of the base images and crops of a step."""
    pixels, seen, _ = views(processor, first + step * size, size, "train")
    return pixels, targets(seen)


def train_tower(
    model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 40, **limits: Any
) -> None:
    """Stage one, in place; appends to ``log``. ``checks``: held-out scenes of the measures along the way."""
    tower = model.model.vision_tower
    pixels, seen, base = views(processor, CHECK, checks, "test")
    goal = targets(seen)
    on = goal["owner"] >= 0
    whole = base[:, None].expand_as(on)[on]

    def more_facts(right: torch.Tensor) -> dict[str, float]:
        shares = {"held_out_form_crops": right.cpu()[~whole].float().mean().item()}
        shares["held_out_form_base"] = right.cpu()[whole].float().mean().item()
        return shares | localisation(tower, pixels[on.any(1)], on[on.any(1)])

    stages.train_tower(
        tower,
        TowerHeads(model.config.vision_config.hidden_size),
        partial(tower_batch, processor, seed * 2 * LATER, TOWER["batch"]),
        (pixels, goal),
        TOWER,
        log,
        more_facts=more_facts,
        **limits,
    )


def language_batch(
    processor: Any, first: int, size: int, split: str, step: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], Any]:
    """Pixels and image sizes of the scenes of a step, all of one layout, and packed questions."""
    stride = len(SMALL.canvases)
    start = first + step // stride * stride * size + step % stride
    scenes = [make_wide(start + i * stride, split) for i in range(size)]
    rng = np.random.Generator(np.random.PCG64(start))
    shown = processor.image_processor([scene.image for scene in scenes], return_tensors="pt")
    asked = pack([choose(scene, rng) for scene in scenes], processor.tokenizer.get_vocab())
    return (shown["pixel_values"], shown["image_sizes"]), asked


def visual_tokens(model: Any, shown: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Visual tokens of images of one size: ``(n, tokens, hidden)``; no gradient for the tower."""
    (pixels, sizes), inner, config = shown, model.model, model.config
    with torch.no_grad():
        states = hidden_states(inner.vision_tower, pixels.to(model.device).flatten(0, 1))
    features = inner.multi_modal_projector(states[config.vision_feature_layer][:, 1:]).unflatten(
        0, pixels.shape[:2]
    )
    strategy = config.vision_feature_select_strategy
    return torch.stack(inner.pack_image_features(list(features), sizes, strategy, inner.image_newline)[0])


def train_language(
    model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 25, **limits: Any
) -> None:
    """Stage two, in place, with the tower frozen; ``checks``: held-out scenes of each layout."""
    vocabulary = processor.tokenizer.get_vocab()

    language.train_language(
        model,
        partial(visual_tokens, model),
        partial(language_batch, processor, seed * 2 * LATER + LATER, LANGUAGE["batch"], "train"),
        [language_batch(processor, CHECK, checks, "test", k) for k in range(len(SMALL.canvases))],
        LANGUAGE,
        log,
        [vocabulary["user"], vocabulary[":"]],
        **limits,
    )


def hide(model: Any, part: str, inputs: Any) -> None:
    """Mask the visual tokens of the ``crops`` or of the ``base`` image, so that only the rest is read."""
    visual = inputs["input_ids"] == model.config.image_token_id
    crops = visual & (visual.cumsum(1) > (TILE // 8) ** 2)
    inputs["attention_mask"][crops if part == "crops" else visual & ~crops] = 0


def measure(model: Any, processor: Any, n: int = 500) -> dict[str, Any]:
    """Blind accuracy, accuracy from the base image or the crops alone, and the number of visual tokens."""
    pairs = held_out("llava_next", n)
    seen = [question for i in range(500) for question in questions(make_wide(i))]
    canvases = [(height, width) for width, height in SMALL.canvases]
    return {
        "recipe": {"tower": TOWER, "language": LANGUAGE},
        "most_frequent_answer": most_frequent(pairs, seen),
        "visual_tokens": processor._get_num_multimodal_tokens(image_sizes=canvases)["num_image_tokens"],
        "base_alone": score(pairs, answers(model, processor, pairs, change=partial(hide, model, "crops"))),
        "crops_alone": score(pairs, answers(model, processor, pairs, change=partial(hide, model, "base"))),
    }


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The model card."""
    scores = report["accuracy"]
    parts = {
        "all tokens": scores,
        "base image alone": report["base_alone"],
        "crops alone": report["crops_alone"],
    }
    last = [entry for entry in log if "held_out_form_base" in entry][-1]
    tokens = report["visual_tokens"]
    return CARD.format(
        snippet=snippet("llava_next"),
        run=run(report),
        parameters=report["parameters"] / 1e6,
        questions=report["questions"],
        accuracy=accuracy(report),
        parts=table(scores, {name: [part[kind] for kind in scores] for name, part in parts.items()}),
        crops=last["held_out_form_crops"],
        base=last["held_out_form_base"],
        looked=last["layer -2"],
        tokens=", ".join(f"{n} ({w} x {h} px)" for n, (w, h) in zip(tokens, SMALL.canvases)),
        mean=sum(tokens) / len(tokens),
        tower=plan(TOWER, log, "tower"),
        language=plan(LANGUAGE, log, "language"),
    )


CARD = (
    FRONT
    + """
# A tiny LLaVA-NeXT for tests, demos and studies of visual tokens

A real `LlavaNextForConditionalGeneration` ({parameters:.2f} M parameters: a CLIP tower with CLS, a two-layer projector, a
Llama) that answers questions about small coloured shapes on wide and tall photographs. It reads a base image (64 x 64 px
of the whole, 64 visual tokens) and six crops of 64 px, unpadded, with a newline token after each row of patches:
{tokens}; {mean:.0f} on average.
It was trained on full sequences: it has never seen a dropped token.

{snippet}

## Accuracy

Exact answers to {questions} held-out questions (greedy `generate`, all tokens); the second row always gives the most
frequent answer of its kind.

{accuracy}

## What the crops are for

The objects are 15 to 19 px across; in the base image they are 5 to 6 px by 8 to 11 px. Accuracy on the same questions
when the attention mask hides the tokens of the crops, or those of the base image (zero-shot: no training without them):

{parts}

A linear read-out of the tower, trained on crops and base images alike, names the shape on {crops:.1%} of the object
patches of held-out crops and on {base:.1%} of those of base images. Of the object patches, {looked:.1%} are among the
20 % of patches with most CLS attention in the layer whose output is read (views with an object; a random choice: 20 %).

## Data

Scenes of 2 to 4 shapes (of 8, in 7 colours, none twice) on crops of photographs that scikit-image ships (CC0 or public
domain, listed in `vtoken/tiny/assets.py`; where a canvas is larger than a photograph this goes on as its mirror image),
composed by `vtoken/tiny/scenes_wide.py`. Every object lies within one crop: none is cut. The test split uses other glyphs and
other photographs than the training split. Five kinds of question: what shape is the red one, what colour is the star,
where is it, how many objects are there, is there a red star.

## Recipe

{run}
It starts from the weights of the shipped tiny LLaVA.

1. Tower, {tower}:
   base images, crops with an object and every fourth crop without; the objectives of the tiny LLaVA.
2. Projector, newline token and language model with the tower frozen, {language}:
   ten questions per scene in one sequence, each of which sees the image and itself only.

The shipped weights are of that run; it shared its core with other work and used 19 minutes of processor time.

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
