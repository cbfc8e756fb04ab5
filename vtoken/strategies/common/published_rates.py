"""The published rates of DiffRate (arXiv 2305.17997), and rates of their form for other encoders."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...tokens import EncoderShape

# for goals without learned rates: by depth, a published row whose form is kept
FORMS = {12: ("ViT-B-DeiT", "11.5"), 24: ("ViT-L-MAE", "42.3"), 32: ("ViT-H-MAE", "103.4")}


@functools.cache
def published() -> dict[str, Any]:
    """The published rates by model: tokens of an image, depth, per GFLOPs the tokens kept by every layer."""
    rows = json.loads(Path(__file__).with_name("diffrate_rates.json").read_text())
    return {name: row for name, row in rows.items() if isinstance(row, dict)}


def scaled(kept: Sequence[int], tokens: int, shape: EncoderShape, power: float) -> list[int]:
    """Kept tokens for another depth and number of patches, their shares raised to a power."""
    out = []
    for layer in range(shape.layers):
        at = layer / max(1, shape.layers - 1) * (len(kept) - 1)
        below, above = math.floor(at), math.ceil(at)
        share = (kept[below] + (kept[above] - kept[below]) * (at - below) - 1) / (tokens - 1)
        out.append(shape.prefix + max(1, round(share**power * shape.patches)))
    return out
