"""Trained plain encoders that ship with the package: a Vision Transformer of timm and a CLIP of open_clip.

A folder ``tiny/<name>`` holds ``config.json`` (constructor arguments and how inputs are prepared) and
``model.safetensors`` (bfloat16).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ..extras import require


@dataclass(frozen=True)
class Preprocess:
    """Makes ``(3, size, size)`` float32 of a PIL image.

    RGB, resized (bicubic) if of another size, then ``(x - mean) / std`` of pixels in 0..1; one number for all
    channels.
    """

    size: int
    mean: float
    std: float

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        return (pixels / 255 - self.mean) / self.std


class WordTokenizer:
    """One id per word: 0 pads, then the words, then the start, then the end, which has the largest id.

    open_clip reads a text at its largest id.

    Args:
        words: the known words.
        context: length of a row of ids.
    """

    def __init__(self, words: list[str], context: int) -> None:
        self.words, self.context = tuple(words), context
        self.ids = {word: number for number, word in enumerate(self.words, 1)}
        self.start, self.end = len(words) + 1, len(words) + 2

    def __call__(self, texts: list[str] | str) -> torch.Tensor:
        """Ids ``(n, context)`` int64 of texts. Raises ValueError for unknown words and for long texts."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(rows, texts):
            words = text.lower().replace(",", " ").split()
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise ValueError(
                    f"the tiny CLIP does not know the word {unknown[0]!r}: "
                    f"its words are {', '.join(self.words)}"
                )
            if len(words) > self.context - 2:
                raise ValueError(
                    f"a text of the tiny CLIP has at most {self.context - 2} words, "
                    f"got {len(words)}: {text!r}"
                )
            ids = [self.start, *(self.ids[word] for word in words), self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def build(config: dict[str, Any]) -> tuple[Any, Preprocess, WordTokenizer | None]:
    """An untrained model, its preprocessing and its tokenizer (None without text) from a ``config.json``.

    Raises:
        ImportError: timm or open_clip is not installed.
    """
    preprocess = Preprocess(config["size"], config["mean"], config["std"])
    if config["library"] == "timm":
        require("timm", extra="timm")
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(**config["model"]), preprocess, None
    require("open_clip", extra="open_clip")
    from open_clip.model import CLIP

    tokenizer = WordTokenizer(config["words"], config["model"]["text_cfg"]["context_length"])
    return CLIP(**config["model"]), preprocess, tokenizer


def load(folder: Path) -> tuple[Any, Preprocess, WordTokenizer | None]:
    """The model of a folder in eval mode, float32, with its preprocessing and its tokenizer; see `build`."""
    model, preprocess, tokenizer = build(json.loads((folder / "config.json").read_text()))
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({name: t.float() for name, t in state.items()})
    return model.eval(), preprocess, tokenizer
