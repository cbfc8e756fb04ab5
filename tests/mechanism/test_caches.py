"""KV caches that hold a shortened prompt: cropped, moved, copied, and read by other models and patches.

What follows on a cropped cache is compared with the oracle, which shortens what is left of the prompt by
hand.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.models.common import text
from tests.oracle import CACHE, clone
from vtoken.mechanism.cache_crop import physical_length
from vtoken.mechanism.ledger import Ledger
from vtoken.mechanism.logical_cache import ledger_of, make_logical
from vtoken.strategies import create

from .common import ALIGNED, BOTH, FRONT, SOME, assert_close, assert_same, clean, expected, run, subject
from .fixed import Fixed, patched

NAMES = ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"]
TWO = [pytest.param(n, marks=() if n in ("llava", "qwen3_vl") else pytest.mark.product) for n in NAMES]
OPTIONS = {"before": FRONT, "both": BOTH, "aligned": ALIGNED}
TYPES = ("mm_token_type_ids", "token_type_ids")
TOKENS = torch.tensor([text(4, 5), text(4, 6)])
CROPPABLE = [False] + [True] * hasattr(StaticLayer, "crop")


def new_cache(model, static: bool):
    config = model.config.get_text_config()
    return StaticCache(config=config, max_cache_len=160) if static else DynamicCache(config=config)


def positions_of(name: str, inputs: dict) -> Tensor:
    """(B, L), or (3, B, L) of a multimodal rope; padding has position 0."""
    prompts = oracle.capture(clean(name), inputs)
    first = prompts[0].positions
    out = torch.zeros(*first.shape[:-1], *inputs["input_ids"].shape, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        out[..., b, prompt.index] = prompt.positions
    return out[-3:] if out.ndim == 3 else out


def read(model, inputs: dict, positions: Tensor, cache=None):
    """The prompt's forward: logits of the last token, and the cache."""
    with torch.no_grad():
        out = model(
            **clone(inputs),
            position_ids=positions,
            use_cache=True,
            **({} if cache is None else {CACHE: cache}),
        )
    return out.logits[:, -1], out[CACHE]


def go_on(model, inputs: dict, length: int, start: Tensor, cache) -> Tensor:
    """Two tokens in one forward, then two steps of one: logits (4, B, vocabulary) behind `length` tokens of
    the prompt.

    `start` (B,) are the positions of the first of them.
    """
    batch, rope = len(start), "qwen" in type(model).__name__.lower()
    tokens, logits, at = TOKENS[:batch], [], 0
    mask = inputs["attention_mask"][:, :length]
    for n in (2, 1, 1):
        positions = start[:, None] + torch.arange(at, at + n)
        mask = torch.cat([mask, mask.new_ones(batch, n)], 1)
        given = dict(input_ids=tokens[:, at : at + n], attention_mask=mask)
        given["position_ids"] = positions.expand(3, batch, n) if rope else positions
        if "token_type_ids" in inputs:
            given["token_type_ids"] = torch.zeros_like(given["input_ids"])
        with torch.no_grad():
            logits += list(model(**given, **{CACHE: cache}).logits.unbind(1))
        at += n
    return torch.stack(logits)


@torch.no_grad()
def wanted(name: str, inputs: dict, spy, length: int, start: Tensor) -> Tensor:
    """What `go_on` must give, by the oracle."""
    family, model = FAMILIES[name], clean(name)
    keep = spy.in_front(family, inputs)[0]
    drop, _ = spy.inside(family, inputs, keep)
    alive = torch.stack([torch.ones_like(keep), *drop.values()]).all(0)
    evict = dict.fromkeys(spy.strategy.aligned_layers(4), alive) if drop else {}
    whole, rows = inputs["input_ids"].shape[1], []
    for b, prompt in enumerate(oracle.capture(model, inputs)):
        prompt = prompt.take(keep[b, prompt.index] & (prompt.index < length))
        cuts = [{k: d[b, prompt.index] for k, d in of.items()} for of in (drop, evict)]
        for i, token in enumerate(TOKENS[b]):
            prompt = prompt.append(model.get_input_embeddings()(token[None]))
            prompt.positions[..., -1], prompt.index[-1] = start[b] + i, whole + i
        inside = oracle.Inside(cuts[0], {}, cuts[1], whole) if drop else None
        rows.append(model.get_output_embeddings()(oracle.hidden(model, prompt, inside)[-len(TOKENS[b]) :]))
    return torch.stack(rows, 1)


def lengths_of(family, inputs: dict) -> dict[str, int]:
    """Lengths to crop to, by what is left."""
    visual = family.visual(inputs).any(0).nonzero()[:, 0]
    first, last, whole = int(visual[0]), int(visual[-1]), inputs["input_ids"].shape[1]
    return {
        "text": whole - 2,
        "behind": last + 1,
        "inside": (first + last) // 2,
        "early": first + 2,
        "before": first,
        "start": 2,
    }


@pytest.mark.parametrize("static", CROPPABLE, ids=["dynamic", "static"][: len(CROPPABLE)])
@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", TWO)
def test_crop_counts_prompt_tokens(name, option, kind, static):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch(kind)
    positions, whole = positions_of(name, inputs), inputs["input_ids"].shape[1]
    with patched(model, **OPTIONS[option]) as spy:
        _, cache = read(model, inputs, positions, new_cache(model, static))
        for left, length in lengths_of(family, inputs).items():
            real = inputs["attention_mask"][:, :length]
            if not real.any(1).all():
                continue  # a row without a token has no answer
            if "gemma" in name and left in ("inside", "early"):
                continue  # what is left of its picture has seen what was cropped, in the unpatched model too
            start = positions.reshape(-1, *positions.shape[-2:])[..., :length].amax((0, 2)) + 1
            cropped = copy.deepcopy(cache)
            if (static or "gemma" in name) and left in ("inside", "start"):
                cropped.crop(-3)  # twice, first within the text
            cropped.crop(length - int(cropped.get_seq_length()))
            assert {int(cropped.get_seq_length(i)) for i in range(4)} == {length}
            if left in ("before", "start"):
                assert physical_length(cropped.layers[-1]) == int(real.sum(1).max())
            assert_close(
                go_on(model, inputs, length, start, cropped), wanted(name, inputs, spy, length, start)
            )
        assert int(cache.get_seq_length()) == whole


@pytest.mark.parametrize("static", CROPPABLE, ids=["dynamic", "static"][: len(CROPPABLE)])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES[:3])
def test_the_same_picture_again_after_a_crop(name, option, static):
    """Back to before the picture, or to an empty cache, and the rest of the prompt once more: the same
    answer.
    """
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged") if name == "llava" else family.batch("one")
    positions, visual = positions_of(name, inputs), family.visual(inputs).any(0).nonzero()[:, 0]
    for length in (int(visual[0]) - (name != "llava"), 2, 0):
        with patched(model, **OPTIONS[option]) as spy:
            want, cache = read(model, inputs, positions, new_cache(model, static))
            cache.crop(length - inputs["input_ids"].shape[1])
            later = {k: v[:, length:] if k in ("input_ids", *TYPES) else v for k, v in inputs.items()}
            spy.clear()
            got, cache = read(model, later, positions[..., length:], cache)
            assert_close(got, want)
            spy.drops = {k: [(c + length, a) for c, a in v] for k, v in spy.drops.items()}
            whole, start = (
                inputs["input_ids"].shape[1],
                positions.reshape(-1, *positions.shape[-2:]).amax((0, 2)) + 1,
            )
            assert_close(go_on(model, inputs, whole, start, cache), wanted(name, inputs, spy, whole, start))


@pytest.mark.parametrize("option", ["before", "both"])
def test_generate_reads_the_picture_again_after_a_crop(option):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with patched(model, **OPTIONS[option]) as spy:
        out = run(model, inputs)
        out[CACHE].crop(2 - int(out[CACHE].get_seq_length()))
        spy.clear()
        out = run(model, inputs | {CACHE: out[CACHE]})
    spy.drops = {k: [(c + 2, a) for c, a in v] for k, v in spy.drops.items()}
    assert_same(out, inputs, expected("llava", inputs, spy))


def test_renumbered_positions_after_a_crop():
    """`positions="renumber"` counts what was dropped before the crop, no longer what was dropped behind it."""
    family, model = FAMILIES["llava"], subject("llava")
    inputs = family.batch("ragged")
    mask, where = inputs["attention_mask"], lengths_of(family, inputs)
    with patched(model, create("uniform", budget=0.4, positions="renumber")) as spy, torch.no_grad():
        keep = None
        for left in ("behind", "inside", "before"):
            length = where[left]
            cache = model(**clone(inputs), position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)[
                CACHE
            ]
            cache.crop(length - mask.shape[1])
            start = mask[:, :length].sum(1)
            got = go_on(model, inputs, length, start, cache)
            keep = spy.in_front(family, inputs)[0]
            spy.clear()
            for b, prompt in enumerate(oracle.capture(clean("llava"), inputs)):
                prompt = prompt.take(keep[b, prompt.index] & (prompt.index < length))
                for token in TOKENS[b]:
                    prompt = prompt.append(clean("llava").get_input_embeddings()(token[None]))
                prompt.positions = torch.arange(len(prompt))
                want = clean("llava").get_output_embeddings()(oracle.hidden(clean("llava"), prompt)[-4:])
                assert_close(got[:, b], want)


def test_crop_of_an_older_and_a_newer_release():
    """A positive number is a length of the prompt where transformers takes one, and an error where it does
    not.
    """
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with patched(model), torch.no_grad():
        cache = model(**clone(inputs), use_cache=True)[CACHE]
        whole, stored = int(cache.get_seq_length()), physical_length(cache.layers[0])
        try:
            DynamicLayer().crop(7)
        except ValueError:
            with pytest.raises(ValueError, match="positive value"):
                cache.crop(7)
            assert (int(cache.get_seq_length()), physical_length(cache.layers[0])) == (whole, stored)
        else:
            cache.crop(whole + 5)
            assert int(cache.get_seq_length()) == whole
            cache.crop(7)
            assert {int(cache.get_seq_length(i)) for i in range(4)} == {7}
        cache.crop(0)
        cache.crop(-1000)
        assert int(cache.get_seq_length()) == physical_length(cache.layers[2]) == 0


def test_one_layer_is_not_cropped_alone():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with patched(model, **BOTH), torch.no_grad():
        cache = model(**clone(inputs), use_cache=True)[CACHE]
        cache.crop(-12)
        with pytest.raises(NotImplementedError, match="cropped alone"):
            cache.layers[2].crop(-3)
        model(torch.tensor([[5, 6, 7]]), **{CACHE: cache})
        with pytest.raises(NotImplementedError, match="cropped alone"):
            cache.layers[2].crop(-3)
        length = int(cache.get_seq_length())
        cache.crop(-3)
        assert {int(cache.get_seq_length(i)) for i in range(4)} == {length - 3}


def test_what_a_layer_of_transformers_cannot_do_is_a_sentence():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    cache = new_cache(model, True)
    with patched(model), torch.no_grad():
        model(**clone(inputs), **{CACHE: cache})
    with pytest.raises(
        NotImplementedError, match="StaticLayer of this transformers has no batch_select_indices"
    ):
        cache.batch_select_indices(torch.tensor([0]))
    if not hasattr(StaticLayer, "crop"):
        with pytest.raises(NotImplementedError, match="StaticLayer of this transformers has no crop"):
            cache.crop(-1)


def test_a_cache_that_cannot_be_gathered_is_not_cropped_into_a_ragged_prompt():
    class Fake(DynamicLayer):
        _quantize = QuantizedLayer.update

    for kind in ("one", "ragged"):
        model, inputs = subject("llava"), FAMILIES["llava"].batch(kind)
        where = lengths_of(FAMILIES["llava"], inputs)
        cache = DynamicCache()
        cache.layer_class_to_replicate = Fake
        with patched(model), torch.no_grad():
            model(**clone(inputs), **{CACHE: cache})
            before = [layer.keys for layer in cache.layers]
            if kind == "one":  # the first slots stay where they are
                cache.crop(where["inside"] - int(cache.get_seq_length()))
                assert int(cache.get_seq_length()) == where["inside"]
                continue
            with pytest.raises(
                NotImplementedError, match="a DynamicCache or StaticCache that is not offloaded"
            ):
                cache.crop(where["inside"] - int(cache.get_seq_length()))
            assert all(a is layer.keys for a, layer in zip(before, cache.layers))
            assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1]


def test_a_window_that_has_moved_on_is_not_cropped_into():
    config = copy.deepcopy(clean("gemma3").config.get_text_config())
    config.sliding_window = window = 12
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=40)):
        ledger = Ledger(1, 1, torch.device("cpu"))
        total = window + 9
        x = torch.randn(1, 2, total, 8)
        for i in range(len(config.layer_types)):
            cache.update(x, x, i)
        make_logical(cache, ledger, 4)
        ledger.follow(total, grow=True)
        if isinstance(cache, StaticCache) and not hasattr(StaticLayer, "crop"):
            continue
        with pytest.raises(NotImplementedError, match="needs after a crop"):
            cache.crop(-4)


def test_tables_after_a_crop_are_those_of_a_naive_writing():
    """Random tables of three stages and two forwards; per row a list of what is left."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ledger, batch, rows = (
            Ledger(3, 3, torch.device("cpu"), [0, 1, 2, 2]),
            3,
            [[[], [], []] for _ in range(3)],
        )
        for length in (7, 6):
            end = ledger.end
            keep = torch.ones(batch, length, dtype=torch.bool)
            index, past = None, ledger.slots[0].shape[1]
            for stage in range(3):
                keep = keep & (torch.rand(batch, length, generator=generator) < 0.7)
                chosen, valid = vtoken.mechanism.ragged.right_aligned(keep)
                if stage == 0:
                    index = torch.where(valid, chosen, -1)
                place = torch.stack(
                    [(index[b][None] == chosen[b][:, None]).long().argmax(1) for b in range(batch)]
                )
                ledger.append(stage, end, chosen, past + place, valid, not bool(valid.all()))
                for b in range(batch):
                    rows[stage][b] += [end + int(i) for i in keep[b].nonzero()]
            for stage in range(3):
                ledger.dropped[stage] = end + length - ledger.slots[stage].shape[1]
            ledger.real = torch.ones(batch, end + length, dtype=torch.bool)
        length = int(torch.randint(0, 13, (), generator=generator))
        ledger.forget(length, ledger.cuts(length))
        assert ledger.end == length and min(ledger.dropped) >= 0
        for stage, of in enumerate(rows):
            for b, tokens in enumerate(of):
                slots = ledger.slots[stage][b]
                assert slots[slots >= 0].tolist() == [t for t in tokens if t < length]
                columns = ledger.columns[stage][b][slots >= 0]
                assert ledger.slots[0][b][columns].tolist() == slots[slots >= 0].tolist()


# -- lengths and rows ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_the_longest_prompt_a_cache_holds_counts_prompt_tokens(name):
    model, inputs = subject(name), FAMILIES[name].batch("one")
    static, dynamic = new_cache(model, True), new_cache(model, False)
    before = (
        [layer.get_max_length() for layer in static.layers],
        [layer.get_max_length() for layer in dynamic.layers],
    )
    with patched(model), torch.no_grad():
        for cache in (static, dynamic):
            model(**clone(inputs), **{CACHE: cache})
    for i, layer in enumerate(static.layers):
        dropped = inputs["input_ids"].shape[1] - physical_length(layer)
        assert dropped > 0
        assert static.get_max_length(i) == before[0][i] + (0 if layer.is_sliding else dropped)
        assert dynamic.get_max_length(i) == before[1][i]


@pytest.mark.parametrize(
    "rows", [[1], torch.tensor([False, True]), slice(1, 2)], ids=["list", "bool", "slice"]
)
def test_rows_may_be_named_as_torch_allows(rows):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    length, positions = inputs["input_ids"].shape[1], positions_of("llava", inputs)
    start = positions.amax(1) + 1
    with patched(model, **ALIGNED):
        _, cache = read(model, inputs, positions)
        twice = copy.deepcopy(cache)
        twice.batch_select_indices(torch.tensor([1, 0]))
        swapped = {"attention_mask": inputs["attention_mask"].flip(0)}
        want = go_on(model, swapped, length, start.flip(0), twice)[:, :1]
        cache.batch_select_indices(rows)
        got = go_on(model, {"attention_mask": inputs["attention_mask"][1:]}, length, start[1:], cache)
    assert_close(got, want)


def test_rows_that_do_not_exist_change_nothing():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model), torch.no_grad():
        cache = model(**clone(inputs), use_cache=True)[CACHE]
        with pytest.raises(IndexError):
            cache.batch_select_indices(torch.tensor([5]))
        assert ledger_of(cache).batch_size == 2


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_reset_cache_is_a_new_one(option, static):
    """Under the patch and without it."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    positions = positions_of("llava", inputs)
    with patched(model, **OPTIONS[option]):
        want, cache = read(model, inputs, positions, new_cache(model, static))
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert_close(read(model, inputs, positions, cache)[0], want)
        cache.reset()
    got, _ = read(model, inputs, positions, cache)
    assert torch.equal(got, read(clean("llava"), inputs, positions, new_cache(model, static))[0])


def test_a_mask_over_new_tokens_alone_is_refused():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with patched(model), torch.no_grad():
        cache = model(**clone(inputs), use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="attention_mask has 1 columns, the prompt in the KV cache has"):
            model(torch.tensor([[5]]), attention_mask=torch.ones(1, 1, dtype=torch.long), **{CACHE: cache})


# -- who reads it --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", TWO)
def test_a_shortened_cache_wants_a_patched_model(name, option, kind, static):
    """After `unpatch`, after the `with` block and on another model: one sentence, and the cache stays as it
    was.
    """
    model, inputs = subject(name), FAMILIES[name].batch(kind)
    positions, length = positions_of(name, inputs), inputs["input_ids"].shape[1]
    start = positions.reshape(-1, *positions.shape[-2:]).amax((0, 2)) + 1
    with patched(model, **OPTIONS[option]) as spy:
        _, cache = read(model, inputs, positions, new_cache(model, static))
    for reader in (model, clean(name)):
        with pytest.raises(RuntimeError, match="the model that goes on with it is not patched"):
            go_on(reader, inputs, length, start, copy.deepcopy(cache))
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(RuntimeError, match="is not patched"):
            go_on(reader, inputs, length, start, cache)
        assert all(torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers))
    if "qwen" not in name:
        with pytest.raises(RuntimeError, match="is not patched"):
            more = torch.ones(len(start), 1, dtype=torch.long)
            again = {"input_ids": torch.cat([inputs["input_ids"], 5 * more], 1), CACHE: copy.deepcopy(cache)}
            run(model, again | {"attention_mask": torch.cat([inputs["attention_mask"], more], 1)})
    with vtoken.applied(model, Fixed(**OPTIONS[option])):  # patched again
        assert_close(go_on(model, inputs, length, start, cache), wanted(name, inputs, spy, length, start))


@pytest.mark.parametrize("name", NAMES)
def test_other_patches_go_on_right_or_say_so(name):
    """Nested blocks, disabled ones, and patches with other drops or positions."""
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    positions, length = positions_of(name, inputs), inputs["input_ids"].shape[1]
    start = positions.reshape(-1, *positions.shape[-2:]).amax((0, 2)) + 1
    with patched(model) as spy:
        _, cache = read(model, inputs, positions)
        want = wanted(name, inputs, spy, length, start)

        def answer() -> Tensor:
            return go_on(model, inputs, length, start, copy.deepcopy(cache))

        with vtoken.applied(model, "random", budget=0.3):
            assert_close(answer(), want)
            with vtoken.applied(model, "uniform", budget=1.0):
                assert_close(answer(), want)
            with vtoken.disabled(model):
                assert_close(answer(), want)
            with (
                vtoken.applied(model, Fixed(**BOTH)),
                pytest.raises(ValueError, match="drops at other LLM layers"),
            ):
                answer()
            if "qwen" not in name:
                with (
                    vtoken.applied(model, "random", budget=0.3, positions="renumber"),
                    pytest.raises(ValueError, match="positions='original', the present strategy has"),
                ):
                    answer()
        with vtoken.disabled(model):
            assert_close(answer(), want)
        assert_close(answer(), want)
    with pytest.raises(RuntimeError, match="is not patched"), vtoken.disabled(model):
        answer()


@pytest.mark.parametrize("name", NAMES)
def test_the_language_model_alone_goes_on_under_the_patch(name):
    model, inputs = subject(name), FAMILIES[name].batch("one")
    positions = positions_of(name, inputs)
    with patched(model, **BOTH), torch.no_grad():
        _, cache = read(model, inputs, positions)
        last = positions[..., -1:].amax() + 1 + torch.zeros_like(positions[..., -1:])
        ids, other = torch.tensor([[7]]), copy.deepcopy(cache)
        want = model(ids, position_ids=last, **{CACHE: cache}).logits
        got = model.get_decoder()(
            inputs_embeds=model.get_input_embeddings()(ids), position_ids=last, **{CACHE: other}
        )
        assert_close(model.get_output_embeddings()(got.last_hidden_state), want)
    with pytest.raises(RuntimeError, match="is not patched"):
        model.get_decoder()(input_ids=ids, position_ids=last, **{CACHE: other})


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_without_a_gap_is_anybodys(name, option):
    """Cropped to before the picture it is what an unpatched model made, and may be read by one."""
    model, inputs = subject(name), FAMILIES[name].batch("one")
    positions, length = positions_of(name, inputs), lengths_of(FAMILIES[name], inputs)["before"]
    start = torch.tensor([length])
    with patched(model, **OPTIONS[option]):
        _, cache = read(model, inputs, positions)
        cache.crop(length - int(cache.get_seq_length()))
    _, other = read(model, inputs, positions)
    other.crop(length - int(other.get_seq_length()))
    assert_close(go_on(model, inputs, length, start, cache), go_on(model, inputs, length, start, other))


def test_an_error_in_a_patched_forward_leaves_no_door_open():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with patched(model), torch.no_grad():
        cache = model(**clone(inputs), use_cache=True)[CACHE]
        layer = model.get_decoder().layers[3]
        hook = layer.register_forward_pre_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.tensor([[5]]), **{CACHE: cache})
        hook.remove()
    with pytest.raises(RuntimeError, match="is not patched"), torch.no_grad():
        model(torch.tensor([[5]]), **{CACHE: cache})


def test_an_interrupted_forward_leaves_no_door_open():
    def interrupt(*args):
        raise KeyboardInterrupt

    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with patched(model), torch.no_grad():
        cache = model(**clone(inputs), use_cache=True)[CACHE]
        hook = model.get_decoder().layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([[5]]), **{CACHE: cache})
        hook.remove()
    with pytest.raises(RuntimeError, match="is not patched"), torch.no_grad():
        model(torch.tensor([[5]]), **{CACHE: cache})


# -- copies --------------------------------------------------------------------------------------------------
FRESH = """
import sys, torch
cases = torch.load(sys.argv[1], weights_only=False)
import vtoken
from tests.mechanism.fixed import Fixed
from tests.models import FAMILIES
from tests.mechanism.test_caches import go_on
for name, inputs, length, start, options, cache, want in cases:
    model = FAMILIES[name].build()
    with vtoken.applied(model, Fixed(**options)):
        got = go_on(model, inputs, length, start, cache)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max(), name
    cache.crop(-(length // 2))
    assert int(cache.get_seq_length()) == length + 4 - length // 2
print(len(cases))
"""


def test_a_cache_goes_on_in_a_fresh_process(tmp_path):
    cases = []
    for name in NAMES[:3]:
        for option, static in (("before", False), ("both", True), ("aligned", False)):
            model, inputs = subject(name), FAMILIES[name].batch("ragged")
            positions, length = positions_of(name, inputs), inputs["input_ids"].shape[1]
            start = positions.reshape(-1, *positions.shape[-2:]).amax((0, 2)) + 1
            with patched(model, **OPTIONS[option]):
                _, cache = read(model, inputs, positions, new_cache(model, static))
                want = go_on(model, inputs, length, start, copy.deepcopy(cache))
            cases.append((name, inputs, length, start, OPTIONS[option], cache, want))
    if not hasattr(StaticLayer, "crop"):
        cases = [case for case in cases if case[4] is not BOTH]
    torch.save(cases, tmp_path / "caches.pt")
    root = Path(vtoken.__file__).parents[1]
    command = [sys.executable, "-c", FRESH, str(tmp_path / "caches.pt")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == [str(len(cases))]


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save", "copy of a layer"])
@pytest.mark.parametrize("name", NAMES[:3])
def test_copies_in_this_process(name, how):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    positions, length = positions_of(name, inputs), inputs["input_ids"].shape[1]
    start = positions.reshape(-1, *positions.shape[-2:]).amax((0, 2)) + 1
    with patched(model, **ALIGNED) as spy:
        _, cache = read(model, inputs, positions)
        if how == "pickle":
            other = pickle.loads(pickle.dumps(cache))
        elif how == "torch.save":
            torch.save(cache, file := io.BytesIO())
            other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        else:
            other = copy.deepcopy(cache)
        if how == "copy of a layer":
            other.layers[2] = copy.copy(other.layers[2])
        assert [type(x) for x in other.layers] == [type(x) for x in cache.layers]
        other.crop(-1)
        assert int(cache.get_seq_length()) == length
        assert_close(go_on(model, inputs, length, start, cache), wanted(name, inputs, spy, length, start))
        start, length = start - 1, length - 1
        assert_close(go_on(model, inputs, length, start, other), wanted(name, inputs, spy, length, start))


# -- chunks --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunk", [3, 5])
@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("name", [n for n in SOME if n != "idefics3"])
def test_a_chunk_may_lose_all_its_tokens(name, kind, chunk, static):
    options = dict(prefill_chunk_size=chunk)
    options |= dict(cache_implementation="static", disable_compile=True) if static else {}
    inputs = FAMILIES[name].batch(kind)
    try:
        assert_same(run(clean(name), inputs, **options), inputs, oracle.generate(clean(name), inputs))
    except Exception:
        pytest.skip("the unpatched model disagrees with itself")
    strategy = Fixed()
    strategy.select = lambda tokens: vtoken.Selection(torch.tensor([0, len(tokens) - 1]))
    model = subject(name)
    with patched(model, strategy) as spy:
        out = run(model, inputs, **options)
        assert_same(out, inputs, expected(name, inputs, spy))


def test_a_forward_may_lose_all_its_tokens_but_the_last():
    """A picture in a forward of its own, of which the strategy keeps nothing: an answer might be read from
    its end.
    """
    family, model = FAMILIES["llava"], subject("llava")
    inputs = family.batch("one")
    visual = family.visual(inputs)[0].nonzero()[:, 0]
    first, last = int(visual[0]), int(visual[-1]) + 1
    strategy = Fixed()
    strategy.select = lambda tokens: vtoken.Selection(torch.empty(0, dtype=torch.long))
    ids = inputs["input_ids"]
    with patched(model, strategy) as spy, torch.no_grad():
        cache = model(ids[:, :first], use_cache=True)[CACHE]
        model(ids[:, first:last], pixel_values=inputs["pixel_values"], **{CACHE: cache})
        got = model(ids[:, last:], **{CACHE: cache}).logits[:, -1]
        spy.items = [(n, vtoken.Selection(torch.tensor([n - 1]))) for n, _ in spy.items]
        assert_close(got, expected("llava", inputs, spy, 1)[1][0])
        assert int(cache.get_seq_length()) == ids.shape[1]
