"""Recipe of tiny LLaVA-OneVision: SigLIP tower, Qwen2; "anyres_max_9" crops, video pooled 2 x 2.

It starts from the shipped tiny LLaVA, as far as the shapes agree. Stage ``tower`` teaches the tower images,
crops and frames; stage ``language`` freezes it and teaches the projector, the newline token and the language
model, a third of the steps on images, the others on clips of 4 to 8 frames.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from vtoken.tiny import clips, load
from vtoken.tiny.assets import SHAPES
from vtoken.tiny.clip_moments import WHITE
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.questions import LENGTHS as HELD_OUT_FRAMES
from vtoken.tiny.questions import answers, held_out, score
from vtoken.tiny.scenes import COLOURS, questions
from vtoken.tiny.scenes_wide import LARGE, cut, make_wide

from .. import language
from .. import tower as stages
from ..card import FRONT, accuracy, plan, run, snippet, table
from ..evaluate import most_frequent
from ..language import pack
from ..models import build_tokenizer, chat_template, generation_config, language_config, special_ids
from ..qwen_language import choose_about_clip, choose_about_scene
from ..qwen_tower import crowd
from ..reading import ReadingHeads, clip_targets, look_targets, stack
from ..tower import TowerHeads, View, hidden_states, targets, to_pixels

__all__ = ["build", "card", "measure", "train"]

TOWER: dict[str, Any] = {
    "steps": 1200,
    "batch": 32,
    "rate": 2e-3,
    "muon_rate": 0.02,
    "reset": 0.0,
    "look": 0.0,
}
LANGUAGE: dict[str, Any] = {"steps": 2500, "batch": 12, "rate": 2e-3, "muon_rate": 0.02, "reading": 0.1}
LENGTHS = (4, 4, 6, 6, 6, 8, 8, 8)  # frames of the clips in training
LONGER = (10, 12)  # measured separately
SLOTS = 16  # questions per clip
# tokens per question: "which digit was shown with the purple triangle ? assistant : 4" and one to spare
WIDTH = 13
LATER = 50_000_000  # stage two goes on with scenes that stage one has not seen
CHECK = 7_000_000  # scenes of the test split for the measures along the way
TILE = LARGE.tile
FORMS, COLOUR_NAMES = (*SHAPES, *DIGITS), (*COLOURS, WHITE)


def build(width: int = 128, tower_layers: int = 5, llm_layers: int = 4, heads: int = 4) -> tuple[Any, Any]:
    """An untrained LLaVA-OneVision (144 visual tokens per 96 px crop, 36 per frame) and its processor.

    Args:
        width: hidden size of the tower and of the language model; a multiple of ``2 * heads``.
        tower_layers: layers of the SigLIP tower, of which the language model reads the last.
        llm_layers: layers of the Qwen2.
        heads: attention heads of both.

    Returns:
        ``(LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor)`` in float32.
    """
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = build_tokenizer(["<video>"], clips.vocabulary())
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    pinpoints = [list(size) for size in LARGE.pinpoints]
    tower = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=tower_layers,
        num_attention_heads=heads,
        image_size=TILE,
        patch_size=8,
        vision_use_head=False,
    )
    llm = language_config(Qwen2Config, tokenizer, width, llm_layers, heads)
    config = LlavaOnevisionConfig(
        vision_config=tower,
        text_config=llm,
        image_token_id=image,
        image_token_index=image,
        video_token_id=video,
        video_token_index=video,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        **special_ids(tokenizer),
    )
    model = LlavaOnevisionForConditionalGeneration(config).float()
    model.generation_config = generation_config(tokenizer)
    size = {"height": TILE, "width": TILE}
    normal = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints, **normal),
        video_processor=LlavaOnevisionVideoProcessor(size=size, **normal),
        tokenizer=tokenizer,
        num_image_tokens=(TILE // 8) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat_template(video=True),
    )
    return model, processor


@torch.no_grad()
def warm_start(model: Any) -> None:
    """The shipped tiny LLaVA's weights, in place, where names and shapes agree.

    Its CLIP tower normalises patches before the first layer, a SigLIP tower does not: the norm becomes part
    of the patches' and positions' weights, with the spread that it meets on average. Rows of the word
    embeddings are those of the words that both know, which come first.
    """
    theirs = load("llava")[0]
    known = theirs.state_dict()
    for name, value in model.state_dict().items():
        if name in known and known[name].shape[1:] == value.shape[1:] and len(known[name]) <= len(value):
            value[: len(known[name])] = known[name]
    ours, clip = model.model.vision_tower.embeddings, theirs.model.vision_tower
    clip = getattr(clip, "vision_model", clip)
    shown = to_pixels([make_wide(4 * i + 3, layout=LARGE).image for i in range(16)])
    norm, spread = clip.pre_layrnorm, clip.embeddings(shown)[:, 1:].std(-1).mean()
    patch = clip.embeddings.patch_embedding.weight
    scale = norm.weight / spread
    ours.patch_embedding.weight.copy_((patch - patch.mean(0)) * scale[:, None, None, None])
    ours.patch_embedding.bias.copy_(norm.bias)
    place = clip.embeddings.position_embedding.weight[1:]
    ours.position_embedding.weight.copy_((place - place.mean(1, keepdim=True)) * scale)


def train(
    model: Any, processor: Any, log: list[dict], seed: int = 0, seconds: float | None = None, **limits: Any
) -> None:
    """Warm start and both stages, in place; appends to ``log``. Limits as in `optimise`."""
    warm_start(model)
    train_tower(model, processor, log, seed, seconds=seconds and seconds * 0.25, **limits)
    train_language(model, processor, log, seed, seconds=seconds and seconds * 0.75, **limits)


def tower_batch(
    processor: Any, first: int, size: int, split: str, step: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pixels and targets of a step: 3/4 crowded frames, 1/8 crops and 1/8 base images."""
    start = first + step * size
    pixels, seen = [], []
    for i in range(start, start + size // 8):
        scene = make_wide(i, split, LARGE)
        crops = processor.image_processor(scene.image, return_tensors="pt")["pixel_values"][0]
        masks = cut(scene, TILE)
        names = [o.shape for o in scene.objects], [o.colour for o in scene.objects]
        for k in (0, 1 + i % (len(masks) - 1)):
            pixels.append(crops[k])
            seen.append(View.of(masks[k], *names))
    for i in range(start, start + size - size // 4):
        frames, scene = crowd(i, split, bent=split == "train")
        pixels.append(to_pixels(frames[:1])[0])
        seen.append(
            View.of(scene.masks(), [o.shape for o in scene.objects], [o.colour for o in scene.objects])
        )
    return torch.stack(pixels), targets(seen, FORMS, COLOUR_NAMES)


def train_tower(
    model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 160, **limits: Any
) -> None:
    """Stage one, in place; appends to ``log``. ``checks``: held-out views of the measures along the way."""
    pixels, goal = tower_batch(processor, CHECK, checks, "test", 0)
    digits = goal["form"][goal["owner"] >= 0] > len(SHAPES)
    stages.train_tower(
        model.model.vision_tower,
        TowerHeads(model.config.vision_config.hidden_size, -1, False, FORMS, COLOUR_NAMES),
        partial(tower_batch, processor, seed * 2 * LATER, TOWER["batch"], "train"),
        (pixels, goal),
        TOWER,
        log,
        more_facts=lambda right: {"held_out_digit": right.cpu()[digits].float().mean().item()},
        **limits,
    )


def language_batch(
    processor: Any, first: int, size: int, split: str, step: int
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], Any, dict[str, torch.Tensor] | None]:
    """One step: pixels (and image sizes), packed questions, read-outs.

    Every third step has images, the others equally long clips.
    """
    rng = np.random.Generator(np.random.PCG64([first, step]))
    start, vocabulary = first + step * 4 * size, processor.tokenizer.get_vocab()
    if step % 3:
        frames = int(rng.choice(LENGTHS))
        seen = [clips.make_clip(start + i, split, frames) for i in range(size)]
        pixels = torch.stack([to_pixels(clip.media) for clip in seen])
        asked = [choose_about_clip(clip, rng, SLOTS) for clip in seen]
        looks = [look_targets(clip, some, 1, SLOTS) for clip, some in zip(seen, asked)]
        return (
            (pixels, None),
            pack(asked, vocabulary, SLOTS, WIDTH),
            stack([clip_targets(clip, 1) for clip in seen], looks),
        )
    canvas, stride = int(rng.integers(len(LARGE.canvases))), len(LARGE.canvases)
    scenes = [make_wide(start + canvas + i * stride, split, LARGE) for i in range(size)]
    shown = processor.image_processor([scene.image for scene in scenes], return_tensors="pt")
    asked = pack([choose_about_scene(scene, rng) for scene in scenes], vocabulary, width=WIDTH)
    return (shown["pixel_values"], shown["image_sizes"]), asked, None


def visual_tokens(model: Any, shown: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    """Visual tokens of one image size, or (no sizes) of equally long clips: ``(n, tokens, hidden)``.

    No gradient for the tower.
    """
    (pixels, sizes), inner, config = shown, model.model, model.config
    with torch.no_grad():
        states = hidden_states(inner.vision_tower, pixels.to(model.device).flatten(0, 1))
    features = inner.multi_modal_projector(states[config.vision_feature_layer])
    if sizes is None:
        pooled = inner.apply_pooling(features).reshape(len(pixels), -1, features.shape[-1])
        return torch.cat([pooled, inner.image_newline.expand(len(pixels), 1, -1)], 1)
    crops, ratio = list(features.unflatten(0, pixels.shape[:2])), config.vision_aspect_ratio
    return torch.stack(inner.pack_image_features(crops, sizes, inner.image_newline, ratio)[0])


def train_language(
    model: Any, processor: Any, log: list[dict], seed: int = 0, checks: int = 9, **limits: Any
) -> None:
    """Stage two, in place, with the tower frozen; ``checks``: held-out batches, two thirds of them clips."""
    vocabulary = processor.tokenizer.get_vocab()
    before = [vocabulary["user"], vocabulary[":"]]
    reading = ReadingHeads(model, len(before)).to(model.device)
    language.train_language(
        model,
        partial(visual_tokens, model),
        partial(language_batch, processor, seed * 2 * LATER + LATER, LANGUAGE["batch"], "train"),
        [language_batch(processor, CHECK, 16, "test", k) for k in range(checks)],
        LANGUAGE,
        log,
        before,
        width=WIDTH,
        reading=reading,
        **limits,
    )
    reading.remove()


def longer(model: Any, processor: Any, n: int = 100) -> dict[str, float]:
    """Accuracy on ``n`` questions about clips of each length in ``LONGER``."""
    asked = {frames: clips.held_out(n, 0, frames) for frames in LONGER}
    return {
        str(frames): score(pairs, answers(model, processor, pairs))["all"] for frames, pairs in asked.items()
    }


def measure(model: Any, processor: Any, n: int = 500) -> dict[str, Any]:
    """Blind accuracy and the number of visual tokens of images and clips."""
    asked = [questions(make_wide(i, layout=LARGE)) for i in range(500)]
    asked += [
        clips.questions(clips.make_clip(i, frames=HELD_OUT_FRAMES[i % len(HELD_OUT_FRAMES)]))
        for i in range(500)
    ]
    canvases = [(height, width) for width, height in LARGE.canvases]
    videos = [(frames, TILE, TILE) for frames in HELD_OUT_FRAMES + LONGER]
    tokens = processor._get_num_multimodal_tokens(image_sizes=canvases, video_sizes=videos)
    return {
        "recipe": {"tower": TOWER, "language": LANGUAGE},
        "most_frequent_answer": most_frequent(
            held_out("llava_onevision", n), [q for some in asked for q in some]
        ),
        "longer": longer(model, processor),
        "visual_tokens": {"images": tokens["num_image_tokens"], "clips": tokens["num_video_tokens"]},
    }


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The model card."""
    last = [entry for entry in log if "held_out_digit" in entry][-1]
    tokens = report["visual_tokens"]
    return CARD.format(
        snippet=snippet("llava_onevision"),
        run=run(report),
        parameters=report["parameters"] / 1e6,
        questions=report["questions"],
        accuracy=accuracy(report),
        longer=table({f"{n} frames": 0 for n in LONGER}, {"model": [*report["longer"].values()]}),
        form=last["held_out_form"],
        digit=last["held_out_digit"],
        images=", ".join(f"{n} ({w} x {h} px)" for n, (w, h) in zip(tokens["images"], LARGE.canvases)),
        clips=", ".join(
            f"{n} ({frames} frames)" for n, frames in zip(tokens["clips"], HELD_OUT_FRAMES + LONGER)
        ),
        lengths=", ".join(f"{n} ({LENGTHS.count(n) / len(LENGTHS):.0%})" for n in dict.fromkeys(LENGTHS)),
        tower=plan(TOWER, log, "tower"),
        language=plan(LANGUAGE, log, "language"),
    )


CARD = (
    FRONT
    + """
# A tiny LLaVA-OneVision for tests, demos and studies of visual tokens

A real `LlavaOnevisionForConditionalGeneration` ({parameters:.2f} M parameters: a SigLIP tower without CLS, a two-layer
projector, a Qwen2) that answers questions about coloured shapes on photographs and about digits and shapes in short clips.
Images are read as a base image (96 x 96 px, 144 visual tokens) and crops of 96 px, unpadded, with a newline token after
each row of patches ("anyres_max_9"): {images}.
Of a clip it reads 36 tokens per frame, pooled 2 x 2, and a newline token: {clips}.
It was trained on full sequences: it has never seen a dropped token.

{snippet}

## Accuracy

Exact answers to {questions} held-out questions (greedy `generate`, all tokens), half of them about images (shape, colour,
where, count, exists), half about clips of 4, 6 and 8 frames at 2 frames per second with up to four moments (order,
moment, presence, now, digits); the second row always gives the most frequent answer of its kind.

{accuracy}

Clips longer than any in training; 100 questions each:

{longer}

A linear read-out of the tower names the form on {form:.1%} of the object patches of held-out images and frames, and on
{digit:.1%} of those of digits.

## Data

Images: scenes of 2 to 4 shapes (of 8, in 7 colours, 15 to 19 px across, none twice) on crops of photographs that
scikit-image ships (CC0 or public domain, listed in `vtoken/tiny/assets.py`), composed by `vtoken/tiny/scenes_wide.py`; every
object lies within one crop. Clips: moments with a digit, a coloured shape or both (`vtoken/tiny/clips.py`), and
questions about their order, what was shown together, what was or is on screen. The test split uses other glyphs, other
photographs and other fonts than the training split.

## Recipe

{run}
It starts from the weights of the shipped tiny LLaVA wherever names and shapes agree. What a SigLIP tower lacks is the
norm before the first layer: it became part of the weights of patches and positions.

1. Tower, {tower} (three quarters of them frames with up to four digits and shapes, an eighth crops, an eighth base images):
   shapes and digits on frames are bent, so that none is seen twice;
   the patches of an object name its form, colour, quadrant and the number of objects; half-way up they draw the outline
   around them.
2. Projector, newline token and language model with the tower frozen, {language}:
   every third step images, else clips of {lengths} frames; ten (clips: 16) questions in one sequence, each of
   which sees the image or clip and itself only. After the second and third layer of the language model, linear read-outs
   ask the visual tokens of clips what else is on screen, which and how many digits have come so far and which shape came
   before; a head of the third layer is to look from the word that names a thing at the tokens that show it
   (`training/tiny/reading.py`).

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`. The held-out curves are measured on examples of the test split other than
those of the table above.

## Limits

It knows about 80 words and the scenes and clips above, nothing else: one image or clip per prompt, one question per
prompt. Its answers to other images say nothing about the world. Numbers measured on it compare methods of token
reduction in kind, not in degree: large models on natural images behave differently.
"""
)
