"""Sessions hand visual features to `generate`, which older releases of transformers do not take."""

from __future__ import annotations

from transformers import GenerationMixin

collect_ignore_glob: list[str] = []
if not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation"):
    collect_ignore_glob = ["test_[!m]*.py"]
