"""LLaVA over LLMs of other kinds: tokens go before them, and inside where their attention can be read."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import vtoken
from tests.models import FAMILIES
from tests.models.common import LM, randomize

from .common import assert_same, expected, run
from .fixed import Fixed, Spy

EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
OTHERS = {
    "gpt_oss": EXPERTS | dict(head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2),  # sinks
    "exaone4": dict(layer_types=["sliding_attention", "full_attention"] * 2),  # some layers without positions
    "olmo2": {},  # norms over all heads
    "doge": {},  # a learned mask
    "falcon": dict(new_decoder_architecture=True),  # layers under another name
    "gpt2": {},
    "opt": {},
}


def over(kind: str, **more):
    """LLaVA over a tiny LLM of another type, all weights random."""
    config = FAMILIES["llava"].config()
    size = dict(LM) if kind != "gpt2" else dict(vocab_size=LM["vocab_size"], n_embd=64, n_layer=4, n_head=8)
    config.text_config = tf.CONFIG_MAPPING[kind](**size | more)
    model = tf.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    return randomize(model).eval()


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind in tf.CONFIG_MAPPING])
def test_tokens_go_before_the_llm(kind):
    model, inputs = over(kind, **OTHERS[kind]), FAMILIES["llava"].batch("ragged")
    fit = vtoken.list_strategies(model=model)
    assert "uniform" in fit and not {"fastv", "pyramiddrop", "sparsevlm"} & set(fit)
    for strategy in ("fastv", "pyramiddrop"):
        with pytest.raises(ValueError, match=f"{strategy} (reads|drops inside) the LLM.*projector strategy"):
            vtoken.patch(model, strategy)
    spy = Spy(Fixed())
    clean = over(kind, **OTHERS[kind])
    with vtoken.applied(model, spy.strategy):
        out = run(model, inputs, 3)
    assert_same(out, inputs, expected("llava", inputs, spy, 3, model=clean))


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "mistral", "starcoder2"])
def test_rows_that_are_the_modules_own(kind):
    """The probe refuses no LLM whose rows are right; phi3 has one projection for all."""
    model = over(kind)
    if kind == "phi3":
        with pytest.raises(ValueError, match="no such projections"):
            vtoken.patch(model, "fastv")
        return
    inputs = FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "fastv", budget=0.25, layer=2), torch.no_grad():
        model(**inputs)
        kept = vtoken.kept_tokens(model)[0]
    visual = FAMILIES["llava"].visual(inputs)[0].nonzero()[:, 0]
    with torch.no_grad():
        row = model(**inputs, output_attentions=True).attentions[1][0].float().mean(0)[-1]
    count = int(kept[visual].sum())
    assert visual[kept[visual]].tolist() == visual[row[visual].topk(count).indices].sort().values.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_in_half_precision_are_no_other_attention(dtype):
    """Qwen2.5's keys have biases of hundreds, so that the rounding of a logit moves probabilities."""
    model = over("qwen2").to(dtype)
    generator = torch.Generator().manual_seed(0)
    for layer in model.get_decoder().layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            part.bias.data = (torch.randn(part.bias.shape, generator=generator) * 15).to(dtype)
    assert {"fastv", "pyramiddrop"} <= set(vtoken.list_strategies(model=model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", [kind for kind in ("gpt_oss", "exaone4", "olmo2") if kind in tf.CONFIG_MAPPING]
)
def test_other_attention_is_told_in_half_precision(kind, dtype):
    assert "fastv" not in vtoken.list_strategies(model=over(kind, **OTHERS[kind]).to(dtype))


def test_the_probe_leaves_the_model_as_it_is():
    model = over("qwen3")
    state, attention = torch.get_rng_state(), model.get_decoder().layers[0].self_attn
    config = attention.config
    vtoken.list_strategies(model=model)
    assert attention.config is config and config._attn_implementation == "eager"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["bloom", "mpt", "mamba"])
def test_llms_without_positions_or_slots(kind):
    model = over(kind)
    with pytest.raises(ValueError, match=f"before a language model of type '{kind}'"):
        vtoken.patch(model, "uniform")
