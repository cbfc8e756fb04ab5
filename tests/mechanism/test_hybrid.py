"""LLMs with layers that keep a state of fixed size: only kept tokens enter it, and the others count them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.models.common import text
from tests.oracle import CACHE, clone
from vtoken.mechanism.recurrent_states import layers_of_fixed_length

from .common import EFFECT, PATCHABLE, assert_same, clean, consistent, expected, recurrent, run, subject
from .fixed import Fixed, patched
from .test_turns import extend

RECURRENT = [name for name in PATCHABLE if not FAMILIES[name].inside and recurrent(name)]
PLAIN = ("input_ids", "attention_mask", "mm_token_type_ids")


def filled(name: str, model, kind: str = "one"):
    """A cache with a shortened prompt, and the prompt."""
    inputs = FAMILIES[name].batch(kind)
    with torch.no_grad():
        return model(**clone(inputs), use_cache=True)[CACHE], inputs


def states(cache) -> list[torch.Tensor]:
    layers = [layer for layer in cache.layers if hasattr(layer, "conv_states")]
    both = [s for x in layers for s in [*x.conv_states.values(), *x.recurrent_states.values()]]
    return [s.clone() for s in both if s is not None]


@pytest.mark.parametrize("name", RECURRENT)
def test_the_logical_length_is_kept_by_the_layers_that_have_one(name):
    with patched(model := subject(name)) as spy:
        cache, inputs = filled(name, model, "ragged")
    length = inputs["input_ids"].shape[1]
    kept = spy.in_front(FAMILIES[name], inputs)[0] & inputs["attention_mask"].bool()
    assert int(cache.get_seq_length()) == length
    counting = [layer for layer in cache.layers if hasattr(layer, "get_seq_length")]
    assert counting
    assert {layer.keys.shape[2] for layer in counting} == {int(kept.sum(1).max())}


@pytest.mark.parametrize("name", RECURRENT)
def test_filler_leaves_no_trace_in_a_state(name):
    """The states of a row of a ragged batch are those of the row alone."""
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    strategy = Fixed()
    strategy.select = lambda tokens: strategy._draw(len(tokens), len(tokens))
    with patched(model, strategy):
        whole, _ = filled(name, model, "ragged")
        with torch.no_grad():
            alone = model(**clone(FAMILIES[name].prompt([[0]])), use_cache=True)[CACHE]
    row = len(inputs["input_ids"]) - 2
    for got, want in zip(states(whole), states(alone), strict=True):
        assert (got[row] - want[0]).abs().max() < 1e-4 * want.abs().max().clamp(min=1)
        assert want.abs().max() > 1e-3


@pytest.mark.parametrize("name", RECURRENT)
def test_chunked_prefill_of_one_prompt(name):
    model, inputs = subject(name), FAMILIES[name].batch("one")
    if not consistent(name, inputs, prefill_chunk_size=16):
        pytest.skip("the unpatched model disagrees with itself")
    with patched(model, budget=0.9) as spy:
        out = run(model, inputs, prefill_chunk_size=16)
    assert_same(out, inputs, expected(name, inputs, spy))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_chunk_that_loses_all_its_tokens_is_refused(name):
    model, inputs = subject(name), FAMILIES[name].batch("one")
    if not consistent(name, inputs, prefill_chunk_size=2):
        pytest.skip("the unpatched model disagrees with itself")
    with (
        patched(model, budget=0.05),
        pytest.raises(NotImplementedError, match="leave out prefill_chunk_size"),
    ):
        run(model, inputs, prefill_chunk_size=2)


@pytest.mark.parametrize("name", RECURRENT)
def test_crops_that_a_state_cannot_do_are_refused_and_change_nothing(name):
    model = subject(name)
    with patched(model) as spy:
        cache, inputs = filled(name, model)
        before, length = states(cache), int(cache.get_seq_length())
        with pytest.raises(NotImplementedError, match=r"cannot be cropped: keep a copy .*new cache\."):
            cache.crop(-2)
        assert int(cache.get_seq_length()) == length
        assert all(map(torch.equal, states(cache), before))
        whole = extend(inputs, torch.tensor([text(4, 3)]))
        again = {k: whole[k] for k in PLAIN if k in whole}
        out = run(model, again | {CACHE: cache}, 2)
    assert_same(out, whole, expected(name, whole, spy, 2))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_state_that_records_its_past_is_cropped(name):
    model, inputs = subject(name), FAMILIES[name].batch("one")
    cache = type(filled(name, clean(name))[0])(config=model.config)
    cache.activate_past_recording()
    with patched(model) as spy, torch.no_grad():
        model(**clone(inputs), use_cache=True, **{CACHE: cache})
        if not cache.is_croppable:
            with pytest.raises(NotImplementedError, match="cannot be cropped"):
                cache.crop(-2)
            return
        cache.crop(-2)
        assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1] - 2
        again = {k: inputs[k] for k in PLAIN if k in inputs}
        out = run(model, again | {CACHE: cache}, 2)
    assert_same(out, inputs, expected(name, inputs, spy, 2))


@pytest.mark.parametrize("name", RECURRENT)
def test_a_model_without_a_patch_is_refused_and_spoils_the_states(name):
    model = subject(name)
    with patched(model):
        cache, inputs = filled(name, model)
    length = inputs["input_ids"].shape[1]
    step = dict(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, length + 1, dtype=torch.long))
    with torch.no_grad(), pytest.raises(RuntimeError, match="the model that goes on with it is not patched"):
        model(**step, **{CACHE: cache})
    with (
        patched(model),
        torch.no_grad(),
        pytest.raises(ValueError, match="has begun to change: start with a"),
    ):
        model(**step, **{CACHE: cache})


@pytest.mark.parametrize("name", RECURRENT)
def test_copies_and_pickles_go_on(name):
    model = subject(name)
    with patched(model) as spy:
        cache, inputs = filled(name, model)
        whole = extend(inputs, torch.tensor([text(4, 1)]))
        again = {k: whole[k] for k in PLAIN if k in whole}
        want = expected(name, whole, spy, 2)
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert_same(run(model, again | {CACHE: twin}, 2), whole, want)
        cache.reset()
        spy.clear()
        assert_same(run(model, inputs | {CACHE: cache}, 2), inputs, expected(name, inputs, spy, 2))


@pytest.mark.parametrize("name", RECURRENT)
def test_drops_inside_are_refused_when_the_model_is_patched(name):
    model, inside = subject(name), ("fastv", "pyramiddrop", "sparsevlm", "llavolta", "mustdrop", "voco")
    assert not set(inside) & set(vtoken.list_strategies(model=model))
    for strategy in inside:
        with pytest.raises(ValueError, match=r"(inside the LLM|hides pictures).*: use "):
            vtoken.patch(model, strategy)


@pytest.mark.parametrize("name", RECURRENT)
def test_pruning_changes_the_answer(name):
    inputs = FAMILIES[name].batch("one")
    with patched(model := subject(name)):
        out = run(model, inputs, 1)
    assert (out.logits[0] - oracle.generate(clean(name), inputs, steps=1)[1][0]).abs().max() > EFFECT


@pytest.mark.parametrize("name", RECURRENT)
def test_a_llm_is_judged_by_its_cache_not_by_the_names_of_its_layers(name):
    config = clean(name).get_decoder().config
    assert layers_of_fixed_length(config)
    assert not layers_of_fixed_length(clean("llava").get_decoder().config)
