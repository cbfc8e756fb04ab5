"""Skips sessions on releases of transformers whose `generate` takes no visual features."""

from __future__ import annotations

from transformers import GenerationMixin

collect_ignore_glob: list[str] = []
if not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation"):
    collect_ignore_glob = ["test_[!m]*.py"]
