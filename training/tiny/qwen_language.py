"""Second stage of the tiny Qwen2.5-VL: merger and language model learn to answer about images and clips.

As in `training.tiny.language`, ten questions share a sequence; each of them has the M-RoPE positions that the
model's own ``get_rope_index`` gives to a prompt with a single question.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from vtoken.tiny import clips
from vtoken.tiny.digits import DIGITS
from vtoken.tiny.scenes import SIZE, Question, Scene, make_scene, questions

from .language import answer_loss, choose_kinds, pack
from .loop import optimise
from .models import start_from
from .qwen_tower import IMAGE_SIDE, encode, image_patches, video_patches
from .reading import ReadingHeads, clip_targets, look_targets, places, stack

SLOTS, WIDTHS = 10, {"image": 10, "video": 13}  # questions per example and tokens per question
LENGTHS = (4, 4, 6, 6, 8, 8, 8, 10, 16)  # frames of the clips in training
RATES = (1.0, 2.0, 2.0)  # frames per second


def warm_start(model: Any) -> None:
    """Copy the tiny LLaVA's Llama where names and shapes agree, and embeddings of shared words."""
    from vtoken.tiny import load

    old = load("llava")[0]
    known = {
        name: p for part in (old.model.language_model, old.lm_head) for name, p in part.named_parameters()
    }
    for part in (model.model.language_model, model.lm_head):
        start_from(part.named_parameters(), known)


def choose_about_clip(clip: clips.Clip, rng: np.random.Generator, slots: int = SLOTS) -> list[Question]:
    """``slots`` questions about a clip in drawn wordings; always with those that are hardest to learn."""
    wanted = {"presence of a digit": 2, "moment": 2, "digits": 1, "order": 2, "presence": 1, "now": 1}

    def kind(question: Question) -> str:
        return question.kind + " of a digit" * (question.kind == "presence" and question.text[-2] in DIGITS)

    return choose_kinds(clips.questions(clip, rng), rng, wanted, slots, kind)


def choose_about_scene(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Ten questions about a scene in drawn wordings, four of them of kind ``where``."""
    return choose_kinds(questions(scene, rng), rng, {"count": 1, "exists": 2, "where": 4})


def language_batch(
    processor: Any, plan: dict[str, Any], first: int, step: int, split: str = "train"
) -> list[tuple]:
    """One step: patches, grid, seconds per grid step, packed questions, targets.

    Scenes, or clips of a drawn length.
    """
    vocabulary, half = processor.tokenizer.get_vocab(), plan["batch"] // 2
    start = first + step * half
    rng = np.random.Generator(np.random.PCG64([start, 9]))
    frames, fps = int(rng.choice(LENGTHS)), float(rng.choice(RATES))
    some = [make_scene(start + i, split) for i in range(half)]
    seen = [clips.make_clip(start + i, split, frames, fps) for i in range(half)]
    asked = (
        [choose_about_scene(scene, rng) for scene in some],
        [choose_about_clip(clip, rng) for clip in seen],
    )
    pixels = np.stack([np.asarray(frame) for clip in seen for frame in clip.media])
    return [
        (
            "image",
            image_patches(processor, some),
            (1, IMAGE_SIDE // 8, IMAGE_SIDE // 8),
            1.0,
            pack(asked[0], vocabulary, SLOTS, WIDTHS["image"]),
            stack([places(1, IMAGE_SIDE // 16)] * half),
        ),
        (
            "video",
            video_patches(pixels).view(half, -1, 384),
            (frames // 2, SIZE // 8, SIZE // 8),
            2 / fps,
            pack(asked[1], vocabulary, SLOTS, WIDTHS["video"]),
            stack(
                [clip_targets(clip, 2) for clip in seen],
                [look_targets(clip, some, 2, SLOTS) for clip, some in zip(seen, asked[1])],
            ),
        ),
    ]


def visual_tokens(model: Any, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Visual tokens of examples ``(n, patches, 384)`` of one grid, up to ``<|vision_end|>``."""
    n = len(patches)
    merged = encode(model.model.visual, patches.to(model.device).view(n * grid[0], -1, patches.shape[-1]))[0]
    end = model.get_input_embeddings().weight[model.config.vision_end_token_id]
    return torch.cat([merged.view(n, -1, merged.shape[-1]), end.expand(n, 1, -1)], 1)


def positions(
    model: Any, kind: str, grid: tuple[int, int, int], seconds: float, slots: int, width: int, prefix: int = 3
) -> torch.Tensor:
    """M-RoPE positions ``(3, 1, length)`` of a packed sequence: the model's own, for every slot alike."""
    config = model.config
    token, number = (config.image_token_id, 1) if kind == "image" else (config.video_token_id, 2)
    start = prefix + grid[0] * grid[1] * grid[2] // 4 + 1
    types = torch.zeros(1, start + width, dtype=torch.int)
    types[:, prefix : start - 1] = number
    ids = torch.where(types > 0, token, 0).long()
    told = {"video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": torch.tensor([seconds])}
    if kind == "image":
        told = {"image_grid_thw": torch.tensor([grid])}
    one = model.model.get_rope_index(ids, mm_token_type_ids=types, **told)[0]
    return torch.cat([one[..., :start], one[..., start:].repeat(1, 1, slots)], -1)


def train_language(
    model: Any,
    processor: Any,
    plan: dict[str, Any],
    log: list[dict],
    first: int,
    checks: int = 6,
    **limits: Any,
) -> None:
    """Stage two, in place, with frozen tower blocks; arguments as in `qwen_tower.train_tower`.

    ``plan["reading"]`` is the weight of the read-outs of `training.tiny.reading`.
    """
    vocabulary = processor.tokenizer.get_vocab()
    before = [vocabulary[token] for token in ("user", ":", "<|vision_start|>")]
    frozen = [model.model.visual.blocks, model.model.visual.patch_embed]
    for part in frozen:
        part.requires_grad_(False)
    heads = ReadingHeads(model, len(before)).to(model.device)

    def loss_of(item: Any, done: float = 0) -> tuple[torch.Tensor, dict[str, float]]:
        total, facts = 0, {}
        for kind, patches, grid, seconds, (ids, labels), goal in item:
            where = positions(model, kind, grid, seconds, SLOTS, WIDTHS[kind])
            visual = visual_tokens(model, patches, grid)
            loss, right = answer_loss(model, visual, ids, labels, before, WIDTHS[kind], where)
            reading, read = heads(goal)
            total = total + (loss + plan["reading"] * reading) / 2
            facts |= {f"{kind}_answers": right.item(), **read}
        return total, facts

    @torch.no_grad()
    def facts() -> dict[str, float]:
        found = [loss_of(language_batch(processor, plan, 7_000_000, i, "test"))[1] for i in range(checks)]
        means = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
        return {
            f"{'held_out' if name.endswith('answers') else 'test'}_{name}": mean
            for name, mean in means.items()
        }

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters |= dict(heads.named_parameters(prefix="heads"))
    make = partial(language_batch, processor, plan, first)
    optimise("language", parameters, make, loss_of, plan, log, facts, **limits)
    heads.remove()
    for part in frozen:
        part.requires_grad_(True)
