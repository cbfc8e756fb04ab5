"""Model types that are refused when they are patched, with a sentence that says why."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import vtoken
from tests.models.common import IMG, LM, VIT
from vtoken.adapters.refused import REASONS, reason
from vtoken.adapters.registry import list_families


def blip_2():
    former = tf.Blip2QFormerConfig(**VIT, vocab_size=50, encoder_hidden_size=32)
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**VIT, image_size=28, patch_size=7),
        qformer_config=former,
        text_config=tf.LlamaConfig(**LM),
        num_query_tokens=4,
        image_token_id=IMG,
    )
    return tf.Blip2ForConditionalGeneration(config)


def mllama():
    lm = {k: v for k, v in LM.items() if k != "max_position_embeddings"}
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_global_layers=1)
    vision |= dict(attention_heads=4, image_size=28, patch_size=7, max_num_tiles=2, vision_output_dim=64)
    vision |= dict(intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1], [1, 2]])
    text = tf.MllamaConfig.sub_configs["text_config"](**lm, cross_attention_layers=[1])
    return tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=100)


def test_patch_says_why():
    with pytest.raises(ValueError, match=r"type 'blip-2': a Q-Former .* learned queries .*; use .*\.$"):
        vtoken.patch(blip_2(), "random", budget=0.5)


@pytest.mark.parametrize("adapter", [None, "generic"])
def test_a_model_that_reads_pictures_by_cross_attention(adapter):
    model = tf.MllamaForConditionalGeneration(mllama()).eval()
    for call in (vtoken.patch, lambda m, s, adapter: vtoken.list_strategies(model=m, adapter=adapter)):
        with pytest.raises(ValueError, match="reads pictures by cross-attention"):
            call(model, "uniform", adapter=adapter)
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 5, 6]])).logits.shape == (1, 3, LM["vocab_size"])


@pytest.mark.parametrize("model_type", REASONS)
def test_a_reason_is_one_sentence(model_type):
    sentence = reason(model_type)
    assert sentence.endswith(".") and sentence.count(". ") == 0 and repr(model_type) in sentence
    assert model_type not in list_families()


@pytest.mark.parametrize(
    "cls", ["Blip2", "InstructBlip", "InstructBlipVideo", "Florence2", "Kosmos2", "Kosmos2_5"]
)
def test_types_are_those_of_transformers(cls):
    assert getattr(tf, f"{cls}Config").model_type in REASONS


def test_other_types_have_no_reason():
    assert reason("llava") is None and reason("unheard_of") is None
