"""Batches of pictures with several questions each, and their loss through the patched model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.tiny import qwen_language
from training.tiny.language import layout, pack
from training.tiny.recipes import llava_onevision
from vtoken.mechanism.forward_context import ENCODED
from vtoken.tiny import clips
from vtoken.tiny.questions import prepare
from vtoken.tiny.scenes import Question, make_scene
from vtoken.tiny.scenes_wide import LARGE, make_wide

WIDTH = llava_onevision.WIDTH  # tokens per question, of both models
IGNORED = -100


@dataclass
class Batch:
    """Equal pictures, and as many questions about each of them.

    Attributes:
        kind: "image" or "video".
        inputs: of the processor, a row per picture.
        before: (p,) int64, the prompt up to the question, its visual tokens included.
        asked, labels: (pictures, questions, WIDTH) int64, questions with their answers; -100 where nothing is
            learnt.
    """

    kind: str
    inputs: dict[str, Any]
    before: Tensor
    asked: Tensor
    labels: Tensor


def examples(
    name: str, first: int, size: int, questions: int, step: int, images: float
) -> tuple[list[Any], list[list[Question]]]:
    """The pictures of a step, images or equally long clips, and questions about each.

    Args:
        name: the tiny model.
        first: number of the first picture of all.
        size: number of pictures.
        questions: about each, fewer where a picture of the step has not as many.
        step: of the training.
        images: share of the steps that have images.
    """
    rng = np.random.Generator(np.random.PCG64([first, step]))
    start, wide = first + step * 4 * size, name == "llava_onevision"
    recipe: Any = llava_onevision if wide else qwen_language
    if rng.random() >= images:
        frames = int(rng.choice(recipe.LENGTHS))
        rates: dict[str, Any] = {} if wide else {"fps": float(rng.choice(qwen_language.RATES))}
        seen: list[Any] = [clips.make_clip(start + i, "train", frames, **rates) for i in range(size)]
        asked = [qwen_language.choose_about_clip(clip, rng, recipe.SLOTS) for clip in seen]
    else:
        canvas, stride = int(rng.integers(len(LARGE.canvases))), len(LARGE.canvases)
        numbers = [start + canvas + i * stride if wide else start + i for i in range(size)]
        seen = [make_wide(n, "train", LARGE) if wide else make_scene(n, "train") for n in numbers]
        asked = [qwen_language.choose_about_scene(scene, rng) for scene in seen]
    most = min(questions, *map(len, asked))
    return seen, [[some[i] for i in rng.permutation(len(some))[:most]] for some in asked]


def assembled(processor: Any, pictures: Sequence[Any], asked: list[list[Question]]) -> Batch:
    """The batch of pictures with questions."""
    vocabulary = processor.tokenizer.get_vocab()
    inputs = dict(prepare(processor, [(p, q[0]) for p, q in zip(pictures, asked)]))
    shape = len(asked), len(asked[0]), WIDTH
    ids, labels = (x.view(shape) for x in pack(asked, vocabulary, len(asked[0]), WIDTH))
    row, first = inputs["input_ids"][0][inputs["attention_mask"][0].bool()], asked[0][0]
    told = int((ids[0, 0] != vocabulary["<pad>"]).sum()) - len(first.answer.split())
    labels = labels.roll(
        1, -1
    )  # transformers counts a label at the token itself; the last place is a spare one
    kind = "video" if any(key.endswith("videos") for key in inputs) else "image"
    return Batch(kind, inputs, row[: len(row) - told], ids, labels)


def apart(batch: Batch) -> dict[str, Any]:
    """A row for every question."""
    ids, labels = batch.asked.flatten(0, 1), batch.labels.flatten(0, 1)
    before = batch.before.expand(len(ids), -1)
    rows = torch.cat([before, ids], 1)
    told = torch.cat([torch.full_like(before, IGNORED), labels], 1)
    return {"input_ids": rows, "labels": told, "attention_mask": torch.ones_like(rows)}


def together(model: Any, batch: Batch, grids: dict[str, Any]) -> dict[str, Any]:
    """A row for every picture, of whose questions each sees the picture and itself only, at its positions."""
    pictures, questions, width = batch.asked.shape
    before = batch.before.expand(pictures, -1)
    rows = torch.cat([before, batch.asked.flatten(1)], 1)
    told = torch.cat([torch.full_like(before, IGNORED), batch.labels.flatten(1)], 1)
    start, one = before.shape[1], torch.cat([before, batch.asked[:, 0]], 1)
    where = torch.arange(one.shape[1]).expand(pictures, -1)
    if hasattr(model.model, "get_rope_index"):
        where = model.model.get_rope_index(one, **types_of(model, batch.kind, one), **grids)[0]
    where = torch.cat([where[..., :start], where[..., start:].repeat(*[1] * (where.ndim - 1), questions)], -1)
    mask = layout(0, start, questions, width)[0].expand(pictures, -1, -1, -1)
    return {"input_ids": rows, "labels": told, "attention_mask": mask, "position_ids": where}


def types_of(model: Any, kind: str, rows: Tensor) -> dict[str, Tensor]:
    """The kind of every token, for models that ask for it."""
    visual = rows == getattr(model.config, f"{kind}_token_id")
    return {"mm_token_type_ids": visual.int() * (2 if kind == "video" else 1)}


def loss_of(model: Any, batch: Batch, in_tower: bool, asks: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers under the patch of a model, and the share of right answer tokens.

    Args:
        in_tower: whether weights inside the vision tower are trained.
        asks: whether the strategy reads the text: it gets a prompt per question, else all in one sequence.
    """
    told = {k: v for k, v in batch.inputs.items() if k.endswith(("grid_thw", "second_per_grid_ts"))}
    pixels = {k: v for k, v in batch.inputs.items() if k.startswith(("pixel_values", "image_sizes"))}
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    chosen = {n: getattr(model.config, n) for n in names if hasattr(model.config, n)}
    grids = {k: v for k, v in told.items() if k.endswith("grid_thw")}
    with torch.set_grad_enabled(in_tower):
        output = getattr(model.model, f"get_{batch.kind}_features")(**pixels, **grids, **chosen)
    times = batch.asked.shape[1] if asks else 1
    given = apart(batch) if asks else together(model, batch, told)
    if hasattr(model.model, "get_rope_index"):
        given |= {k: repeat(v, times) for k, v in told.items()}
        given |= types_of(model, batch.kind, given["input_ids"])
    features = {batch.kind: repeated(output, times)}
    made = model(**given, mm_encoder_outputs=features, use_cache=False)
    labels = given["labels"][:, 1:]
    counts = labels != IGNORED
    return made.loss, (made.logits[:, :-1].argmax(-1) == labels)[counts].float().mean()


def repeat(values: Any, times: int) -> Any:
    """Every entry so many times."""
    if isinstance(values, Tensor):
        return values.repeat_interleave(times, 0)
    return [value for value in values for _ in range(times)]


def repeated(output: Any, times: int) -> Any:
    """The features of pictures for so many prompts each, of which the strategy is asked one by one."""
    out, encoded = type(output)(pooler_output=repeat(output.pooler_output, times)), getattr(output, ENCODED)
    setattr(out, ENCODED, replace(encoded, items=repeat(encoded.items, times)))
    return out
