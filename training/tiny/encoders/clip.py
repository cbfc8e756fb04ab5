"""Recipe of the tiny CLIP: frames and clips find their captions; trained from nothing.

Stage ``frames`` teaches single frames and their captions; stage ``clips`` goes on with whole clips.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vtoken.tiny.captions import LONGEST, WORDS, retrieval_set
from vtoken.tiny.clips import Clip, Frames
from vtoken.tiny.encoders import Preprocess, WordTokenizer
from vtoken.tiny.encoders import build as build_from
from vtoken.tiny.retrieval import recalls, text_embeddings, video_embeddings
from vtoken.tiny.scenes import SIZE

from ..card import plan, run, table
from ..loop import optimise
from .clip_data import PATCH, Batch, clip_batch, frame_batch
from .dense import PatchHeads, moved, start

FRAMES: dict[str, Any] = {"steps": 750, "batch": 80, "rate": 2e-3, "muon_rate": 0.02}
CLIPS: dict[str, Any] = {"steps": 400, "batch": 40, "rate": 1e-3, "muon_rate": 0.01}
APART, LATER = 50_000_000, 25_000_000  # pictures of the next seed, and of the second stage
CHECKS = 7  # the held-out clips along the way are those of this seed; those of the card have seed 0


def build(
    width: int = 128, layers: int = 8, text_width: int = 96, text_layers: int = 3
) -> tuple[nn.Module, Preprocess, WordTokenizer, dict[str, Any]]:
    """An untrained ``open_clip.model.CLIP``: 64 patches and a class token; words read from left to right."""
    vision = dict(layers=layers, width=width, head_width=width // 4, patch_size=PATCH, image_size=SIZE)
    text = dict(
        context_length=LONGEST + 2,
        vocab_size=len(WORDS) + 3,
        width=text_width,
        heads=4,
        layers=text_layers,
        mlp_ratio=2.0,
    )
    shape = dict(embed_dim=128, vision_cfg=vision, text_cfg=text)
    config = dict(library="open_clip", size=SIZE, mean=0.5, std=0.5, words=list(WORDS), model=shape)
    model, preprocess, tokenizer = build_from(config)
    tower = model.visual
    start(tower.positional_embedding, tower.conv1.weight, dict(tower.transformer.named_parameters()))
    return model, preprocess, tokenizer, config


def contrast(
    model: Any, images: torch.Tensor, ids: torch.Tensor, which: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Contrastive loss both ways, and the share of images that find their caption.

    Args:
        images: L2-normalised ``(n, D)``.
        ids: of the different captions.
        which: the caption of each image; one that several share is right for all of them.
    """
    texts = model.encode_text(ids, normalize=True)
    logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T
    own = F.one_hot(which, len(ids)).bool()
    there = F.cross_entropy(logits, which)
    back = logits.logsumexp(0) - logits.masked_fill(~own, float("-inf")).logsumexp(0)
    right = (logits.argmax(-1) == which).float().mean().item()
    return (there + back.mean()) / 2, right


def loss_of(model: Any, heads: PatchHeads, item: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of a batch of frames or of clips, and what was right."""
    item, half = moved(item, model.logit_scale.device), model.visual.transformer.layers // 2
    out = model.visual.forward_intermediates(item["pixels"], [half - 1], output_fmt="NLC")
    named, form = heads(out["image_intermediates"][0], item["names"])
    frames = F.normalize(out["image_features"], dim=-1)
    loss, right = contrast(model, frames, item["ids"], item["which"])
    facts = {"frames": right, "form": form}
    if "shares" not in item:
        return loss + 0.5 * named, facts
    videos = F.normalize(item["shares"] @ frames, dim=-1)
    whole, found = contrast(model, videos, item["clip_ids"], item["clip_which"])
    return whole + 0.5 * loss + 0.25 * named, {"clips": found, **facts}


def train(
    model: Any,
    preprocess: Preprocess,
    tokenizer: WordTokenizer,
    log: list[dict],
    seed: int = 0,
    seconds: float | None = None,
    checks: int = 200,
    **limits: Any,
) -> None:
    """Both stages, in place; appends to ``log``. Limits as in `training.tiny.loop.optimise`."""
    heads = PatchHeads(model.visual.transformer.width).to(model.logit_scale.device)
    # Muon takes the matrices of ".layers."
    named = {n.replace("resblocks", "layers"): p for n, p in model.named_parameters()}
    named |= dict(heads.named_parameters(prefix="heads"))
    check = frame_batch(preprocess, tokenizer, CHECKS * 1_000_000, checks, "test", 0)
    clips, texts = retrieval_set(checks, seed=CHECKS)

    @torch.no_grad()
    def frame_facts() -> dict[str, float]:
        return {f"held_out_{name}": value for name, value in loss_of(model, heads, check)[1].items()}

    def clip_facts() -> dict[str, float]:
        found = recalls(
            text_embeddings(model, tokenizer, texts) @ video_embeddings(model, preprocess, clips).T
        )
        return frame_facts() | {f"held_out_{name}": found[name] / 100 for name in ("t2v_r1", "v2t_r1")}

    stages = (
        ("frames", FRAMES, frame_batch, frame_facts, 0.5, 0),
        ("clips", CLIPS, clip_batch, clip_facts, 0.5, LATER),
    )
    for name, chosen_plan, make, facts, share, later in stages:
        optimise(
            name,
            named,
            partial(make, preprocess, tokenizer, seed * APART + later, chosen_plan["batch"], "train"),
            lambda item, done: loss_of(model, heads, item),
            chosen_plan,
            log,
            facts,
            seconds=seconds and seconds * share,
            **limits,
        )


def shortened(clip: Clip, step: int) -> Clip:
    """The clip with every ``step``-th frame only."""
    return replace(clip, media=Frames(clip.media[::step], clip.media.seconds[::step]))


def measure(model: Any, preprocess: Preprocess, tokenizer: WordTokenizer, n: int = 500) -> dict[str, Any]:
    """Recall between ``n`` held-out clips and their captions, with all 12 frames and with every fourth."""
    clips, texts = retrieval_set(n)
    asked = text_embeddings(model, tokenizer, texts)
    return {
        "recipe": {"frames": FRAMES, "clips": CLIPS},
        "clips": n,
        "recalls": {
            f"{12 // step} frames": recalls(
                asked @ video_embeddings(model, preprocess, [shortened(clip, step) for clip in clips]).T
            )
            for step in (1, 4)
        },
    }


def card(report: dict[str, Any], log: list[dict]) -> str:
    """The card."""
    found = report["recalls"]
    names = {name.replace("_r", " R@").replace("rsum", "R-sum"): 0 for name in found["12 frames"]}
    return CARD.format(
        parameters=report["parameters"] / 1e6,
        clips=report["clips"],
        chance=100 / report["clips"],
        recalls=table(names, {name: [*values.values()] for name, values in found.items()}),
        run=run(report, "training.tiny.encoders"),
        frames=plan(FRAMES, log, "frames").replace("scenes", "frames"),
        whole=plan(CLIPS, log, "clips").replace("scenes", "clips"),
    )


CARD = """---
license: apache-2.0
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---

# A tiny CLIP for tests, demos and studies of visual tokens

An `open_clip.model.CLIP` ({parameters:.2f} M parameters) for retrieval between texts and videos. Its vision
tower has 8 layers of width 128 and reads 64 patches (96 px, patch 12) and a class token; its text tower
reads words from left to right. It was trained from scratch on ordinary, full sequences: it has never seen a
dropped or merged token.

```python
from vtoken import tiny
from vtoken.tiny.captions import retrieval_set
from vtoken.tiny.retrieval import recalls, text_embeddings, video_embeddings

model, preprocess, tokenizer = tiny.load_encoder("clip")
clips, texts = retrieval_set(500)
videos = video_embeddings(model, preprocess, clips)  # (500, 128): mean of the normalised frame embeddings
print(recalls(text_embeddings(model, tokenizer, texts) @ videos.T))
```

## Retrieval

Recall in percent between {clips} held-out clips of 12 frames and their captions, text to video (t2v) and
video to text (v2t); R-sum adds the six. A random choice has an R@1 of {chance:g}. The second row reads
every fourth frame only.

{recalls}

## Data

Clips with 2 to 4 moments, each with a digit, a coloured shape or both, on a photograph
(`vtoken/tiny/clips.py`), and captions such as `a red circle and a 4 then a blue star`
(`vtoken/tiny/captions.py`). In the set for retrieval no two clips show the same moments, in whatever order.
The test split uses other fonts, glyphs and photographs than the training split.

## Recipe

{run}

1. Frames, {frames}:
   single frames with bent masks and their captions, contrastive both ways.
2. Clips, {whole}:
   one frame of each moment and one between them stand for all frames, weighted by their number; they are
   drawn anew, with bent masks. The clip finds its caption, and each frame its own.

In both stages patches name the object that they show and draw its outline, after layer 4. This read-out
does not ship.

![loss and accuracy](curve.png)

Every 20th step is in `training_log.json`. The held-out curves are measured on clips of the test split other
than those of the table above.

## Limits

It knows 29 words and the clips above, nothing else; texts with other words are refused. The mean over
frames does not see the order of moments. Numbers measured on it compare methods of token reduction in kind,
not in degree: large models on natural videos behave differently.
"""
