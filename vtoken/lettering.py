"""Words on pictures of visual tokens: legends, and lines of a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

KEPT, PAPER, INK = (255, 221, 0), (255, 255, 255), (30, 30, 30)
LINE = 22  # px from one line of text to the next


def with_legend(picture: Image.Image, layers: Sequence[Any], levels: np.ndarray, dim: float) -> Image.Image:
    """A picture over one line per shade: the layers that read these tokens, and their number.

    Args:
        picture: RGB.
        layers: ranges of LLM layers from the first to the last, each with `first`, an int.
        levels: (cells,) int, how many of the ranges read the token of a cell.
        dim: how far a token that no layer reads fades to white, 0 to 1.
    """
    ranges = len(layers)
    entries = [(ranges, "outlined: read by every LLM layer, ")]
    entries += [(n, f"dropped before LLM layer {layers[n].first}: ") for n in range(ranges - 1, 0, -1)]
    entries += [(0, "not read by the LLM: ")] * bool((levels == 0).any())
    side, gap = 18, 6
    lines = [
        wrapped(words + _tokens(int((levels == n).sum())), picture.width - side - gap) for n, words in entries
    ]
    height = sum(len(line) * LINE + gap for line in lines)
    sheet = Image.new("RGB", (picture.width, picture.height + 2 * gap + height), PAPER)
    sheet.paste(picture, (0, 0))
    pen, y = ImageDraw.Draw(sheet), picture.height + 2 * gap
    for (n, _), line in zip(entries, lines):
        white = dim * (1 - n / ranges)
        shade = tuple(round(110 * (1 - white) + 255 * white) for _ in range(3))
        box = (0, y, side - 1, y + side - 1)
        if n == ranges:
            pen.rectangle(box, fill=PAPER, outline=KEPT, width=3)
        else:
            pen.rectangle(box, fill=shade, outline=INK, width=2)
        for words in line:
            pen.text((side + gap, y - 1), words, fill=INK, font=font())
            y += LINE
        y += gap
    return sheet


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"


def font() -> Any:
    """The font of captions and legends."""
    return ImageFont.load_default(size=17)


def wrapped(text: str, width: int) -> list[str]:
    """`text` broken between words into lines of at most `width` px; at least one line."""
    face, lines = font(), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and face.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
