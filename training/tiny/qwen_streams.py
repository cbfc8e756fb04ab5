"""The last stage of the tiny Qwen2.5-VL: the language model learns what a few seconds of a long stream show.

A window cut out of a stream may show nothing or begin in the middle of a moment, and has fewer than two
digits most of the time; the clips of the stage before have two at least. Scenes and such clips stay in every
step, so that nothing is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from vtoken.tiny import clips
from vtoken.tiny.assets import SHAPES
from vtoken.tiny.clips import FORMS, KIND_OF, Clip, Frames, Stream
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.scenes import SIZE, SPLITS, Question, make_scene

from .language import answer_loss, choose_kinds, pack
from .loop import optimise
from .qwen_language import (
    LENGTHS,
    RATES,
    SLOTS,
    WIDTHS,
    choose_about_clip,
    choose_about_scene,
    positions,
    visual_tokens,
)
from .qwen_tower import IMAGE_SIDE, image_patches, video_patches

WINDOWS = (2, 4, 6, 8, 8, 8, 8, 8, 10)  # frames of the windows in training
LATEST = 60  # windows begin up to this pair of frames of their stream


def make_window(seed: int, split: str = "train", frames: int = 8, fps: float = 2.0) -> Clip:
    """``frames`` (even) consecutive frames of stream ``seed`` of a split, from a drawn even frame on, as a
    clip.

    Of its moments the first may have begun before; digits, shapes and colours may come twice.
    """
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), 8, frames]))
    live, first = Stream(seed, split, fps), 2 * int(rng.integers(LATEST))
    some = [live.frame(first + i) for i in range(frames)]
    moments = tuple(
        replace(m, start=max(m.start - first, 0), stop=m.stop - first)
        for m in some[-1].moments
        if m.stop > first
    )
    media = Frames([frame.image for frame in some], [i / fps for i in range(frames)])
    return Clip(media, moments, int(seed), split, live.background, float(fps))


def absent(clip: Clip, names: tuple[str, ...], rng: np.random.Generator) -> Question:
    """Whether there was a thing, one of ``names`` that the clip does not show, in a drawn wording."""
    shown = {name for m in clip.moments for name in (m.digit, m.shape)}
    left = [name for name in names if name not in shown]
    form = FORMS["was"][int(rng.integers(len(FORMS["was"])))]
    return Question(form.format(name=left[int(rng.integers(len(left)))]), "no", KIND_OF["was"])


def choose_about_window(clip: Clip, rng: np.random.Generator) -> list[Question]:
    """Up to ten questions about a window in drawn wordings: two that ask for what it does not show, whatever
    it shows.
    """
    asked = [absent(clip, names, rng) for names in (DIGITS, SHAPES)]
    wanted = {"digits": 1, "now": 2, "moment": 2, "order": 1, "presence": 1}
    return choose_kinds(clips.questions(clip, rng), rng, wanted, SLOTS - len(asked)) + asked


def stream_batch(
    processor: Any, plan: dict[str, Any], first: int, step: int, split: str = "train"
) -> list[tuple]:
    """Name, patches, grid, seconds per grid step and packed questions of a step: scenes, clips, windows of
    streams.

    ``plan["batch"]`` examples: a quarter scenes, a quarter clips as in the stage before, half windows.
    """
    vocabulary, quarter = processor.tokenizer.get_vocab(), plan["batch"] // 4
    start = first + step * 2 * quarter
    rng = np.random.Generator(np.random.PCG64([start, 10]))
    scenes = [make_scene(start + i, split) for i in range(quarter)]
    asked = pack([choose_about_scene(scene, rng) for scene in scenes], vocabulary, SLOTS, WIDTHS["image"])
    side = IMAGE_SIDE // 8
    parts: list[tuple] = [("image", image_patches(processor, scenes), (1, side, side), 1.0, asked)]

    def add(
        name: str, make: Callable[..., Clip], choose: Callable[..., list], count: int, lengths: Any
    ) -> None:
        frames, fps = int(rng.choice(lengths)), float(rng.choice(RATES))
        some = [make(start + i, split, frames, fps) for i in range(count)]
        asked = pack([choose(clip, rng) for clip in some], vocabulary, SLOTS, WIDTHS["video"])
        pixels = np.stack([np.asarray(frame) for clip in some for frame in clip.media])
        grid = (frames // 2, SIZE // 8, SIZE // 8)
        parts.append((name, video_patches(pixels).view(count, -1, 384), grid, 2 / fps, asked))

    add("video", clips.make_clip, choose_about_clip, quarter, LENGTHS)
    add("stream", make_window, choose_about_window, 2 * quarter, WINDOWS)
    return parts


def train_streams(
    model: Any,
    processor: Any,
    plan: dict[str, Any],
    log: list[dict],
    first: int,
    checks: int = 8,
    **limits: Any,
) -> None:
    """Stage three, in place, with tower and merger frozen; arguments as in
    `training.tiny.qwen_tower.train_tower`.
    """
    vocabulary, tower = processor.tokenizer.get_vocab(), model.model.visual
    before = [vocabulary[token] for token in ("user", ":", "<|vision_start|>")]
    tower.requires_grad_(False)

    def loss_of(item: Any, done: float = 0) -> tuple[torch.Tensor, dict[str, float]]:
        total, facts, examples = 0, {}, sum(len(part[1]) for part in item)
        for name, patches, grid, seconds, (ids, labels) in item:
            kind = "image" if name == "image" else "video"
            where = positions(model, kind, grid, seconds, SLOTS, WIDTHS[kind])
            visual = visual_tokens(model, patches, grid)
            loss, right = answer_loss(model, visual, ids, labels, before, WIDTHS[kind], where)
            total = total + loss * len(patches) / examples
            facts[f"{name}_answers"] = right.item()
        return total, facts

    @torch.no_grad()
    def facts() -> dict[str, float]:
        found = [loss_of(stream_batch(processor, plan, 7_000_000, i, "test"))[1] for i in range(checks)]
        return {f"held_out_{name}": float(np.mean([f[name] for f in found])) for name in found[0]}

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    make = partial(stream_batch, processor, plan, first)
    optimise("streams", parameters, make, loss_of, plan, log, facts, **limits)
    tower.requires_grad_(True)
