"""Plain `forward(pixel_values=...)`: shapes, losses, gradients, attentions, hand-written loops."""

from __future__ import annotations

import inspect

import pytest
import torch

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.oracle import CACHE, clone, pick
from vtoken.mechanism import transformers_names
from vtoken.mechanism.layer_hooks import HOOKS_INSIDE_CHECKPOINT
from vtoken.mechanism.recurrent_states import counting_layers

from .common import (
    BOTH,
    FRONT,
    INSIDE,
    PATCHABLE,
    SOME,
    assert_close,
    assert_moved,
    assert_same,
    checkpointing,
    clean,
    everywhere,
    expected,
    run,
    subject,
)
from .fixed import patched


def labels_of(family, inputs: dict) -> torch.Tensor:
    """The text of every row but its first token, which has nothing in front of it."""
    labels = inputs["input_ids"].masked_fill(family.visual(inputs) | (inputs["attention_mask"] == 0), -100)
    labels[torch.arange(len(labels)), inputs["attention_mask"].argmax(1)] = -100
    return labels


def right_padded(inputs: dict) -> dict:
    """Padding moved behind the prompts, as in training."""
    out = dict(inputs)
    shift = (inputs["attention_mask"] == 0).sum(1).tolist()
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            out[key] = torch.stack([row.roll(-n) for row, n in zip(inputs[key], shift)])
    return out


@pytest.mark.parametrize(("name", "side"), [(n, "right") for n in PATCHABLE] + [(n, "left") for n in SOME])
def test_loss_and_gradients(name, side):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    inputs = inputs if side == "left" else right_padded(inputs)
    labels = labels_of(family, inputs)
    whole = torch.ones_like(labels).bool()
    with torch.no_grad():
        dense = clean(name)(**clone(inputs), labels=labels, use_cache=False)
        if (oracle.loss(clean(name), inputs, labels, whole) - dense.loss).abs() > 1e-4 * dense.loss:
            pytest.skip("the unpatched model's loss is not that of its rows")
    with patched(model, merge=side == "left") as spy:
        out = model(**clone(inputs), labels=labels, use_cache=False)
    keep, merge = spy.in_front(family, inputs, labels)
    want = oracle.loss(clean(name), inputs, labels, keep, merge)
    assert_close(out.loss, want)
    assert (want - dense.loss).abs() > 1e-4 * dense.loss
    assert out.logits.shape == dense.logits.shape
    for where in ("layers.1.mlp.up_proj.weight", "layers.3.self_attn.q_proj.weight"):
        parameters = (
            dict(model.get_decoder().named_parameters()),
            dict(clean(name).get_decoder().named_parameters()),
        )
        if where in parameters[0]:
            got, ref = (
                torch.autograd.grad(x, p[where], retain_graph=True)[0]
                for x, p in zip((out.loss, want), parameters)
            )
            assert_close(got, ref)
    assert_close(
        torch.autograd.grad(out.loss, first_projection(model))[0],
        torch.autograd.grad(want, first_projection(clean(name)))[0],
    )


def first_projection(model) -> torch.nn.Parameter:
    """A weight on the way of every visual token: gradients must reach through the gathering."""
    return model.get_input_embeddings().weight


@everywhere(before=FRONT)
def test_loop_by_hand(name, options):
    """No generate(), no position_ids, no mask: what remains is the cache's own length."""
    family, model = FAMILIES[name], subject(name)
    if not family.makes_cache:
        pytest.skip("the unpatched model makes no cache of its own")
    inputs = family.batch("one")
    if not family.needs_mask:
        inputs.pop("attention_mask")
    whole = family.batch("one")
    keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    @torch.no_grad()
    def loop(model):
        out = model(**clone(inputs), use_cache=True, logits_to_keep=1)
        assert out.logits.shape[1] == 1 or not keeps  # Video-LLaMA 3 has no such option
        ids = [pick(out.logits[:, -1])]
        for _ in range(3):
            out = model(input_ids=ids[-1][:, None], **{CACHE: out[CACHE]}, use_cache=True)
            ids.append(pick(out.logits[:, -1]))
        return torch.stack(ids, 1), out[CACHE]

    if not torch.equal(loop(clean(name))[0], oracle.generate(clean(name), whole, steps=4)[0]):
        pytest.skip("the unpatched model disagrees with itself")
    with patched(model, **options) as spy:
        ids, cache = loop(model)
    assert ids.tolist() == expected(name, whole, spy, 4)[0].tolist()
    length, stored = whole["input_ids"].shape[1] + 3, [x.keys.shape[2] for x in counting_layers(cache)]
    assert int(cache.get_seq_length()) == length and max(stored) < length


@pytest.mark.parametrize("name", SOME)
def test_both_doors_agree(name):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("one")
    with patched(model) as spy, torch.no_grad():
        a = run(model, inputs, 1).logits[0]
        one = model(**clone(inputs))
        as_tuple = model(**clone(inputs), return_dict=False)
        last_two = model(**clone(inputs), logits_to_keep=2).logits
    assert len(spy.items) == 4
    assert one.logits.shape[:2] == inputs["input_ids"].shape
    assert_close(one.logits[:, -1], a)
    assert torch.equal(as_tuple[0], one.logits)
    assert_close(last_two, one.logits[:, -2:])


@pytest.mark.parametrize("name", SOME)
def test_inputs_embeds(name):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    embeds = {k: v for k, v in inputs.items() if k != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def answer(model):
        out = run(model, embeds)
        return out.sequences, torch.stack(out.logits)

    ids, logits = oracle.generate(clean(name), inputs)
    try:
        sequences, plain = answer(clean(name))
        assert sequences.tolist() == ids.tolist()
        assert_close(plain, logits)
    except Exception:
        pytest.skip("the unpatched model disagrees with itself")
    with patched(model) as spy:
        if name == "idefics3":  # which picture a tile belongs to is written between the tiles
            with pytest.raises(NotImplementedError, match="found a prompt of embeddings: pass input_ids"):
                answer(model)
            return
        sequences, got = answer(model)
    ids, logits = expected(name, inputs, spy)
    assert sequences.tolist() == ids.tolist()
    assert_close(got, logits)


@pytest.mark.parametrize("name", INSIDE)
def test_attentions_and_hidden_states(name):
    family = FAMILIES[name]
    inputs, model = family.batch("ragged"), subject(name, "eager")
    with patched(model, **BOTH) as spy:
        out = run(model, inputs, output_attentions=True, output_hidden_states=True)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)
    keep, _ = spy.in_front(family, inputs)
    drop, _ = spy.inside(family, inputs, keep)
    real = inputs["attention_mask"].bool()
    lengths = [int((keep & real & (drop[2] if i >= 2 else True)).sum(1).max()) for i in range(4)]
    assert [a.shape[2] for a in out.attentions[0]] == lengths
    for attention in out.attentions[0]:
        row = attention[:, :, -1].sum(-1)
        assert_close(row, torch.ones_like(row))
    assert len(out.hidden_states[0]) == 5


@pytest.mark.parametrize("training", [False, True])
@everywhere(before=FRONT)
def test_without_gradients_in_training_mode(name, options, training):
    """With gradient checkpointing, too: from transformers 5.24 on, a model in training mode caches where
    gradients are off.
    """
    if training and options.get("layers") and HOOKS_INSIDE_CHECKPOINT:
        pytest.skip("refused on this transformers")
    family, model = FAMILIES[name], checkpointing(FAMILIES[name].build()).train(training)
    if training and any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()):
        pytest.skip("its tower has other features in training mode")
    inputs = family.batch("one")
    prompt = {k: v for k, v in inputs.items() if k != "attention_mask" or family.needs_mask}
    with patched(model, **options) as spy, torch.no_grad():
        out = model(**clone(prompt), use_cache=True)
        logits, cache = [out.logits[:, -1]], out.get(CACHE)
        if cache is None or not cache.get_seq_length():  # SmolVLM of 5.23 returns the one it did not fill
            assert training or not family.makes_cache
        else:
            assert {int(x.get_seq_length()) for x in counting_layers(cache)} == {inputs["input_ids"].shape[1]}
            more = dict(input_ids=pick(logits[0])[:, None])
            if "mm_token_type_ids" in inputs:  # Molmo2 demands them in training mode
                more["mm_token_type_ids"] = torch.zeros_like(more["input_ids"])
            logits.append(model(**more, **{CACHE: cache}).logits[:, -1])
    assert_close(torch.stack(logits), expected(name, inputs, spy, len(logits))[1])


def test_numbers_per_token_that_are_not_shortened(monkeypatch):
    """Of a language model that reads ids beside embeddings; what it only hands on, such as labels, is none."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].batch("one")
    decoder = model.get_decoder()
    forward = decoder.forward

    def reads(inputs_embeds=None, attention_mask=None, position_ids=None, ngram_ids=None, **kwargs):
        return forward(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )

    monkeypatch.setattr(transformers_names, "cache_argument", lambda function: CACHE)
    ids = dict(ngram_ids=inputs["input_ids"])
    decoder.register_forward_pre_hook(lambda module, args, given: (args, given | ids), with_kwargs=True)
    with vtoken.applied(model, "random"):
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    decoder.forward = reads
    with vtoken.applied(model, "random"), pytest.raises(NotImplementedError, match="given ngram_ids, a"):
        model(**inputs)


@pytest.mark.parametrize("options", [FRONT, BOTH], ids=["before", "both"])
@pytest.mark.parametrize("expert", ["qwen3_vl_moe", "glm4v_moe"])
@torch.no_grad()
def test_the_load_balancing_loss_counts_the_tokens_that_are_read(expert, options):
    """The model's head counts them by attention_mask, which has all tokens of the prompt."""
    model, inputs = subject(expert), FAMILIES[expert].batch("one")
    with patched(model, **options):
        with pytest.raises(
            NotImplementedError, match="mixture of experts counts every token of attention_mask"
        ):
            model(**clone(inputs), output_router_logits=True)
        out = model(
            **{k: x for k, x in clone(inputs).items() if k != "attention_mask"}, output_router_logits=True
        )
        kept = vtoken.report(model).tokens_per_layer
        assert [len(x) for x in out.router_logits] == kept[-len(out.router_logits) :] and out.aux_loss > 0
    assert model(**clone(inputs), output_router_logits=True).aux_loss > 0


@torch.no_grad()
def test_a_cache_strategy_that_drops_nothing_leaves_the_load_balancing_loss_as_it_is():
    model, inputs = subject("qwen3_vl_moe"), FAMILIES["qwen3_vl_moe"].batch("one")
    want = model(**clone(inputs), output_router_logits=True).aux_loss
    with vtoken.applied(model, "vidkv", group=1024, residual=1024):
        assert_close(model(**clone(inputs), output_router_logits=True).aux_loss, want)
        ragged = FAMILIES["qwen3_vl_moe"].batch("ragged")
        with pytest.raises(NotImplementedError, match="mixture of experts counts every token"):
            model(**clone(ragged), output_router_logits=True)
