"""Tiny random models, one row per family and modality: ``FAMILIES["llava"].build()``, ``.batch("ragged")``.

A new family is one more ``Family(...)`` in one of the files beside this one. Nothing is downloaded. Families that the installed
release of transformers lacks are left out.
"""

from __future__ import annotations

from . import (
    clip,
    cohere,
    deepseek,
    ernie,
    gemma,
    glm,
    hybrid,
    kimi,
    minicpm,
    molmo,
    ocr,
    omni,
    packed,
    queries,
    qwen,
    siglip,
    step,
    timm,
)
from .common import KINDS, SPECIAL, Family, Item

ROWS = [
    module.FAMILIES
    for module in (
        clip,
        siglip,
        qwen,
        hybrid,
        glm,
        cohere,
        timm,
        ocr,
        packed,
        ernie,
        omni,
        gemma,
        step,
        molmo,
        minicpm,
        kimi,
        deepseek,
        queries,
    )
]
FAMILIES: dict[str, Family] = {
    f.name if f.modality == "image" else f"{f.name}/{f.modality}": f for rows in ROWS for f in rows if f.runs
}


__all__ = ["FAMILIES", "KINDS", "SPECIAL", "Family", "Item"]
