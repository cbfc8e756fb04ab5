"""`Needs.question_attention`: how the prompt's last token looks at the visual tokens in a layer of the LLM."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import pytest
import torch

import vtoken
from tests.mechanism.common import PATCHABLE
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken import Needs, Selection, Strategy

from .test_other_llms import over

SEEN: list = []


@dataclass
class Looks(Strategy):
    _: KW_ONLY
    depth: float = 0.5

    def needs(self, tower):
        return Needs(question_attention=self.depth)

    def select(self, tokens):
        SEEN.append(tokens)
        return Selection(torch.arange(3, device=tokens.cells.device))


Looks.info = vtoken.StrategyInfo("looks", "For tests.", ("projector",), cls=Looks)


def by_hand(model, ids, features, index):
    """From the hidden states of the whole LLM and the weights of one layer alone."""
    decoder = model.get_decoder()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)[None]
        entering = decoder(inputs_embeds=embeds, output_hidden_states=True).hidden_states[index][0, -1]
        layer = decoder.layers[index]
        attention, width = layer.self_attn, layer.self_attn.head_dim
        q, k = layer.input_layernorm(entering) @ attention.q_proj.weight.T, layer.input_layernorm(features)
        k = k @ attention.k_proj.weight.T
        if attention.q_proj.bias is not None:
            q, k = q + attention.q_proj.bias, k + attention.k_proj.bias
        q, k = q.reshape(-1, width), k.reshape(len(k), -1, width)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        group = len(q) // k.shape[1]
        return torch.stack([(k[:, h // group] @ q[h]) * width**-0.5 for h in range(len(q))])


@pytest.mark.parametrize("depth, index", [(0.0, 0), (0.5, None), (0.99, -1)])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_it_is_the_product_of_the_layers_own_projections(name, depth, index):
    model, inputs = FAMILIES[name].build(dtype=torch.float64), FAMILIES[name].batch("ragged")
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    count = len(model.get_decoder().layers)
    index = round(depth * count) if index is None else range(count)[index]
    SEEN.clear()
    with vtoken.applied(model, Looks(depth=depth)):
        pruned = model(**clone(inputs)).logits
    assert pruned.isfinite().all()
    visual = FAMILIES[name].visual(inputs)
    rows = [b for b, row in enumerate(visual) if row.any()]
    assert len(SEEN) >= len(rows)
    for tokens in SEEN:
        wanted = [
            by_hand(model, inputs["input_ids"][b][inputs["attention_mask"][b].bool() & ~visual[b]],
                    tokens.features, index)
            for b in rows
        ]  # fmt: skip
        got = tokens.question_attention.double()
        assert min((got - w).abs().max() for w in wanted) < 1e-5 * max(w.abs().max() for w in wanted)


def test_a_model_without_such_projections_is_refused_at_patch_time():
    model = FAMILIES["llava"].build()
    del model.get_decoder().layers[0].input_layernorm
    with pytest.raises(
        ValueError, match="q_proj, k_proj and input_layernorm, which this llava model does not"
    ):
        vtoken.patch(model, Looks())
    with pytest.raises(ValueError, match=r"pass relevance=0\.0 to read no text, or use"):
        vtoken.patch(model, "farcover")


@pytest.mark.skipif("granite4_vision" not in PATCHABLE, reason="transformers without it")
def test_features_of_several_layers_do_not_enter_one():
    model, inputs = FAMILIES["granite4_vision"].build(), FAMILIES["granite4_vision"].batch("ragged")
    with pytest.raises(ValueError, match="which this granite4_vision model does not have"):
        vtoken.patch(model, Looks())
    assert "farcover" not in vtoken.list_strategies(model=model)
    with torch.no_grad():
        patched = vtoken.patch(model, "farcover", budget=0.4, relevance=0.0)
        assert patched(**clone(inputs)).logits.isfinite().all()
    assert vtoken.kept_tokens(model).sum() < inputs["attention_mask"].sum()


def test_a_compiled_language_model_is_read_as_well():
    inputs, (plain, compiled) = FAMILIES["llava"].batch("one"), [FAMILIES["llava"].build() for _ in range(2)]
    compiled.model.language_model = torch.compile(compiled.model.language_model, backend="eager")
    with torch.no_grad():
        wanted, got = (
            vtoken.patch(m, "farcover", budget=0.4)(**clone(inputs)).logits for m in (plain, compiled)
        )
    assert torch.allclose(got, wanted, atol=1e-5)


def test_norms_without_weights():
    model, inputs = over("olmo"), FAMILIES["llava"].batch("one")
    SEEN.clear()
    with torch.no_grad(), vtoken.applied(model, Looks()):
        model(**clone(inputs))
    (tokens,) = SEEN
    text = inputs["input_ids"][~FAMILIES["llava"].visual(inputs)]
    assert torch.allclose(tokens.question_attention, by_hand(model, text, tokens.features, 2), atol=1e-4)
