"""Learn how many tokens DiffRate keeps in every layer, by gradient, with the encoder's weights frozen.

The published search (DiffRate, arXiv 2305.17997): a softmax over candidates per layer, straight-through
masks in place of removed tokens, and the squared distance to a number of FLOPs added to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters.encoders.encoder import encoder_for
from .rates_search import start_search
from .strategies import DiffRate  # type: ignore[attr-defined]


def learn_rates(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    flops: float,
    *,
    steps: int,
    step: int = 4,
    weight: float = 5.0,
    lr: float = 0.01,
    whole: Sequence[int] = (0,),
    logits: Callable[[Any], Tensor] = lambda out: getattr(out, "logits", out),
    on_step: Callable[[int, float, float], None] | None = None,
) -> DiffRate:
    """Learn DiffRate's kept tokens per layer for a classifier; its weights do not change.

    Args:
        model: a classifier of timm, open_clip or transformers with a class token, unpatched; in train mode if
            stochastic depth shall act, as published.
        batches: at least `steps` pairs of images (b, 3, H, W) and labels, (b,) int64 or (b, classes) shares.
        flops: share in (0, 1] of the encoder's multiply-adds to aim at.
        steps: number of updates; the learning rate falls from `lr` to a tenth of it along a cosine.
        step: distance between candidates, in tokens.
        weight: of the squared distance to the goal, in GFLOPs, in the loss.
        whole: layers that remove nothing, negative ones from the end; published are (0,) for DeiT and (0, -1)
            for MAE, which averages the patches.
        logits: reads the logits off the model's output.
        on_step: called with the step, the classification loss and the GFLOPs of an image.

    Returns:
        A configured strategy: `vtoken.patch(model, learn_rates(...))`.

    Raises:
        ValueError: for an encoder that cannot be reduced, a number out of range, too few batches, a
            loss that is not finite, or a call in inference mode.
    """
    encoder = encoder_for(model)
    if encoder is None or not encoder.has_cls:
        raise ValueError(
            f"learn_rates needs a vision transformer with a class token, found {type(model).__name__}."
        )
    if not 0 < flops <= 1:
        raise ValueError(f"flops must be a share in (0, 1], found {flops}.")
    _check_numbers(steps, step, whole, len(encoder.layers))
    encoder.check()
    search = start_search(encoder, step, whole)
    goal = flops * search.shape.macs([0] * search.shape.layers) / 1e9
    chosen = nn.ModuleList([*search.prune, *search.merge])
    optimiser = torch.optim.AdamW(chosen.parameters(), lr=lr, weight_decay=0.0)
    done = 0
    with _frozen(model), search.applied(), torch.enable_grad():
        for images, labels in batches:
            if done == steps:
                break
            for group in optimiser.param_groups:
                group["lr"] = lr * (0.55 + 0.45 * math.cos(math.pi * done / steps))
            loss = F.cross_entropy(logits(model(images)), labels)
            if not torch.isfinite(loss.detach()):
                raise ValueError(
                    f"The loss of batch {done} is {float(loss.detach())}: look at its images and"
                    " labels, and at the model's dtype."
                )
            gflops = search.flops / 1e9
            optimiser.zero_grad()
            (loss + weight * (gflops - goal) ** 2).backward()
            optimiser.step()
            done += 1
            if on_step is not None:
                on_step(done, float(loss.detach()), float(gflops.detach()))
    if done < steps:
        raise ValueError(f"learn_rates makes {steps} updates, and the batches ended after {done}: give more.")
    return search.strategy()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The weights of a model need no gradient inside a `with` block."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _check_numbers(steps: int, step: int, whole: Sequence[int], layers: int) -> None:
    """Raise ValueError, in one sentence, for numbers out of range and in inference mode."""
    if steps < 1 or step < 1:
        raise ValueError(f"steps and step are whole numbers of at least 1, found {steps} and {step}.")
    if unknown := [i for i in whole if not -layers <= i < layers]:
        raise ValueError(f"whole names layer {unknown[0]}, the encoder has layers 0 to {layers - 1}.")
    if torch.is_inference_mode_enabled():
        raise ValueError("learn_rates needs gradients: call it outside torch.inference_mode().")
