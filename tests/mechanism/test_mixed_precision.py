"""A KV cache with important tokens in 4 bits and others in 2: answers and codes against a second writing."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.oracle import CACHE, clone
from vtoken.kernels import unpack_rows
from vtoken.mechanism.mixed_precision import MixedLayer
from vtoken.storage import MixedPrecision

from .common import assert_close, assert_same, clean, expected, run, subject
from .fixed import patched
from .test_decoding import LOOKUP, beam_search, extend
from .test_packed_cache import contents
from .test_sparse_attention import Attends

FORM = MixedPrecision(high=4, low=2)


@dataclass
class Mixed(Attends):
    """Random tokens are important."""

    evicts: bool = False

    def storage(self, num_layers: int) -> MixedPrecision:
        return FORM


def steps_of(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of numbers that share them."""
    return (x.max() - x.min()) / (2**bits - 1), x.min()


def read_back(keys: Tensor, values: Tensor, important: Tensor) -> tuple[Tensor, Tensor]:
    """(H, n, D) of one row after storage, number by number as in the paper and ZipCache."""
    keys, values, share = keys.clone(), values.clone(), values.abs().amax(1).sqrt()
    for kind, bits in ((important, 4), (~important, 2)):
        places = kind.nonzero()[:, 0].tolist()
        for h in range(keys.shape[0] if places else 0):
            for d in range(keys.shape[2]):
                step, zero = steps_of(keys[h, places, d], bits)
                keys[h, places, d] = (
                    (keys[h, places, d] - zero) / step.clamp(min=1e-300)
                ).round() * step + zero
        for token in places:
            x = values[:, token] / share
            step, zero = steps_of(x, bits)
            values[:, token] = (((x - zero) / step).round() * step + zero) * share
    return keys, values


def layer_of(keys: Tensor, values: Tensor) -> MixedLayer:
    layer = MixedLayer()
    layer.begin(FORM, 0)
    layer.update(keys, values)
    return layer


def drawn(batch: int, n: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, important tokens and those that are no filler."""
    x = torch.randn(2, batch, 2, n, 8, generator=torch.Generator().manual_seed(n)).to(dtype)
    real = torch.arange(n) >= 3 * torch.arange(batch)[:, None]
    important = torch.rand(batch, n, generator=torch.Generator().manual_seed(n)) < 0.4
    return x[0], x[1], important & real, real


@pytest.mark.parametrize("kinds", ["some", "all", "none", "one row's"])
def test_tokens_are_read_back_as_in_the_second_writing(kinds):
    keys, values, important, real = drawn(3, 21)
    rows = torch.tensor([kinds == "one row's", False, False])[:, None]
    important = {"some": important, "all": real, "none": ~real & real}.get(kinds, important & rows)
    layer = layer_of(keys, values)
    layer.pack(important, real)
    for b, (got_keys, got_values) in enumerate(zip(*contents(layer), strict=True)):
        here = real[b]
        want = read_back(keys[b, :, here], values[b, :, here], important[b, here])
        assert_close(got_keys[:, here], want[0])
        assert_close(got_values[:, here], want[1])
    assert layer.keys.shape[2] == 0 and layer.get_seq_length() == 21


def test_codes_and_scales_are_those_of_the_formulas():
    keys, values, important, real = drawn(1, 30)
    layer = layer_of(keys, values)
    layer.pack(important, real)
    (block,) = layer.packed_keys.blocks
    for part, kind, bits in zip(block.parts, (important[0], ~important[0]), (4, 2), strict=True):
        x = keys[0][:, kind]
        scale = (x.amax(1) - x.amin(1)) / (2**bits - 1)
        assert torch.allclose(part.step[0, :, 0, 0], scale, rtol=1e-6)
        assert torch.equal(part.zero[0, :, 0, 0], x.amin(1))
        form = part.levels, 0.0, part.tokens, part.channels
        codes = unpack_rows(part.packed, torch.ones_like(part.step), None, *form)[0]
        assert torch.equal(codes, ((x - x.amin(1)[:, None]) / scale[:, None]).round())


def test_four_bits_are_nearer_than_two_and_both_within_half_a_scale():
    keys, values, important, real = drawn(1, 64, torch.float16)
    layer = layer_of(keys, values)
    layer.pack(important, real)
    off = (contents(layer)[0] - keys).abs()[0].float()
    for part, kind in zip(layer.packed_keys.blocks[0].parts, (important[0], ~important[0]), strict=True):
        assert (off[:, kind] <= part.step[0, :, 0].float() * 0.5 + 4e-3).all()
    assert off[:, important[0]].mean() < off[:, ~important[0]].mean() / 3


def test_bytes_of_16k_tokens():
    """2.5 bits where a quarter of the tokens has 4, two indices of 32 bits per token, and the scales."""
    keys, values = (torch.randn(1, 4, 16384, 128).half() for _ in range(2))
    layer = layer_of(keys, values)
    layer.pack((torch.arange(16384) % 4 == 0)[None], torch.ones(1, 16384, dtype=torch.bool))
    assert (keys.nbytes + values.nbytes) / layer.stored_bytes() == pytest.approx(6.16, abs=0.01)


def grown() -> MixedLayer:
    """Two blocks and tokens that wait, of 3 rows."""
    keys, values, important, real = drawn(3, 21)
    layer = layer_of(keys[:, :, :14], values[:, :, :14])
    layer.pack(important[:, :14], real[:, :14])
    layer.update(keys[:, :, 14:19], values[:, :, 14:19])
    layer.pack(important[:, 16:19], real[:, 16:19])  # the two before them count as important
    layer.update(keys[:, :, 19:], values[:, :, 19:])
    return layer


def test_a_crop_leaves_the_tokens_before_it_as_they_were():
    layer = grown()
    before = contents(layer)
    for length in (21, 20, 19, 18, 14, 9, 1):
        layer.crop(length - layer.get_seq_length())
        assert layer.get_seq_length() == length
        for now, was in zip(contents(layer), before, strict=True):
            assert torch.equal(now, was[:, :, :length])
    layer.crop(-1)
    assert layer.get_seq_length() == 0 and layer.packed_keys is None


def test_rows_are_moved_repeated_and_selected():
    layer = grown()
    before = contents(layer)
    for change, rows in (
        (lambda x: x.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda x: x.batch_select_indices(torch.tensor([1])), [1]),
    ):
        other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        change(other)
        assert all(torch.equal(now, was[rows]) for now, was in zip(contents(other), before, strict=True))
    layer.reset()
    assert layer.get_seq_length() == 0 == layer.stored_bytes()


@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_answers_are_those_of_the_second_writing(name, kind):
    """The prompt reads itself as it is; a token of the answer reads what is stored, packed again every 5."""
    interval, steps, family = 5, 14, FAMILIES[name]
    model, inputs = subject(name, dtype=torch.float64), family.batch(kind, torch.float64)
    with patched(model, Attends(evicts=False)) as full:
        source = run(model, inputs, 1)
    with patched(model, strategy := Mixed(interval=interval)) as spy:
        out = run(model, inputs, steps)
    chosen = spy.inside_attention(family, inputs)
    assert all(torch.equal(of, chosen[i]) for i, of in full.inside_attention(family, inputs).items())
    assert_close(out.logits[0], source.logits[0])
    plain = clean(name, dtype=torch.float64)
    ids, start = out.sequences[:, inputs["input_ids"].shape[1] :], len(inputs["input_ids"])
    for b, prompt in enumerate(oracle.capture(plain, inputs)):
        cache, n = copy.deepcopy(source[CACHE]), len(prompt)
        for i, layer in enumerate(cache.layers):
            own = layer.keys[b, :, -n:], layer.values[b, :, -n:], chosen[i][b, prompt.index]
            layer.__class__ = type(layer).__mro__[1]
            layer.keys, layer.values = (x[None] for x in read_back(*own))
        for step in range(1, steps):
            prompt = prompt.append(plain.get_input_embeddings()(ids[b, step - 1][None]))
            now = prompt.take(torch.tensor([len(prompt) - 1]))
            where = dict(
                position_ids=now.positions[..., None, :], attention_mask=torch.ones(1, n + step).long()
            )
            with torch.no_grad():
                read = oracle.decoder_of(plain)(inputs_embeds=now.embeds[None], **where, **{CACHE: cache})
                assert_close(out.logits[step][b], oracle.head_of(plain)(read.last_hidden_state[0, -1]))
            if step % interval:
                continue
            for i, layer in enumerate(cache.layers):
                kept = strategy.retained[(4 * (step // interval - 1) + i) * start + b][1]
                important = torch.zeros(interval, dtype=torch.bool)
                important[kept], important[-1] = True, True
                packed = read_back(layer.keys[0, :, -interval:], layer.values[0, :, -interval:], important)
                layer.keys[0, :, -interval:], layer.values[0, :, -interval:] = packed


def test_a_picture_on_the_cache_of_an_earlier_one():
    """What is packed stays as it is; text that was read since counts as important."""
    family, model = FAMILIES["llava"], subject("llava")
    whole = family.prompt([[0, 1]], turns=True)
    cut = int(family.visual(whole)[0].nonzero()[len(family.visual(family.prompt([[0]])).nonzero()), 0])
    one = {k: whole[k][:, : cut - 2] for k in ("input_ids", "attention_mask")} | family.vision(0)
    text = {k: whole[k][:, : cut - (k == "input_ids")] for k in ("input_ids", "attention_mask")}
    with patched(model, Mixed()), torch.no_grad():
        cache = model(**clone(one), use_cache=True)[CACHE]
        first = copy.deepcopy(cache.layers[2].packed_keys).read()
        text["attention_mask"] = text["attention_mask"][:, : cut - 1]
        text["input_ids"] = text["input_ids"][:, cut - 2 :]
        model(**text, **{CACHE: cache})
        assert cache.layers[2].keys.shape[2] == 1
        run(model, whole | family.vision(1) | {CACHE: cache}, 1)
    blocks = cache.layers[2].packed_keys.blocks
    assert [block.index.shape[1] for block in blocks] == [cut - 2, whole["input_ids"].shape[1] - cut + 2]
    assert torch.equal(blocks[0].read(), first) and cache.layers[2].keys.shape[2] == 0
    assert blocks[1].index[0, 0] < blocks[1].parts[0].slots


def test_a_cache_that_the_model_makes_itself_is_packed_after_the_prompt():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with vtoken.applied(model, "zipvl", tau=0.6, kv="quant"), torch.no_grad():
        want = model(**clone(inputs), **{CACHE: DynamicCache()})[CACHE]
        made = model(**clone(inputs), use_cache=True)[CACHE]
        report = vtoken.report(model)
    assert report.kv_bytes == sum(layer.stored_bytes() for layer in made.layers) < report.kv_bytes_dense
    for layer, other in zip(made.layers, want.layers, strict=True):
        assert layer.keys.shape[2] == 0
        assert_close(layer.packed_keys.read(), other.packed_keys.read())
        assert_close(layer.packed_values.read(), other.packed_values.read())


def test_beams_and_drafts():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with vtoken.applied(model, "zipvl", tau=0.6, kv="quant", interval=0):
        ids, scores = beam_search(model, inputs)
    assert ids.shape[0] == 2 and scores.isfinite().all()
    one = extend(FAMILIES["llava"].batch("one"), torch.arange(3, 95)[None])
    with vtoken.applied(model, "zipvl", tau=0.6, kv="quant", interval=4):
        greedy = model.generate(**clone(one), max_new_tokens=3, do_sample=False)
        drafted = model.generate(**clone(one), max_new_tokens=3, do_sample=False, **LOOKUP)
    assert torch.equal(drafted, greedy)  # before the first interval ends


@pytest.mark.parametrize("parts", [["hired", "zipvl"], ["visionzip", "fastv", "zipvl"]])
def test_combinations_read_the_prompt_as_the_full_cache(parts):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    options = {"zipvl": {"tau": 0.6, "kv": "quant"}} | ({"fastv": {"layer": 2}} if "fastv" in parts else {})
    with patched(model, vtoken.strategies.combine(parts, 0.6, **options)) as spy:
        out = run(model, inputs, 1)
        report = vtoken.report(model)
    assert_same(out, inputs, expected("llava", inputs, spy, 1))
    assert report.kv_bytes == sum(layer.stored_bytes() for layer in out[CACHE].layers)


def test_without_the_patch_the_conversation_goes_on_from_what_is_packed():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "zipvl", tau=0.6, kv="quant", interval=0):
        cache = run(model, inputs, 1)[CACHE]
        more = extend(inputs, torch.tensor([[5, 6]]))
        again = {k: more[k] for k in ("input_ids", "attention_mask")}
        want = run(model, again | {CACHE: copy.deepcopy(cache)}, 4)
    got = run(model, again | {CACHE: cache}, 4)
    assert torch.equal(got.sequences, want.sequences)
    assert_close(torch.stack(got.logits), torch.stack(want.logits))


def test_another_cache_and_other_models_are_refused():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    static = dict(cache_implementation="static", max_cache_len=80, disable_compile=True)
    refused = pytest.raises(NotImplementedError, match="own form, found StaticLayer")
    with vtoken.applied(model, "zipvl", kv="quant"), refused:
        run(model, inputs, 1, **static)
    with pytest.raises(ValueError, match="zipvl needs an LLM whose layers all cache one slot per token"):
        vtoken.patch(subject("gemma3"), "zipvl", kv="quant")
    with pytest.raises(ValueError, match="vidkv and zipvl"):
        vtoken.strategies.combine(["vidkv", "zipvl"], 0.5, zipvl={"kv": "quant"})
