"""Recipe of the tiny Vision Transformer: it names the topmost object of a scene.

Its first six layers begin as the tower of tiny LLaVA, which was trained from nothing on scenes of the same
kind. From random weights 300 steps had hardly begun to tell the shapes apart.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vtoken.tiny.assets import SHAPES
from vtoken.tiny.encoders import Preprocess
from vtoken.tiny.encoders import build as build_from
from vtoken.tiny.scenes import SIZE
from vtoken.tiny.topmost import CLASSES, MARGIN, labelled, topmost

from ..card import plan, run, table
from ..loop import optimise
from .dense import Goal, PatchHeads, moved, owners, start, targets
from .warm import warm_start

PLAN: dict[str, Any] = {"steps": 240, "batch": 32, "rate": 1e-3, "muon_rate": 0.01}
PATCH = 8
SHARES = (0.75, 0.5, 0.25)
APART = 50_000_000  # the scenes of seed s begin at s times this
CHECKS = 7_000_000  # the held-out scenes along the way begin here; those of the card at 0
Batch = tuple[torch.Tensor, torch.Tensor, Goal, torch.Tensor]


def build(
    width: int = 128, depth: int = 8, heads: int = 4
) -> tuple[nn.Module, Preprocess, None, dict[str, Any]]:
    """An untrained ``VisionTransformer`` of 144 patches with a class token, pre-norm, learned positions."""
    shape = dict(
        img_size=SIZE,
        patch_size=PATCH,
        num_classes=len(CLASSES),
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=3,
        act_layer="quick_gelu",
        pre_norm=True,  # these three as in the tower of tiny LLaVA
    )
    config = dict(library="timm", size=SIZE, mean=0.5, std=0.5, classes=list(CLASSES), model=shape)
    model, preprocess, _ = build_from(config)
    start(model.pos_embed[0], model.patch_embed.proj.weight, dict(model.blocks.named_parameters()))
    if width == 128:
        warm_start(model)
    return model, preprocess, None, config


def batch(preprocess: Preprocess, first: int, size: int, split: str, step: int) -> Batch:
    """Pixels, classes, names of the patches, and the patches of the topmost object (bool) of a step."""
    some = [labelled(first + step * size + i, split) for i in range(size)]
    scenes, classes = [scene for scene, _ in some], torch.tensor([label for _, label in some])
    own = [torch.from_numpy(owners(s.masks(), PATCH) == s.objects.index(topmost(s))) for s in scenes]
    pixels = torch.stack([preprocess(scene.image) for scene in scenes])
    return pixels, classes, targets(scenes, PATCH), torch.stack(own)


class Heads(nn.Module):
    """Read-outs for training: patches name their object half-way up and later; later also the topmost one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.early, self.late = PatchHeads(width), PatchHeads(width)
        self.top = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, model: Any, item: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of a batch, and what was right."""
        pixels, classes, names, top = moved(item, model.pos_embed.device)
        half, late = len(model.blocks) // 2, len(model.blocks) - 2
        end, states = model.forward_intermediates(pixels, [half - 1, late - 1], output_fmt="NLC")
        logits = model.forward_head(end)
        early, _ = self.early(states[0], names)
        named, form = self.late(states[1], names)
        weight = torch.tensor(10.0, device=pixels.device)
        found = F.binary_cross_entropy_with_logits(
            self.top(states[1])[..., 0], top.float(), pos_weight=weight
        )
        right = (logits.argmax(-1) == classes).float().mean().item()
        loss = 2 * F.cross_entropy(logits, classes) + 0.5 * early + 0.5 * named + found
        return loss, {"classes": right, "form": form}


def train(
    model: Any,
    preprocess: Preprocess,
    tokenizer: None,
    log: list[dict],
    seed: int = 0,
    checks: int = 256,
    **limits: Any,
) -> None:
    """The only stage, in place; appends to ``log``. Limits as in `training.tiny.loop.optimise`."""
    heads = Heads(model.embed_dim).to(model.pos_embed.device)
    check = batch(preprocess, CHECKS, checks, "test", 0)

    @torch.no_grad()
    def facts() -> dict[str, float]:
        return {f"held_out_{name}": value for name, value in heads(model, check)[1].items()}

    # Muon takes the matrices of ".layers."
    named = {f"vit.{n.replace('blocks', 'layers')}": p for n, p in model.named_parameters()}
    make = partial(batch, preprocess, seed * APART, PLAN["batch"], "train")
    optimise(
        "classes",
        named | dict(heads.named_parameters(prefix="heads")),
        make,
        lambda item, done: heads(model, item),
        PLAN,
        log,
        facts,
        **limits,
    )


@torch.no_grad()
def predictions(
    model: Any, preprocess: Preprocess, n: int, share: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that the model says and right classes of the first ``n`` held-out scenes: two ``(n,)`` int64.

    With ``share`` below 1 the blocks read that share of the patches only, drawn anew for every scene.
    """
    generator, said, right = torch.Generator().manual_seed(seed), [], []
    for first in range(0, n, 100):
        some = [labelled(i, "test") for i in range(first, min(n, first + 100))]
        pixels = torch.stack([preprocess(scene.image) for scene, _ in some]).to(model.pos_embed.device)
        states = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
        count = states.shape[1] - 1
        rank = torch.rand(len(some), count, generator=generator).argsort(1)[:, : round(share * count)]
        keep = torch.cat([torch.zeros(len(some), 1, dtype=torch.int64), rank + 1], 1).to(pixels.device)
        states = states.gather(1, keep[..., None].expand(-1, -1, states.shape[-1]))
        said.append(model.forward_head(model.norm(model.blocks(states))).argmax(-1).cpu())
        right += [label for _, label in some]
    return torch.cat(said), torch.tensor(right)


def measure(model: Any, preprocess: Preprocess, tokenizer: None, n: int = 2000) -> dict[str, Any]:
    """Top-1 of the class, of its colour and of its shape alone, blind, and with a share of the patches."""
    said, right = predictions(model, preprocess, n)
    shapes = len(SHAPES)
    return {
        "recipe": {"classes": PLAN},
        "scenes": n,
        "top1": {
            "class": (said == right).float().mean().item(),
            "colour": (said // shapes == right // shapes).float().mean().item(),
            "shape": (said % shapes == right % shapes).float().mean().item(),
        },
        "most_frequent_class": right.bincount().max().item() / n,
        "random_patches": {
            str(share): (predictions(model, preprocess, n, share)[0] == right).float().mean().item()
            for share in SHARES
        },
    }


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The card."""
    top1, pruned = report["top1"], report["random_patches"]
    return CARD.format(
        parameters=report["parameters"] / 1e6,
        scenes=report["scenes"],
        top1=table(top1, {"model": [*top1.values()]}),
        blind=report["most_frequent_class"],
        pruned=table({f"{float(s):.0%}": 0 for s in pruned}, {"random patches": [*pruned.values()]}),
        margin=MARGIN,
        run=run(report, "training.tiny.encoders"),
        plan=plan(PLAN, log, "classes"),
    )


CARD = """---
license: apache-2.0
library_name: timm
pipeline_tag: image-classification
---

# A tiny Vision Transformer for tests, demos and studies of visual tokens

A `timm.models.vision_transformer.VisionTransformer` ({parameters:.2f} M parameters, 8 layers of width 128,
class token, pre-norm) that names the colour and the shape of the topmost object of a scene: 56 classes. It
reads 144 patches (96 px, patch 8) and was trained on ordinary, full sequences: it has never seen a dropped or
merged token.

```python
from vtoken import tiny

model, preprocess, _ = tiny.load_encoder("vit")
logits = model(preprocess(image)[None])  # (1, 56), in the order of vtoken.tiny.topmost.CLASSES
```

## Accuracy

Top-1 on {scenes} held-out scenes, of the class, and of its colour and its shape alone. The most frequent
class would be right in {blind:.3f} of them.

{top1}

Top-1 of the class on the same scenes when the blocks read only a share of the patches, drawn at random:

{pruned}

## Data

Scenes of 2 to 4 shapes (of 8, in 7 colours, 15 to 19 px across, none twice) on crops of photographs
(`vtoken/tiny/scenes.py`), of which those stay where the topmost object is at least {margin} px higher than
the next (`vtoken/tiny/topmost.py`). The test split uses other glyphs and other photographs than the
training split.

## Recipe

{run}

The first six layers begin as the tower of tiny LLaVA (`vtoken/tiny/llava`), itself trained from nothing on
scenes of the same kind; the other two and the head begin at random. All weights are trained:
{plan}.
Besides the class, the patches name the shape and the colour of their object and draw its outline after blocks
4 and 6, and after block 6 they say if it is the topmost one. These read-outs do not ship.

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`. The held-out curves are measured on scenes of the test split
other than those of the tables above.

## Limits

It knows the scenes above and nothing else. Its class token began as one that was trained to look at the
objects: methods that read its attention have an easy time here. Numbers measured on it compare methods of
token reduction in kind, not in degree: large models on natural images behave differently.
"""
