"""Gemma 3n: one square grid per image from a convolutional tower of timm."""

from __future__ import annotations

from .fast_vlm import FastVlmAdapter
from .registry import register_adapter


@register_adapter
class Gemma3nAdapter(FastVlmAdapter):
    """`Gemma3nForConditionalGeneration`. Audio tokens are no visual tokens and always stay."""

    model_types = ("gemma3n",)
