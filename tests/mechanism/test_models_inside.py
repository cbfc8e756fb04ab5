"""Modules of any class around one vision-language model, models without head, and what holds no model at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone

from .common import BOTH, EFFECT, PATCHABLE, SOME, assert_close, clean, expected, run, subject
from .fixed import Fixed, Spy, patched
from .test_isolation import traces


class ValueHead(nn.Module):
    """Shaped as trl's `AutoModelForCausalLMWithValueHead`."""

    def __init__(self, model) -> None:
        super().__init__()
        self.pretrained_model, self.config = model, model.config
        self.v_head = nn.Linear(32, 1)

    def forward(self, **inputs):
        out = self.pretrained_model(**inputs, output_hidden_states=True)
        return out.logits, self.v_head(out.hidden_states[-1]).squeeze(-1)

    def generate(self, **inputs):
        return self.pretrained_model.generate(**inputs)


class Embedder(nn.Module):
    """Shaped as VLM2Vec's model: the last token of a row, on either side of the padding, is its embedding."""

    def __init__(self, encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: dict):
        states = self.encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        mask = inputs["attention_mask"]
        last = torch.arange(mask.shape[1]).where(mask.bool(), -1).amax(1)
        return nn.functional.normalize(states[torch.arange(len(states)), last], dim=-1)


class Transformer(nn.Module):
    """Shaped as the first module of a SentenceTransformer."""

    def __init__(self, model) -> None:
        super().__init__()
        self.auto_model = model

    def forward(self, features: dict):
        given = {k: v for k, v in features.items() if k != "prompt"}
        return features | {"token_embeddings": self.auto_model(**given).last_hidden_state}


class Pooling(nn.Module):
    def forward(self, features: dict):
        return features | {"sentence_embedding": features["token_embeddings"][:, -1]}


class ScoreHead(transformers.PreTrainedModel):
    """A head of the user's own on a body that has none, with a config class of its own."""

    config_class = transformers.PretrainedConfig

    def __init__(self, body) -> None:
        super().__init__(transformers.PretrainedConfig())
        self.body, self.score = body, nn.Linear(32, 3)

    def forward(self, **inputs):
        return self.score(self.body(**inputs).last_hidden_state[:, -1])


def last_states(name: str, inputs: dict, spy: Spy) -> torch.Tensor:
    """(B, d) the oracle's last states: those that the head of the LLM maps to its first logits."""
    return expected(name, inputs, spy, 1)[1][0]


def right_padded(inputs: dict) -> dict:
    """The same rows with the padding after them."""
    mask = inputs["attention_mask"].bool()
    order = torch.argsort(~mask, dim=1, stable=True)
    rolled = {k: v.gather(1, order) for k, v in inputs.items() if v.shape == mask.shape}
    return inputs | rolled


# -- heads that read hidden states ---------------------------------------------------------------------------
@pytest.mark.parametrize("options", [dict(), BOTH], ids=["before", "both"])
@pytest.mark.parametrize("name", SOME)
def test_value_head(name, options):
    torch.manual_seed(0)
    wrapper, inputs = ValueHead(FAMILIES[name].build()).eval(), FAMILIES[name].batch("ragged")
    keys, traced, spy = list(wrapper.state_dict()), traces(wrapper), Spy(Fixed(**options))
    with torch.no_grad():
        dense = wrapper(**clone(inputs))
        assert vtoken.patch(wrapper, spy.strategy) is wrapper
        logits, values = wrapper(**clone(inputs))
        assert_close(logits[:, -1], last_states(name, inputs, spy))
        assert logits.shape[:2] == values.shape == inputs["input_ids"].shape
        body = wrapper.pretrained_model(**clone(inputs), output_hidden_states=True)
        assert torch.equal(body.hidden_states[-1], wrapper.pretrained_model.base_model(**clone(inputs))[0])
        assert torch.equal(wrapper.v_head(body.hidden_states[-1])[..., 0], values)
        assert (values - dense[1]).abs().max() > EFFECT
        assert vtoken.report(wrapper).tokens_in == vtoken.report(wrapper.pretrained_model).tokens_in > 0
        with vtoken.disabled(wrapper):
            assert torch.equal(wrapper(**clone(inputs))[1], dense[1])
        assert list(wrapper.state_dict()) == keys
        assert vtoken.list_strategies(model=wrapper) == vtoken.list_strategies(model=wrapper.pretrained_model)
        with pytest.raises(ValueError, match="patched with fixed already"):
            vtoken.patch(wrapper.pretrained_model, "random")
        vtoken.unpatch(wrapper)
        assert torch.equal(wrapper(**clone(inputs))[1], dense[1])
    assert {n: t for n, t in traces(wrapper).items() if not t[1]} == {
        n: t for n, t in traced.items() if not t[1]
    }
    assert wrapper.generate(**clone(inputs), max_new_tokens=1).shape[0] == 2


@pytest.mark.parametrize("options", [dict(), BOTH], ids=["before", "both"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_embeddings_of_the_last_token(name, side, options):
    """The state of the last token, whether the encoder has a head or not, on both sides of the padding."""
    inputs = FAMILIES[name].batch("ragged")
    if side == "right":
        inputs = right_padded(inputs)
    for body in (FAMILIES[name].build(), FAMILIES[name].build().base_model):
        wrapper, head = Embedder(body).eval(), clean(name).get_output_embeddings()
        with torch.no_grad(), patched(wrapper, **options) as spy:
            got = wrapper(clone(inputs))
        want, whole = last_states(name, inputs, spy), FAMILIES[name].build()
        with torch.no_grad(), patched(whole, **options):
            one = whole.base_model(**clone(FAMILIES[name].batch("ragged"))).last_hidden_state[:, -1]
        assert_close(head(one), want)
        assert_close(got, nn.functional.normalize(one, dim=-1))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_sentence_transformers(name):
    inputs = FAMILIES[name].batch("ragged")
    wrapper = nn.Sequential(Transformer(FAMILIES[name].build().base_model), Pooling()).eval()
    with torch.no_grad(), patched(wrapper) as spy:
        got = wrapper(clone(inputs) | {"prompt": "a text"})["sentence_embedding"]
        assert_close(clean(name).get_output_embeddings()(got), last_states(name, inputs, spy))
        assert vtoken.report(wrapper).tokens_out < vtoken.report(wrapper).tokens_in
    with torch.no_grad():
        assert torch.equal(
            wrapper(clone(inputs))["sentence_embedding"], clean(name).base_model(**clone(inputs))[0][:, -1]
        )


def test_streams_of_a_wrapper():
    name, states = "llava_onevision/video", []
    for wrap in (lambda m: m, ValueHead):
        model = wrap(FAMILIES[name].build())
        vtoken.patch(model, "stc_cacher", budget=0.3)
        with vtoken.stream(model) as state:
            model(**FAMILIES[name].batch("one"))
        states.append((state.frames, state.recomputed))
    assert states[0] == states[1] and states[0][0] > 0


# -- heads of classifiers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", ["own", "transformers"])
def test_classifiers(make):
    """A head of the user's own around a body, and transformers' for Gemma 3: one score per row."""
    name = "llava" if make == "own" else "gemma3"
    inputs, torch_seed = FAMILIES[name].batch("ragged"), torch.manual_seed(0)
    if make == "own":
        model = ScoreHead(FAMILIES[name].build().base_model).eval()
        body, head, scores = model.body, model.score, lambda: model(**clone(inputs))
    else:
        config = FAMILIES[name].config()
        config.num_labels = config.text_config.num_labels = 3
        config.pad_token_id = config.text_config.pad_token_id = 0
        model = transformers.Gemma3ForSequenceClassification(config).eval()
        model.model.load_state_dict(FAMILIES[name].build().model.state_dict())
        body, head, scores = model.model, model.score, lambda: model(**clone(inputs)).logits
    with torch.no_grad():
        dense = scores()
        with patched(model) as spy:
            got = scores()
            states = body(**clone(inputs)).last_hidden_state[:, -1]
        spy.items = spy.items[: len(spy.items) // 2]
        assert_close(got, head(states))
        assert_close(clean(name).get_output_embeddings()(states), last_states(name, inputs, spy))
        assert (got - dense).abs().max() > EFFECT / 10 and torch.equal(scores(), dense)
    del torch_seed


# -- models without their head -------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [dict(), BOTH], ids=["before", "both"])
@pytest.mark.parametrize("name", [n for n in PATCHABLE if n in (*SOME, "llava_next", "internvl", "qwen2_vl")])
def test_models_without_head(name, options):
    """What AutoModel gives: `last_hidden_state` has the prompt's length, `kept_tokens` tells what was read."""
    whole, inputs = FAMILIES[name].build(), FAMILIES[name].batch("ragged")
    model = transformers.AutoModel.from_config(whole.config, attn_implementation="sdpa").eval()
    assert type(model) is type(whole.base_model) and model.base_model is model
    model.load_state_dict(whole.base_model.state_dict())
    with torch.no_grad():
        dense = model(**clone(inputs)).last_hidden_state
        with patched(model, **options) as spy:
            states = model(**clone(inputs)).last_hidden_state
            kept = vtoken.kept_tokens(model)
        assert torch.equal(model(**clone(inputs)).last_hidden_state, dense)
    assert states.shape == dense.shape and kept.shape == inputs["input_ids"].shape
    assert_close(clean(name).get_output_embeddings()(states[:, -1]), last_states(name, inputs, spy))
    keep, _ = spy.in_front(FAMILIES[name], inputs)
    drop, _ = spy.inside(FAMILIES[name], inputs, keep)
    for layer in drop.values():
        keep = keep & layer
    assert torch.equal(kept, keep & inputs["attention_mask"].bool())
    for row, mine in zip(states, kept, strict=True):  # other columns repeat the kept one before them
        assert len(row[mine].unique(dim=0)) == int(mine.sum())
        assert len(row[int(mine.long().argmax()) :].unique(dim=0)) == int(mine.sum())


def test_kept_tokens_of_calls_that_drop_nothing():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("ragged")
    with pytest.raises(ValueError, match="not patched"):
        vtoken.kept_tokens(model)
    vtoken.patch(model, "divprune", budget=0.3)
    with pytest.raises(ValueError, match="has not read visual tokens"):
        vtoken.kept_tokens(model)
    model(**clone(inputs))
    assert int(vtoken.kept_tokens(model).sum()) == vtoken.report(model).tokens_per_layer[-1]
    vtoken.unpatch(model)
    vtoken.patch(model, "divprune", budget=1.0)
    model(**clone(inputs))
    assert torch.equal(vtoken.kept_tokens(model), inputs["attention_mask"].bool())


# -- refusals ------------------------------------------------------------------------------------------------
def test_two_models_in_one_wrapper():
    two = nn.ModuleDict({"policy": FAMILIES["llava"].build(), "reference": FAMILIES["llava"].build()})
    with pytest.raises(ValueError, match=r"holds 2 .*\(policy, reference\).*get_submodule\('policy'\)"):
        vtoken.patch(two, "random")
    assert vtoken.patch(two.get_submodule("policy"), "random") is two["policy"]


def test_a_wrapper_that_holds_model_and_body():
    model = FAMILIES["llava"].build()
    both = nn.ModuleDict({"body": model.base_model, "whole": model, "tower": model.base_model.vision_tower})
    vtoken.patch(both, "random", budget=0.3)
    with pytest.raises(ValueError, match="patched with random already"):
        vtoken.patch(model, "random")
    vtoken.unpatch(both)
    assert "generate" not in model.__dict__


def text_model(cls: str):
    return getattr(transformers, cls)(FAMILIES["llava"].config().text_config)


REFUSED = {
    "a text model": (lambda: text_model("LlamaForCausalLM"), ValueError, "reads no images or videos"),
    "its body": (lambda: text_model("LlamaModel"), ValueError, "reads no images or videos"),
    "the LLM of a model": (lambda: subject("llava").get_decoder(), ValueError, "reads no images or videos"),
    "its vision tower": (lambda: subject("llava").base_model.vision_tower, ValueError, "encoder without one"),
    "a wrapper of a text model": (lambda: ValueHead(text_model("LlamaForCausalLM")), TypeError, "ValueHead"),
    "a pipeline": (lambda: SimpleNamespace(model=subject("llava")), TypeError, r"pass its \.model"),
    "a processor": (
        lambda: transformers.CLIPImageProcessor(),
        TypeError,
        "CLIPImageProcessor.*from_pretrained",
    ),
    "a model id": (lambda: "llava-hf/llava-1.5-7b-hf", TypeError, "'llava-hf/llava-1.5-7b-hf': load it"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_holds_no_model(what):
    make, error, words = REFUSED[what]
    thing = make()
    with pytest.raises(error, match=words) as raised:
        vtoken.patch(thing, "divprune", budget=0.3)
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".") and message.count(". ") == 0
    assert vtoken.unpatch(thing) is thing


def test_bare_clip():
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=sizes, vision_config=sizes))
    with pytest.raises(ValueError, match=r"CLIPModel is an encoder without one: use .*tome"):
        vtoken.patch(clip, "divprune")


def test_generate_through_a_wrapper():
    name, inputs = "llava", FAMILIES["llava"].batch("ragged")
    wrapper = ValueHead(FAMILIES[name].build())
    with patched(wrapper) as spy:
        out = run(wrapper, inputs, 3)
    ids, _ = expected(name, inputs, spy, 3)
    assert out.sequences[:, inputs["input_ids"].shape[1] :].tolist() == ids.tolist()
