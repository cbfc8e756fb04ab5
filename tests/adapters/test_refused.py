"""Model types that are refused when they are patched, with a sentence that says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf

import vtoken
from tests.models import FAMILIES
from tests.models.common import IMG, LM, VIT
from vtoken.adapters import registry
from vtoken.adapters.base import language_model_of
from vtoken.adapters.encoders.encoder import encoder_for
from vtoken.adapters.refused import LANGUAGE_MODELS, REASONS, language_model_reason, reason
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


@pytest.mark.parametrize("strategy", ["random", "tome"])
def test_patch_says_why(strategy):
    model = blip_2()
    for call in (vtoken.patch, lambda m, s: vtoken.list_strategies(model=m)):
        with pytest.raises(ValueError, match=r"type 'blip-2': a Q-Former .* learned queries .*; use .*\.$"):
            call(model, strategy)


def index_of_keys():
    """LLaVA over an LLM that chooses among keys by an index."""
    size = {k: v for k, v in LM.items() if k != "num_key_value_heads"}
    ranks = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    index = dict(index_n_heads=2, index_head_dim=16, index_topk=8)
    experts = dict(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1
    )
    config = FAMILIES["llava"].config()
    config.text_config = tf.CONFIG_MAPPING["deepseek_v32"](**size, **ranks, **index, **experts)
    return config


@pytest.mark.skipif("deepseek_v32" not in tf.CONFIG_MAPPING, reason="this transformers has no such LLM")
@pytest.mark.parametrize("adapter", [None, "generic"])
def test_a_language_model_that_chooses_keys_by_an_index(adapter):
    model = tf.LlavaForConditionalGeneration(index_of_keys())
    for call in (vtoken.patch, lambda m, s, adapter: vtoken.list_strategies(model=m, adapter=adapter)):
        with pytest.raises(ValueError, match=r"type 'deepseek_v32': it chooses among keys by an index"):
            call(model, "divprune", adapter=adapter)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_language_models_that_are_refused(kind):
    decoder = torch.nn.Module()
    decoder.config = tf.PreTrainedConfig()
    decoder.config.model_type = kind
    assert LANGUAGE_MODELS[kind] in language_model_reason(decoder)
    assert kind in tf.CONFIG_MAPPING or tf.__version__ < "5.24"


def test_no_language_model_of_a_family_is_refused():
    for name, family in FAMILIES.items():
        assert language_model_reason(language_model_of(family.build())) is None, name


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
    sentence = reason(of_type(model_type))
    assert sentence.endswith(".") and sentence.count(". ") == 0 and repr(model_type) in sentence
    assert model_type not in list_families()


@pytest.mark.parametrize(
    "cls", ["Blip2", "InstructBlip", "InstructBlipVideo", "Florence2", "Idefics", "Kosmos2", "Kosmos2_5"]
)
def test_types_are_those_of_transformers(cls):
    assert getattr(tf, f"{cls}Config").model_type in REASONS


def of_type(model_type, **more):
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type, **more))


def test_other_types_have_no_reason():
    assert reason(of_type("llava")) is None and reason(of_type("unheard_of")) is None
    assert reason(SimpleNamespace()) is None
    assert "encoder-decoder" in reason(of_type("unheard_of", is_encoder_decoder=True))


def without_adapter(monkeypatch, name):
    """A model with pictures in its prompt, of a type that no adapter serves."""
    kind = FAMILIES[name].config().model_type
    list_families()
    monkeypatch.delitem(registry._adapters, kind)
    return FAMILIES[name].build()


@pytest.mark.parametrize("strategy", ["tome", "divprune"])
def test_a_type_without_adapter_is_no_plain_encoder(monkeypatch, strategy):
    """Though its tower is a plain encoder that vtoken knows."""
    model = without_adapter(monkeypatch, "llava")
    assert encoder_for(model) is not None
    for call in (vtoken.patch, lambda m, s: vtoken.list_strategies(model=m)):
        with pytest.raises(ValueError, match=r'no adapter for model type .llava.: pass adapter="generic"'):
            call(model, strategy)


def test_generic_is_offered_where_it_can_serve(monkeypatch):
    model = without_adapter(monkeypatch, "llava")
    monkeypatch.setattr(type(model.base_model), "get_image_features", property(lambda self: self.absent))
    for adapter in (None, "generic"):
        with pytest.raises(ValueError, match="the generic one needs get_image_features, which this model"):
            vtoken.patch(model, "divprune", adapter=adapter)


def test_a_plain_encoder_with_the_id_of_a_placeholder_is_one():
    model = tf.CLIPVisionModel(tf.CLIPVisionConfig(**VIT, image_size=28, patch_size=7))
    model.config.image_token_id = IMG
    assert "tome" in vtoken.list_strategies(model=model)
    vtoken.unpatch(vtoken.patch(model, "tome", r=2))


def test_a_model_that_is_its_own_language_model():
    """As Chameleon: pictures become ids, and no part reads embeddings alone."""
    model = FAMILIES["llava"].build()
    model.config.model_type = "unheard_of"
    model.get_decoder = lambda: model.base_model
    for adapter in (None, "generic"):
        with pytest.raises(ValueError, match="a language model of its own that reads embeddings"):
            vtoken.patch(model, "uniform", adapter=adapter)


def test_a_window_after_the_prompt(monkeypatch):
    class Layer:
        def set_prefill_length(self, length):
            pass

    monkeypatch.setattr("vtoken.adapters.refused.cache_layers", lambda config: [Layer()])
    with pytest.raises(ValueError, match="keeps the prompt apart from a window of generated tokens"):
        vtoken.patch(FAMILIES["llava"].build(), "uniform")
