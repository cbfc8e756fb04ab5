"""Tiny random models, one row per family and modality: ``FAMILIES["llava"].build()``, ``.batch("ragged")``.

A new family is one more ``Family(...)`` in one of the files beside this one. Nothing is downloaded.
"""

from __future__ import annotations

from . import clip, glm, qwen, siglip
from .common import KINDS, SPECIAL, Family, Item

FAMILIES: dict[str, Family] = {
    f.name if f.modality == "image" else f"{f.name}/{f.modality}": f
    for f in [*clip.FAMILIES, *siglip.FAMILIES, *qwen.FAMILIES, *glm.FAMILIES]
}


__all__ = ["FAMILIES", "KINDS", "SPECIAL", "Family", "Item"]
