"""A KV cache of packed codes: answers against a second writing, and every operation of a cache."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import vtoken
from tests.models import FAMILIES
from tests.oracle import CACHE, clone
from vtoken.mechanism.packed_cache import PackedLayer
from vtoken.storage import Packed, PromptTokens
from vtoken.strategies.vidkv import relevance

from .common import assert_close, assert_same, clean, run, subject
from .packed_oracle import Form, answer
from .test_decoding import LOOKUP, beam_search, extend
from .test_turns import first_turn

STEPS = 14  # more than the residual
FORMS = {
    "paper": Form(),
    "code": Form(gamma=0.5, scale=False, sign=False),
    "two": Form(key_bits=2, value_bits=2),
    "tokens": Form(key_bits=4, value_bits=4, value_groups="token", residual=4),
    "one": Form(key_bits=1, protect=0.0),
    "few": Form(key_bits=1.3, group=8, protect=0.9),
}


def patched(model, form: Form):
    return vtoken.applied(model, "vidkv", **asdict(form))


def double(name: str, kind: str = "ragged"):
    inputs = FAMILIES[name].batch(kind, torch.float64)
    return subject(name, dtype=torch.float64), clean(name, dtype=torch.float64), inputs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "llava_onevision/video"])
def test_answers_are_those_of_the_second_writing(name, form):
    model, plain, inputs = double(name)
    form = FORMS[form]
    with patched(model, form):
        out = run(model, inputs, STEPS)
    want = answer(plain, inputs, FAMILIES[name].visual(inputs), form, STEPS)
    assert_same(out, inputs, want)
    assert_close(out.logits[0], run(plain, inputs, 1).logits[0])  # the prompt reads itself as it is
    assert (out.logits[1] - run(plain, inputs, 2).logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_later_turn_reads_what_is_packed(name):
    model, plain, inputs = double(name, "one")
    form = FORMS["paper"]
    with patched(model, form):
        whole, again = first_turn(model, inputs, STEPS)
        out = run(model, again, 4)  # five tokens at once, then one at a time
    said, visual = whole["input_ids"][0, -5:], FAMILIES[name].visual(inputs)
    ids, logits = answer(plain, inputs, visual, form, STEPS + 4, said, STEPS)
    assert_same(out, whole, (ids[:, STEPS:], logits[STEPS:]))
    layer, length = again[CACHE].layers[0], whole["input_ids"].shape[1]
    assert layer.packed_keys.slots % 4 == 0 and length + 3 - layer.packed_keys.slots < 8
    assert {int(again[CACHE].get_seq_length(i)) for i in range(4)} == {length + 3}


def test_a_model_without_the_patch_goes_on_in_the_form():
    model, plain, inputs = double("llava", "one")
    form, visual = FORMS["paper"], FAMILIES["llava"].visual(inputs)
    ids, logits = answer(plain, inputs, visual, form, STEPS)
    with patched(model, form):
        out = run(model, inputs, 4)
    again = extend(inputs, ids[:, :4])
    again = {k: again[k] for k in ("input_ids", "attention_mask")} | {CACHE: out[CACHE]}
    assert_close(torch.stack(run(model, again, STEPS - 4).logits), logits[4:])


def test_a_cache_that_the_model_makes_itself_is_packed_after_the_prompt():
    model, _, inputs = double("llava", "one")
    with patched(model, FORMS["paper"]), torch.no_grad():
        want = run(model, inputs, 2)[CACHE]
        made = model(**clone(inputs), use_cache=True)[CACHE]
        assert vtoken.report(model).kv_bytes == sum(layer.stored_bytes() for layer in made.layers)
    for layer, other in zip(made.layers, want.layers, strict=True):
        assert torch.equal(layer.packed_values.index, other.packed_values.index)
        assert_close(layer.packed_keys.read(), other.packed_keys.read())
        assert_close(layer.packed_values.read(), other.packed_values.read())


def test_the_report_counts_the_bytes_of_the_tensors():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "vidkv", group=8, residual=8):
        cache = run(model, inputs, 1)[CACHE]
        report = vtoken.report(model)
    assert report.kv_bytes == sum(layer.stored_bytes() for layer in cache.layers) < report.kv_bytes_dense / 2
    assert "KV cache" in str(report)


def test_beams_and_drafts():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with vtoken.applied(model, "vidkv", group=128, residual=128):  # nothing is packed
        dense = beam_search(clean("llava"), inputs)
        ids, scores = beam_search(model, inputs)
        assert torch.equal(ids, dense[0])
        assert_close(scores, dense[1])
    with patched(model, FORMS["two"]):
        ids, scores = beam_search(model, inputs)
    assert ids.shape == dense[0].shape and not torch.allclose(scores, dense[1])
    one = extend(FAMILIES["llava"].batch("one"), torch.arange(3, 95)[None])
    with patched(model, FORMS["paper"]):
        out = model.generate(**clone(one), max_new_tokens=12, do_sample=False, **LOOKUP)
    assert out.shape[1] == one["input_ids"].shape[1] + 12


def test_tokens_dropped_inside_the_llm_are_not_packed():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    cut = dict(budget=0.5, fastv=dict(layer=2))
    with vtoken.applied(model, "fastv", budget=0.5, layer=2):
        alone = run(model, inputs)
    with vtoken.applied(model, ["fastv", "vidkv"], **cut, vidkv=dict(group=128)):
        assert_close(torch.stack(run(model, inputs).logits), torch.stack(alone.logits))
    with vtoken.applied(model, ["fastv", "vidkv"], **cut, vidkv=dict(group=4, residual=8)):
        out = run(model, inputs)
    assert_close(out.logits[0], alone.logits[0])
    first, last = out[CACHE].layers[0], out[CACHE].layers[3]
    assert last.physical_length() == alone[CACHE].layers[3].physical_length() < first.physical_length()
    assert last.packed_values.high is not None
    assert int(first.get_seq_length()) == int(last.get_seq_length())


# -- refusals ------------------------------------------------------------------------------------------------
def offloaded(model):
    cache = DynamicCache()
    cache.offloading = True  # its constructor wants a GPU
    return cache


def static(model):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=96)


@pytest.mark.parametrize(("make", "found"), [(offloaded, "an offloaded cache"), (static, "StaticLayer")])
def test_caches_that_cannot_change_their_form_are_refused(make, found):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "vidkv"), pytest.raises(NotImplementedError, match=f"own form, found {found}"):
        run(model, inputs, 1, **{CACHE: make(model)})


def test_a_cache_of_another_form_and_models_of_other_layers_are_refused():
    family, model, inputs = FAMILIES["llava"], subject("llava"), FAMILIES["llava"].batch("one")
    whole = family.prompt([[0, 1]])
    cut, cache = int(family.visual(whole)[0].nonzero()[16, 0]), DynamicCache()
    with torch.no_grad():
        with patched(model, FORMS["paper"]):
            model(input_ids=whole["input_ids"][:, :cut], **family.vision(0), **{CACHE: cache})
        with (
            patched(model, FORMS["two"]),
            pytest.raises(ValueError, match=r"was filled in the form Packed\(key_bits=1.5.*new cache"),
        ):
            model(input_ids=whole["input_ids"][:, cut:], **family.vision(1), **{CACHE: cache})
    for name in ("gemma3", "qwen3_5"):
        with pytest.raises(ValueError, match="vidkv needs an LLM whose layers all cache one slot per token"):
            vtoken.patch(subject(name), "vidkv")
        assert "vidkv" not in vtoken.list_strategies(model=subject(name))
    with pytest.raises(ValueError, match="cannot group the 8 channels of a head of this llava model by 32"):
        vtoken.patch(model, "vidkv", value_groups="token")
    with (
        vtoken.applied(model, ["mustdrop", "vidkv"], budget=0.5, mustdrop=dict(merging=False)),
        pytest.raises(NotImplementedError, match=r"be shortened after prefill, found PackedLayer"),
    ):
        run(model, inputs, 1)


# -- a layer alone -------------------------------------------------------------------------------------------
def prompt(real: Tensor, visual: Tensor) -> PromptTokens:
    return PromptTokens(visual, real, torch.randn(*real.shape, 6))


def filled(
    form: Packed, n: int, batch: int = 2, heads: int = 2, dim: int = 16, dtype=torch.float32
) -> PackedLayer:
    layer = PackedLayer()
    layer.begin(form, 0)
    real = torch.ones(batch, n, dtype=torch.bool)
    layer.announce(prompt(real, torch.arange(n).expand(batch, n) % 3 > 0))
    layer.update(*(torch.randn(batch, heads, n, dim).to(dtype) for _ in range(2)))
    return layer


def contents(layer: PackedLayer) -> tuple[Tensor, Tensor]:
    """What the next forward reads, without its own token."""
    layer, one = copy.deepcopy(layer), torch.zeros_like(layer.keys[:, :, :1].sum(2, keepdim=True))
    keys, values = layer.update(one, one)
    return keys[:, :, :-1], values[:, :, :-1]


SMALL = Packed(1.5, 1.58, group=4, residual=8, protect=0.5, relevance=relevance)


def test_a_crop_leaves_the_tokens_before_it_as_they_were():
    layer = filled(SMALL, 30)
    before = contents(layer)
    for length in (30, 29, 28, 27, 21, 20, 9, 2, 1):
        layer.crop(length - layer.get_seq_length())
        assert layer.get_seq_length() == length == layer.get_mask_sizes(0)[0]
        for now, was in zip(contents(layer), before, strict=True):
            assert torch.equal(now, was[:, :, :length])
    held = layer.stored_bytes()
    more = torch.randn(2, 2, 11, 16)
    layer.update(more, more)
    keys, values = contents(layer)
    assert keys.shape[2] == 12 and torch.equal(keys[:, :, :1], before[0][:, :, :1])
    assert torch.equal(values[:, :, :1], before[1][:, :, :1]) and layer.stored_bytes() > held
    layer.crop(-12)
    assert layer.get_seq_length() == 0 and layer.packed_keys is None


@pytest.mark.parametrize("crop", [0, 7])
def test_rows_are_moved_repeated_and_selected(crop):
    layer = filled(SMALL, 30, batch=3)
    layer.crop(-crop)
    before = contents(layer)
    for change, rows in (
        (lambda x: x.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda x: x.batch_select_indices(torch.tensor([1])), [1]),
    ):
        other = pickle.loads(pickle.dumps(copy.deepcopy(layer))) if crop else copy.deepcopy(layer)
        change(other)
        assert all(torch.equal(now, was[rows]) for now, was in zip(contents(other), before, strict=True))
    layer.reset()
    assert layer.get_seq_length() == 0 == layer.stored_bytes()


def test_tokens_are_packed_once():
    """Whatever follows, a token is read as it was after it had been packed."""
    layer = filled(SMALL, 22)
    read = contents(layer)[0][:, :, :20]
    for step in range(1, 20):
        one = torch.randn(2, 2, 1, 16)
        layer.update(one, one)
        assert torch.equal(contents(layer)[0][:, :, :20], read)
        assert layer.get_seq_length() == 22 + step and layer.keys.shape[2] < 8


@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_are_off_by_half_a_scale_at_most(bits):
    for dtype, groups in ((torch.float16, "channel"), (torch.float32, "token")):
        layer = PackedLayer()
        layer.begin(Packed(bits, bits, group=8, residual=8, value_groups=groups), 0)
        x = torch.randn(1, 2, 24, 16).to(dtype)
        layer.update(x, x)
        for now, part in zip(contents(layer), (layer.packed_keys.hard, layer.packed_values.low), strict=True):
            half = float(part.step.max()) / 2
            assert (now - x).abs().max() <= half * (1 + 1e-5) + (4e-3 if dtype == torch.float16 else 0)
    few = torch.randint(2**bits, (1, 2, 24, 16)).float() * 0.25 - 1  # as many equal steps as there are levels
    few[:, :, ::8], few[:, :, 1::8] = -1.0, (2**bits - 1) * 0.25 - 1
    layer = PackedLayer()
    layer.begin(Packed(bits, bits, group=8, residual=8), 0)
    layer.update(few, few)
    assert all(torch.equal(now, few) for now in contents(layer))


@pytest.mark.parametrize(
    ("form", "times"),
    [
        (Packed(2, 2), 5.33),  # 2 bits, and 32 bits for 32 of them
        (Packed(1.5, 1.58), 7.35),  # keys (3 + 1.5) / 2 bits, values 1.6 + 0.5 bits
        (Packed(1.5, 1.58, 512, 512), 10.06),
        (Packed(1, 1.58), 8.88),
    ],
)
def test_bytes_of_16k_tokens(form, times):
    layer = filled(form, 16384, batch=1, heads=1, dim=128, dtype=torch.float16)
    assert 2 * 16384 * 128 * 2 / layer.stored_bytes() == pytest.approx(times, abs=0.02)
