"""Batches of pictures with several questions each, and their loss through the patched model's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.tiny import qwen_language
from training.tiny.language import pack
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
        rows: (pictures * questions, n) int64, prompts with their answers, padded on the right.
        labels: of the same shape, -100 where nothing is learnt.
    """

    kind: str
    inputs: dict[str, Any]
    rows: Tensor
    labels: Tensor

    @property
    def questions(self) -> int:
        """Questions per picture."""
        return len(self.rows) // len(self.inputs["input_ids"])


def examples(
    name: str, first: int, size: int, questions: int, step: int, images: float
) -> tuple[list[Any], list[list[Question]]]:
    """The pictures of a step, images or equally long clips, and questions about each.

    Args:
        name: the tiny model.
        first: number of the first picture of all.
        size, questions: pictures, and questions about each.
        step: of the training.
        images: share of the steps that have images.
    """
    rng = np.random.Generator(np.random.PCG64([first, step]))
    start, wide = first + step * 4 * size, name == "llava_onevision"
    recipe: Any = llava_onevision if wide else qwen_language
    if rng.random() >= images:
        frames = int(rng.choice(recipe.LENGTHS))
        rates = {} if wide else {"fps": float(rng.choice(qwen_language.RATES))}
        seen = [clips.make_clip(start + i, "train", frames, **rates) for i in range(size)]
        asked = [qwen_language.choose_about_clip(clip, rng, recipe.SLOTS) for clip in seen]
    else:
        canvas, stride = int(rng.integers(len(LARGE.canvases))), len(LARGE.canvases)
        numbers = [start + canvas + i * stride if wide else start + i for i in range(size)]
        seen = [make_wide(n, "train", LARGE) if wide else make_scene(n, "train") for n in numbers]
        asked = [qwen_language.choose_about_scene(scene, rng) for scene in seen]
    return seen, [[some[i] for i in rng.permutation(len(some))[:questions]] for some in asked]


def assembled(processor: Any, pictures: Sequence[Any], asked: list[list[Question]]) -> Batch:
    """The batch of pictures with questions."""
    vocabulary, inputs = (
        processor.tokenizer.get_vocab(),
        prepare(processor, [(p, q[0]) for p, q in zip(pictures, asked)]),
    )
    ids, labels = (x.view(-1, WIDTH) for x in pack(list(asked), vocabulary, len(asked[0]), WIDTH))
    told = int((ids[0] != vocabulary["<pad>"]).sum()) - len(
        asked[0][0].answer.split()
    )  # question and "assistant :"
    row = inputs["input_ids"][0][inputs["attention_mask"][0].bool()]
    before = row[: len(row) - told].expand(len(ids), -1)
    end = ids.new_full((len(ids), 1), vocabulary["<pad>"])
    rows = torch.cat([before, ids, end], 1)
    shifted = torch.cat([torch.full_like(before, IGNORED), torch.full_like(end, IGNORED), labels], 1)
    kind = "video" if any(key.endswith("videos") for key in inputs) else "image"
    return Batch(kind, dict(inputs), rows, shifted)


def loss_of(model: Any, batch: Batch, in_tower: bool, asks: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers under the patch of a model, and the share of right answer tokens.

    Args:
        in_tower: whether weights inside the vision tower are trained.
        asks: whether the strategy reads the text, and is asked for every question and not once per picture.
    """
    grids = {k: v for k, v in batch.inputs.items() if k.endswith(("grid_thw", "second_per_grid_ts"))}
    pixels = {k: v for k, v in batch.inputs.items() if k.startswith(("pixel_values", "image_sizes"))}
    encode = getattr(model.model, f"get_{batch.kind}_features")
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    chosen = {n: getattr(model.config, n) for n in names if hasattr(model.config, n)}
    thw = {k: v for k, v in grids.items() if k.endswith("grid_thw")}
    with torch.set_grad_enabled(in_tower):
        output = encode(**pixels, **thw, **chosen)
    types = {}
    if "mm_token_type_ids" in batch.inputs:
        visual = batch.rows == getattr(model.config, f"{batch.kind}_token_id")
        types = {"mm_token_type_ids": visual.int() * (2 if batch.kind == "video" else 1)}
    made = model(
        input_ids=batch.rows,
        attention_mask=torch.ones_like(batch.rows),
        labels=batch.labels,
        mm_encoder_outputs={batch.kind: repeated(output, batch.questions, asks)},
        use_cache=False,
        **{k: repeat(v, batch.questions) for k, v in grids.items()},
        **types,
    )
    told = batch.labels[:, 1:] != IGNORED
    right = made.logits[:, :-1].argmax(-1)[told] == batch.labels[:, 1:][told]
    return made.loss, right.float().mean()


def repeat(values: Any, times: int) -> Any:
    """Every entry so many times."""
    if isinstance(values, Tensor):
        return values.repeat_interleave(times, 0)
    return [value for value in values for _ in range(times)]


def repeated(output: Any, times: int, asks: bool) -> Any:
    """The features of pictures for so many prompts each.

    With `asks` the strategy chooses anew for every prompt, else once, as for the beams of a search.
    """
    out = type(output)(pooler_output=repeat(output.pooler_output, times))
    encoded = getattr(output, ENCODED)
    setattr(out, ENCODED, replace(encoded, items=repeat(encoded.items, times)) if asks else encoded)
    return out
