"""Training of a CLIP model whose image tower merges across the frames of a video, for text-video retrieval.

::

    strategy = vtoken.strategies.TempMe(frames=12)
    tuned = add_lora(clip)
    losses = train(tuned, strategy, batches, steps=1000)
    clip = tuned.merge_and_unload()  # LoRA goes into the weights
    strategy.save_frame_positions("positions.safetensors")
    vtoken.patch(clip, strategy)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import found
from .extras import require
from .patching import applied
from .strategies import TempMe  # type: ignore[attr-defined]
from .streams import unwrapped
from .videos import video_embeddings


def add_lora(clip: Any, rank: int = 8) -> Any:
    """Freeze an open_clip model and add LoRA to the packed qkv projections of both of its towers.

    As in TempMe (arXiv 2409.01156): no biases, no scaling, the second factor zero at first, so that nothing
    changes before it is trained. The model is changed in place; needs peft, of the extra "tempme".

    Args:
        clip: an open_clip model with transformer towers of its own, or an image tower of timm.
        rank: of the updates.

    Returns:
        peft's `PeftModel`: `save_pretrained` writes the updates, `merge_and_unload` folds them into the
        weights and returns `clip`.

    Raises:
        ImportError: without peft.
        ValueError: if a tower has no packed qkv projections.
    """
    require("peft", extra="tempme")
    import peft

    attentions = {
        n: m for n, m in clip.named_modules() if ".resblocks." in n and isinstance(m, nn.MultiheadAttention)
    }
    packed = [f"{n}.in_proj_weight" for n, m in attentions.items() if m.in_proj_weight is not None]
    linear = [
        n
        for n, m in clip.named_modules()
        if ".blocks." in n and n.endswith(".qkv") and isinstance(m, nn.Linear)
    ]
    image = [name.startswith("visual.") for name in packed + linear]
    if not any(image) or all(image):
        raise ValueError(
            f"LoRA needs packed qkv projections in both towers, found {sum(image)} in the image tower and"
            f" {len(image) - sum(image)} in the text tower of {type(clip).__name__}: use a CLIP of open_clip."
        )
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_parameters=packed or None, target_modules=linear)
    return peft.get_peft_model(clip, config)


def retrieval_loss(videos: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Mean of the cross-entropies of texts given videos and of videos given texts; pair i is row i of both.

    Args:
        videos, texts: (n, D), L2-normalised.
        scale: factor on the cosines.
    """
    logits = scale * texts @ videos.T
    pair = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


def train(
    model: Any,
    strategy: TempMe,
    batches: Iterable[tuple[Tensor, ...]],
    steps: int,
    lr: float = 6e-4,
    weight_decay: float = 0.2,
    warmup: float = 0.1,
    clip_norm: float = 1.0,
) -> list[float]:
    """Train what requires a gradient, and the frame positions of the strategy, on pairs of videos and texts.

    The recipe of TempMe (arXiv 2409.01156): symmetric cross-entropy within the batch under the frozen logit
    scale, AdamW, a cosine schedule after a warm-up. One process on the model's device; in its present mode.

    Args:
        model: the result of `add_lora`, or an open_clip model to train whole. A patch on it is suspended.
        strategy: gets frame positions unless it has them.
        batches: (frames (n, F, 3, H, W), token ids (n, length)), with a third entry a mask (n, F) of the
            frames that count.
        steps: optimiser steps, one batch each.
        lr: greatest learning rate.
        weight_decay: of AdamW.
        warmup: share of the steps in which the rate rises.
        clip_norm: greatest norm of the gradient.

    Returns:
        The loss of every step.

    Raises:
        TypeError: if the strategy is no `TempMe`.
        ValueError: if the batches end early, or a video has another number of frames than the strategy's.
    """
    if not isinstance(strategy, TempMe):
        raise TypeError(
            f"train takes a TempMe, found {found(strategy)}: give vtoken.strategies.TempMe(frames=...)."
        )
    from transformers import get_cosine_schedule_with_warmup

    clip = unwrapped(model)
    positions = _positions(clip, strategy)
    scale = clip.logit_scale.detach().exp()
    trained = [p for n, p in clip.named_parameters() if p.requires_grad and n != "logit_scale"] + list(
        positions
    )
    optimiser = torch.optim.AdamW(trained, lr, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimiser, round(warmup * steps), steps)
    losses: list[float] = []
    with applied(model, strategy), torch.enable_grad():
        for _, batch in zip(range(steps), batches):
            optimiser.zero_grad()
            loss = _loss(clip, strategy.frames, scale, *(part.to(scale.device) for part in batch))
            loss.backward()
            nn.utils.clip_grad_norm_(trained, clip_norm)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    if len(losses) < steps:
        raise ValueError(
            f"The batches ended after {len(losses)} of {steps} steps: repeat them, or take fewer steps."
        )
    return losses


def _positions(clip: Any, strategy: Any) -> nn.ParameterList:
    """The frame positions of the strategy on the device of the model, made if there are none."""
    visual = clip.visual
    width = visual.trunk.embed_dim if hasattr(visual, "trunk") else visual.conv1.out_channels
    if strategy.trained_positions is None:
        strategy.make_frame_positions(width)
    return strategy.trained_positions.to(clip.logit_scale.device)


def _loss(
    clip: Any, frames: int, scale: Tensor, videos: Tensor, texts: Tensor, mask: Tensor | None = None
) -> Tensor:
    if videos.ndim != 5 or videos.shape[1] != frames:
        raise ValueError(f"A batch has videos (n, {frames}, 3, H, W), found {tuple(videos.shape)}.")
    embeddings = video_embeddings(clip.encode_image(videos.flatten(0, 1)), frames, mask)
    return retrieval_loss(embeddings, clip.encode_text(texts, normalize=True), scale)
