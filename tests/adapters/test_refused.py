"""Model types that are refused when they are patched, with a sentence that says why."""

from __future__ import annotations

import pytest
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


def test_patch_says_why():
    with pytest.raises(ValueError, match=r"type 'blip-2': a Q-Former .* learned queries .*; use .*\.$"):
        vtoken.patch(blip_2(), "random", budget=0.5)


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
