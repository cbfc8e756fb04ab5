"""Tiny anyres models with real image processors: prompts made of pictures of any size."""

from __future__ import annotations

import dataclasses
import functools

import torch
import transformers
from PIL import Image
from torch import Tensor

import vtoken
from tests.models import FAMILIES
from tests.models.common import IMG, left_pad, text
from vtoken import Selection, Strategy, StrategyInfo, VisualTokens
from vtoken.mechanism.forward_context import ENCODED

SIZE, SIDE = 28, 4  # of a tile: px, patches
PINPOINTS = [
    [r * SIZE, c * SIZE] for r, c in [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 3)]
]
PROCESSORS = {
    "llava_next": (
        "LlavaNextImageProcessor",
        dict(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
    ),
    "llava_onevision": ("LlavaOnevisionImageProcessor", dict(size={"height": SIZE, "width": SIZE})),
}
PROCESSORS["llava_next_video"] = PROCESSORS["llava_next"]


@functools.cache
def model_of(name: str, copy: int = 0, ratio: str | None = None, side: int = SIDE):
    """A tiny model that cuts images into up to 3 x 3 crops; `ratio` is OneVision's limit for the canvas."""
    family = FAMILIES[name]

    def config():
        made = family.config()
        made.image_grid_pinpoints = PINPOINTS
        made.vision_config.patch_size = SIZE // side
        if ratio is not None:
            made.vision_aspect_ratio = ratio
        return made

    return dataclasses.replace(family, config=config).build()


def see(name: str, rows: list[list[Image.Image]]) -> dict[str, Tensor]:
    """What the family's own image processor makes of the pictures of a batch."""
    cls, options = PROCESSORS[name]
    processor = getattr(transformers, cls)(image_grid_pinpoints=PINPOINTS, **options)
    nested = name == "llava_onevision"
    pictures = [row for row in rows if row] if nested else [p for row in rows for p in row]
    return dict(processor(pictures, return_tensors="pt"))


@torch.no_grad()
def prompts(name: str, model, rows: list[list[Image.Image]]) -> dict[str, Tensor]:
    """Left-padded inputs, one row of pictures each; the placeholders are counted by encoding without vtoken."""
    vision = see(name, rows)
    sizes = [len(f) for f in model.base_model.get_image_features(**vision).pooler_output]
    numbers, ids = iter(sizes), []
    for i, row in enumerate(rows):
        ids.append(text(3 + i, 40 + i))
        for j, _ in enumerate(row):
            ids[-1] += [IMG] * next(numbers) + text(2 + j, 50 + i + j)
    tokens, mask = left_pad(ids)
    return dict(input_ids=tokens, attention_mask=mask, **vision)


def picture(height: int, width: int, seed: int | None = None) -> Image.Image:
    """Grey, or random noise."""
    if seed is None:
        return Image.new("RGB", (width, height), (128, 128, 128))
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def blind(model):
    """Take attention out of the vision tower: a patch's feature then depends on its own pixels alone."""
    for name, p in model.base_model.named_parameters():
        if "self_attn.out_proj" in name and "language_model" not in name:
            p.data.zero_()
    return model


@torch.no_grad()
def encode(model, vision: dict[str, Tensor]) -> list[VisualTokens]:
    """What a strategy would be given for every picture, without a run of the language model."""
    with vtoken.applied(model, "random", budget=0.5):
        return getattr(model.base_model.get_image_features(**vision), ENCODED).items


@dataclasses.dataclass
class Changed(Strategy):
    """Keeps the tokens whose features differ from those of the first picture it saw."""

    budget: float | int = 0.5
    reference: Tensor | None = dataclasses.field(default=None, init=False)

    def select(self, tokens: VisualTokens) -> Selection:
        if self.reference is None:
            self.reference = tokens.features.clone()
            return Selection.everything(len(tokens))
        return Selection(differ(tokens.features, self.reference))


Changed.info = StrategyInfo("changed", "For tests.", ("projector",), cls=Changed)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Rows in which two pictures differ."""
    return ((a - b).abs().amax(1) > 1e-4).nonzero()[:, 0]


__all__ = [
    "PINPOINTS",
    "SIDE",
    "SIZE",
    "Changed",
    "blind",
    "differ",
    "encode",
    "model_of",
    "picture",
    "prompts",
    "see",
]
