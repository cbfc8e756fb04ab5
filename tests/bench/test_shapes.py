"""The shapes of the benchmark are the published ones, and every scale of each runs."""

from __future__ import annotations

import pytest
import torch

import vtoken
from vtoken.bench.shapes import PLACEHOLDER, SHAPES, build, shipped

# Visual tokens, and what the models' cards say: parameters of the LLM without embeddings.
PUBLISHED = {
    "llava-1.5-7b": (576, 6.48e9),
    "llava-next-7b": (2880 + 48, 6.48e9),  # 5 x 576 patches, one newline per row of the tiles
    "qwen2.5-vl-7b-image": (1296, 6.53e9),
    "qwen2.5-vl-7b-video": (16 * 196, 6.53e9),
    "qwen3-vl-8b-video": (16 * 144, 6.95e9),
    "llava-onevision-7b-video": (32 * 196 + 1, 6.53e9),
}
# CLIP ViT-L/14 at 336, the 600M-class ViT of Qwen2.5-VL, SigLIP2-SO-400M of Qwen3-VL
TOWERS = {"llava": 0.30e9, "qwen2": 0.63e9, "qwen3": 0.41e9}


@pytest.mark.parametrize("name", SHAPES)
def test_full_scale_is_the_published_model(name):
    work = build(name, "full", device="meta")
    tokens, parameters = PUBLISHED[name]
    assert work.about["visual_tokens"] == int(work.inputs["input_ids"].shape[1]) - 48 == tokens
    layers = work.model.get_decoder().layers
    assert sum(p.numel() for p in layers.parameters()) == pytest.approx(parameters, rel=0.005)
    assert all(p.is_meta for p in work.model.parameters())
    if name.partition("-")[0] in TOWERS and "onevision" not in name:
        tower = getattr(work.model.base_model, "vision_tower", None) or work.model.base_model.visual
        blocks = next(m for n, m in tower.named_modules() if n.endswith(("layers", "blocks")))
        assert sum(p.numel() for p in blocks.parameters()) == pytest.approx(
            TOWERS[name.partition("-")[0]], rel=0.03
        )


@pytest.mark.parametrize("name", SHAPES)
def test_tiny_scale_runs_patched(name):
    work = build(name, "tiny")
    assert (work.inputs["input_ids"] == PLACEHOLDER).sum() == work.about["visual_tokens"]
    with torch.inference_mode(), vtoken.applied(work.model, "uniform", budget=0.5):
        out = work.model(**work.inputs)
        assert vtoken.report(work.model).tokens_in == work.about["visual_tokens"]
    assert out.logits.isfinite().all()


def test_weights_and_prompts_are_the_same_every_time():
    a, b = (build("llava-1.5-7b", "tiny") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters()))
    assert all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)


def test_the_shipped_model_is_a_workload_too():
    work = shipped(None)
    assert work.name == "tiny-llava" and work.about["prompt_tokens"] == work.inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("name", "scale", "words"), [("llava", "tiny", "llava-1.5-7b"), ("llava-1.5-7b", "big", "tiny")]
)
def test_what_is_unknown_is_refused_with_what_there_is(name, scale, words):
    with pytest.raises(ValueError, match=words):
        build(name, scale)
