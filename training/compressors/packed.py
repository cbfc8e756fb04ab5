"""Several questions about a picture in one sequence, after the tokens that a strategy makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.tiny.language import answer_loss, layout
from vtoken.mechanism.forward_context import ENCODED
from vtoken.patching import patch_of


def compressed(model: Any, pixels: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """The tokens of equal pictures under the patch of a model.

    Args:
        model: LLaVA-like, patched.
        pixels: of images with `sizes`, or of clips (n, frames, 3, height, width) without.

    Returns:
        (n, k, d) features, with gradient; (k,) int64, their places among the tokens of the picture; and the
        number of these.
    """
    if sizes is None:
        output = model.model.get_video_features(pixels, **_features(model))
    else:
        output = model.model.get_image_features(pixels, sizes, **_features(model))
    patch, items = patch_of(model), getattr(output, ENCODED).items
    picks = [patch._select(item) for item in items]  # type: ignore[union-attr]
    features = [p.features for p in picks if p.features is not None]
    return torch.stack(features), picks[0].keep, len(items[0])


def _features(model: Any) -> dict[str, Any]:
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    return {name: getattr(model.config, name) for name in names}


def loss_of_questions(
    model: Any, seen: tuple[Tensor, Tensor, int], ids: Tensor, labels: Tensor, user: list[int], width: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers, and the share of right answer tokens.

    Kept tokens have their original positions, and every question those after the whole picture.

    Args:
        seen: see `compressed`.
        ids, labels: packed questions, see `training.tiny.language.pack`.
        user: token ids before the picture.
        width: tokens per question.
    """
    visual, places, total = seen
    start, slots = len(user), ids.shape[1] // width
    questions = (start + total + torch.arange(width)).repeat(slots)
    position = torch.cat([torch.arange(start), start + places, questions])[None]
    assert position.shape[1] == layout(len(places), start, slots, width)[1].shape[1]
    return answer_loss(model, visual, ids, labels, user, width, position)
