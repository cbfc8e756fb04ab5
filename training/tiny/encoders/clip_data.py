"""Frames and clips for the tiny CLIP, with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vtoken.tiny.assets import SHAPES
from vtoken.tiny.captions import caption, describe
from vtoken.tiny.clip_moments import WHITE, Camera, Moment, bend, draw_object
from vtoken.tiny.clips import Clip, make_clip
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.encoders import Preprocess, WordTokenizer
from vtoken.tiny.scenes import COLOURS, SPLITS, Scene

from .dense import targets

PATCH = 12
LENGTHS = (6, 8, 10, 12)
Batch = dict[str, Any]


def draw_frame(number: int, split: str) -> tuple[Scene, str]:
    """A frame with a digit, a shape, both or neither, and its caption. Masks of the train split are bent."""
    rng = np.random.Generator(np.random.PCG64([number, SPLITS.index(split), 11]))
    camera, kind, places = Camera(rng, split), rng.random(), rng.permutation(4)
    digit = DIGITS[int(rng.integers(len(DIGITS)))] if kind < 0.75 else None
    shape = SHAPES[int(rng.integers(len(SHAPES)))] if kind < 0.5 or 0.75 <= kind < 0.95 else None
    colour = tuple(COLOURS)[int(rng.integers(len(COLOURS)))] if shape else None
    objects = tuple(
        draw_object(rng, split, name, tint or WHITE, int(place), bent=split == "train")
        for name, tint, place in ((digit, None, places[0]), (shape, colour, places[1]))
        if name
    )
    scene = Scene(camera.frame(0, objects), objects, number, split, camera.name)
    return scene, describe(Moment(0, 1, digit, shape, colour, objects))


def distinct(texts: Sequence[str], tokenizer: WordTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the different texts ``(u, context)`` int64, and the place of each text among them ``(n,)``."""
    known = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return tokenizer(list(known)), torch.tensor([known[text] for text in texts])


def pictures(
    scenes: Sequence[Scene], texts: Sequence[str], preprocess: Preprocess, tokenizer: WordTokenizer
) -> Batch:
    """Pixels of frames, names of their patches, and their captions."""
    ids, which = distinct(texts, tokenizer)
    pixels = torch.stack([preprocess(scene.image) for scene in scenes])
    return {"pixels": pixels, "names": targets(scenes, PATCH), "ids": ids, "which": which}


def frame_batch(
    preprocess: Preprocess, tokenizer: WordTokenizer, first: int, size: int, split: str, step: int
) -> Batch:
    """The frames of a step."""
    scenes, texts = zip(*(draw_frame(first + step * size + i, split) for i in range(size)))
    return pictures(scenes, texts, preprocess, tokenizer)


def chosen(clip: Clip, rng: np.random.Generator) -> list[tuple[int, float, str]]:
    """One frame of each moment and one between them, with the share of the clip that each stands for.

    All frames of a moment have nearly the same embedding: the mean over a clip is known from a third of it.
    """
    spans = [(list(range(m.start, m.stop)), describe(m)) for m in clip.moments]
    shown = {frame for span, _ in spans for frame in span}
    spans.append(([i for i in range(len(clip.media)) if i not in shown], describe(None)))
    total = len(clip.media)
    return [(int(rng.choice(span)), len(span) / total, text) for span, text in spans if span]


def redrawn(clip: Clip, frame: int, camera: Camera, rng: np.random.Generator) -> Scene:
    """A frame of a clip on a drawn photograph with bent masks, so that the tower sees no two alike."""
    shown = clip.scene(frame).objects
    objects = tuple(replace(item, mask=bend(item.mask, rng)) for item in shown)
    return Scene(camera.frame(frame, objects), objects, clip.seed, clip.split, camera.name)


def clip_batch(
    preprocess: Preprocess, tokenizer: WordTokenizer, first: int, size: int, split: str, step: int
) -> Batch:
    """The clips of a step: a few frames of each, and captions of frames and of clips."""
    start = first + step * size
    rng = np.random.Generator(np.random.PCG64([start, 12]))
    clips = [make_clip(start + i, split, int(rng.choice(LENGTHS))) for i in range(size)]
    cameras = [Camera(rng, split) for _ in clips]
    some = [(i, *one) for i, clip in enumerate(clips) for one in chosen(clip, rng)]
    scenes = [redrawn(clips[i], frame, cameras[i], rng) for i, frame, _, _ in some]
    texts = [text for *_, text in some]
    shares = torch.zeros(size, len(some))
    for column, (row, _, share, _) in enumerate(some):
        shares[row, column] = share
    ids, which = distinct([caption(clip) for clip in clips], tokenizer)
    return pictures(scenes, texts, preprocess, tokenizer) | {
        "shares": shares,
        "clip_ids": ids,
        "clip_which": which,
    }
