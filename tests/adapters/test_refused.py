"""Model types that cannot be pruned: a sentence before anything is put on the model."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import vtoken
from tests.models.common import LM
from vtoken.adapters.refused import REFUSED, check_served
from vtoken.adapters.registry import list_families


def mllama():
    lm = {k: v for k, v in LM.items() if k != "max_position_embeddings"}
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_global_layers=1)
    vision |= dict(attention_heads=4, image_size=28, patch_size=7, max_num_tiles=2, vision_output_dim=64)
    vision |= dict(intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1], [1, 2]])
    text = tf.MllamaConfig.sub_configs["text_config"](**lm, cross_attention_layers=[1])
    return tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=100)


@pytest.mark.parametrize("name", REFUSED)
def test_reason_and_what_would_work(name):
    assert name not in list_families()
    with pytest.raises(ValueError, match=rf"vtoken cannot prune {name}: its LLM .*; use a model .*\.$"):
        check_served(name)


def test_a_model_that_reads_pictures_by_cross_attention():
    model = tf.MllamaForConditionalGeneration(mllama()).eval()
    for call in (vtoken.patch, lambda m, s: vtoken.list_strategies(model=m)):
        with pytest.raises(ValueError, match="reads pictures by cross-attention"):
            call(model, "uniform")
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 5, 6]])).logits.shape == (1, 3, LM["vocab_size"])
