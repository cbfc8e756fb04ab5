"""Hand-made visual tokens: the geometry of every kind of input with random features, attention and keys, no
model.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vtoken import Segment, Selection, Strategy, TowerInfo, VisualTokens
from vtoken.llm_shape import LanguageModelShape
from vtoken.strategies.trained import ModelShape, TrainedStrategy, trained_part

LAYERS, HEADS, WIDTH, DIM, PATCHES = 6, 2, 8, 16, (6, 6)


def tower(
    has_cls: bool = True, layers: int = LAYERS, global_layers: tuple[int, ...] | None = None
) -> TowerInfo:
    every = tuple(range(layers)) if global_layers is None else global_layers
    return TowerInfo(layers, layers - 2, has_cls, every, HEADS)


def build(
    segments: list[Segment],
    cells: Tensor | None = None,
    modality: str = "image",
    has_cls: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    text: int = 5,
    info: TowerInfo | None = None,
) -> VisualTokens:
    """Tokens of the given segments; `cells` None: every cell is a token. Segments share a grid size."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total = sum(s.size for s in segments)
    cells = torch.arange(total) if cells is None else cells
    count, size, info = len(segments), max(s.size for s in segments), info or tower(has_cls)
    provided: dict = {}
    for layer in range(info.num_layers):
        logits = randn(count, HEADS, 1 + size) * 2
        provided["cls_attention", layer] = logits.softmax(-1)[..., 1:].float()
        provided["cls_logits", layer] = logits[..., 1:].mean(1).float()
        provided["received_attention", layer] = randn(count, size).softmax(-1).float()
        provided["keys", layer] = randn(count, size, HEADS * WIDTH).to(dtype)
    features = randn(len(cells), DIM)
    frames = 1 if modality == "video" else 4  # of the static video that an image may be read as
    states = randn(count, frames, *PATCHES, HEADS * WIDTH).to(dtype)
    provided |= {("states", layer): states for layer in range(info.num_layers)}
    features[cells < 0] = features[cells < 0][:1]  # image-newline rows are one learned vector
    return VisualTokens(
        features=features.to(dtype),
        segments=tuple(segments),
        cells=cells,
        tower=info,
        modality=modality,
        text_embeddings=randn(text, DIM).to(dtype) if text else None,
        question=randn(DIM).to(dtype) if text else None,
        provided=provided,
        pixels=randn(count, 3, 12, 12).to(dtype),
        encode=lambda pixels: pixels.mean((1, 2, 3))[:, None, None].expand(-1, size, DIM),
        question_attention=2 * randn(HEADS, len(cells)).float() if text else None,
    )


def image(height: int = 4, width: int = 4, **options) -> VisualTokens:
    return build([Segment("image", (height, width))], **options)


def video(frames: int = 4, height: int = 2, width: int = 4, trailing: int = 0, **options) -> VisualTokens:
    cells = torch.cat([torch.arange(frames * height * width), torch.full((trailing,), -1)])
    return build([Segment("frame", (height, width))] * frames, cells, "video", **options)


def anyres(
    down: int = 2,
    across: int = 2,
    side: int = 4,
    top: int = 0,
    left: int = 0,
    newline: bool = True,
    **options,
) -> VisualTokens:
    """A thumbnail and down x across crops of side x side cells; `top` rows above and below, `left` columns on
    both sides of the canvas are padding that the model removed, and a newline row ends every row that is
    left.
    """
    height, width = down * side, across * side
    y, x = torch.meshgrid(torch.arange(top, height - top), torch.arange(left, width - left), indexing="ij")
    crop = y // side * across + x // side
    canvas = side * side * (1 + crop) + y % side * side + x % side
    if newline:
        canvas = torch.cat([canvas, torch.full((len(canvas), 1), -1)], 1)
    cells = torch.cat([torch.arange(side * side), canvas.flatten()])
    segments = [Segment("thumbnail", (side, side))]
    for i in range(down * across):
        fed = int(((cells >= side * side * (i + 1)) & (cells < side * side * (i + 2))).sum())
        segments.append(Segment("crop", (side, side), (i // across, i % across), tokens=fed))
    return build(segments, cells, **options)


several = pytest.mark.parametrize(
    "tokens",
    [image(8, 9), image(1, 7, seed=2), anyres(2, 2, 6, top=2), video(3, 5, 5)],
    ids=["image", "row", "anyres", "video"],
)


def kept_cells(tokens: VisualTokens, selection: Selection) -> list[int]:
    cells = tokens.cells[selection.keep]
    return cells[cells >= 0].tolist()


def kept_per_segment(tokens: VisualTokens, selection: Selection) -> list[int]:
    return [int((tokens.segment_of[selection.keep] == i).sum()) for i in range(len(tokens.segments))]


def separators_kept(tokens: VisualTokens, selection: Selection) -> int:
    return int((tokens.cells[selection.keep] < 0).sum())


def answer(strategy: Strategy, tokens: VisualTokens, memory: dict | None = None) -> Selection:
    """A checked answer to tokens that provide only what was declared; `memory` is that of a stream going on."""
    needs = strategy.needs(tokens.tower)
    declared = {(what, layer) for what in ("cls_attention", "cls_logits", "received_attention", "keys", "states")
                for layer in getattr(needs, what)}  # fmt: skip
    assert tokens.modality in needs.modalities
    part = trained_part(strategy)
    if part is not None and not part.attached:
        part.attach(weights(part, tokens.tower))
    given = replace(
        tokens,
        memory={} if memory is None else memory,
        text_embeddings=tokens.text_embeddings if needs.text_embeddings else None,
        question=tokens.question if needs.question else None,
        pixels=tokens.pixels if needs.pixels else None,
        encode=tokens.encode if needs.pixels else None,
        provided={key: value for key, value in tokens.provided.items() if key in declared},
    )
    return strategy.select(given).check(len(tokens))


def weights(strategy: TrainedStrategy, info: TowerInfo | None, seed: int = 0) -> torch.nn.Module:
    """A module of the strategy whose weights are all random."""
    llm = LanguageModelShape(2, DIM, 2, 1, 8, 24)
    module = strategy.build(ModelShape(info, HEADS * WIDTH, llm))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module


def outputs(tokens: VisualTokens, selection: Selection) -> Tensor:
    """What the LLM would read: the kept features after merging, float64, one by one as `Selection` defines
    it.
    """
    if selection.features is not None:
        return selection.features.double()
    x = tokens.features.double()
    out = []
    for j, i in enumerate(selection.keep.tolist()):
        members = [] if selection.into is None else (selection.into == j).nonzero()[:, 0].tolist()
        out.append(sum(x[m] * float(selection.weight[m]) for m in members) if members else x[i])
    return torch.stack(out)


def top(scores: Tensor, k: int) -> list[int]:
    """Ascending indices of the k largest, the lower index among equals, by Python's sort."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:k])


def flat(lists: list[list[int]]) -> list[int]:
    return [i for mine in lists for i in mine]


def edge_cases() -> dict[str, VisualTokens]:
    """Image inputs on which every image strategy must give a legal answer."""
    return {
        "one token": image(1, 1),
        "one row": image(1, 7),
        "tall": image(9, 2),
        "half precision": image(5, 5, dtype=torch.float16),
        "bfloat16": anyres(2, 2, 4, top=1, dtype=torch.bfloat16),
        "equal": equal(image(4, 4)),
        "equal crops": equal(anyres(1, 2)),
        "zero": zero(image(4, 4)),
        "wide canvas": anyres(1, 3, 4),
        "tall canvas": anyres(3, 1, 3),
        "unpadded rows": anyres(2, 1, 4, top=3),
        "unpadded columns": anyres(1, 2, 4, left=3),
        "unpadded crops": anyres(3, 1, 2, top=2),
        "no newline": anyres(2, 2, 3, newline=False),
    }


def equal(tokens: VisualTokens) -> VisualTokens:
    """All tokens alike in every respect."""
    tokens.features = tokens.features[:1].repeat(len(tokens), 1)
    for key, value in tokens.provided.items():
        tokens.provided[key] = torch.ones_like(value) / value.shape[-1]
    return tokens


def zero(tokens: VisualTokens) -> VisualTokens:
    tokens.features = torch.zeros_like(tokens.features)
    tokens.provided = {key: torch.zeros_like(value) for key, value in tokens.provided.items()}
    return tokens
