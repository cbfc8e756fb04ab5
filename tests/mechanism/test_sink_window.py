"""The window over the KV cache, against a decoder that is written out in eviction_oracle.py."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.models.common import LM, text
from tests.oracle import CACHE, clone
from vtoken.mechanism import cache_window

from .common import assert_close, clean, run, subject
from .eviction_oracle import WindowRow, exact, follow, heard
from .fixed import patched
from .test_turns import first_turn

NAMES = ("llava", "qwen2_5_vl", "qwen3_vl")
STEPS = 24
SMALL = dict(sinks=3, recent=14)


@functools.cache
def precise(name: str):
    return exact(FAMILIES[name].build())


def wanted(model, prompts, said, sinks: int, recent: int) -> torch.Tensor:
    """(steps, B, vocabulary): logits after the prompt, and after each token said (B, n) but the last."""
    rows = [follow(WindowRow(model, sinks, recent), p, s[:-1]) for p, s in zip(prompts, said, strict=True)]
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("sinks", "recent"), [(4, 9), (0, 12), (2, 60), (3, 500)])
@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_fresh_attention_over_what_is_kept(name, kind, sinks, recent):
    model, inputs = precise(name), FAMILIES[name].batch(kind, torch.float64)
    prompts = oracle.capture(model, inputs)
    with vtoken.applied(model, "sink_window", sinks=sinks, recent=recent), heard(model) as logits:
        out = run(model, inputs, STEPS)
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    want = wanted(model, prompts, said, sinks, recent)
    assert_close(torch.stack(logits), want, 1e-9)
    stored, read = out[CACHE].layers[0].keys.shape[2], inputs["input_ids"].shape[1] + STEPS - 1
    assert stored == min(sinks + recent, max(map(len, prompts)) + STEPS - 1)
    assert {int(out[CACHE].get_seq_length(i)) for i in range(4)} == {read}
    if stored < read and kind == "one":
        dense = run(clean(name), FAMILIES[name].batch(kind), 2).logits[-1]
        assert (out.logits[-1] - dense).abs().max() > 1e-2


def test_positions_of_text_count_from_zero_inside_the_cache():
    row = WindowRow(clean("llava"), 2, 3)
    row.positions, row.lost = torch.tensor([[0, 1, 40, 41, 42, 43]]), True
    assert row.places().tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_positions_stay_small(name, kind, monkeypatch):
    """Counted anew several times, in a conversation of two turns, the answers are the same."""
    monkeypatch.setattr(cache_window, "FAR", 5)
    model, inputs = precise(name), FAMILIES[name].batch(kind, torch.float64)
    prompts, start = oracle.capture(model, inputs), inputs["input_ids"].shape[1]
    with vtoken.applied(model, "sink_window", sinks=2, recent=6), heard(model) as logits:
        _, again = first_turn(model, inputs, 60)
        out = run(model, again, 30)
    ledger = out[CACHE].layers[0].ledger
    assert ledger.origin > 60 and int(ledger.places.max()) < 60
    rows = zip(prompts, out.sequences[:, start:], strict=True)
    want = [follow(WindowRow(model, 2, 6), p, s[:-1], [1] * 59 + [6] + [1] * 29) for p, s in rows]
    assert_close(torch.stack(logits), torch.stack(want, 1), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_on_the_same_cache(name):
    model, inputs = precise(name), FAMILIES[name].batch("ragged", torch.float64)
    prompts, read = oracle.capture(model, inputs), inputs["input_ids"].shape[1]
    with vtoken.applied(model, "sink_window", **SMALL), heard(model) as logits:
        _, again = first_turn(model, inputs, 20)
        out = run(model, again, 6)
    said = out.sequences[:, read:]
    turns = [1] * 19 + [6] + [1] * 5
    rows = [follow(WindowRow(model, **SMALL), p, s[:-1], turns) for p, s in zip(prompts, said, strict=True)]
    assert_close(torch.stack(logits), torch.stack(rows, 1), 1e-9)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_a_projector_strategy(name):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    with patched(model, vtoken.strategies.combine(["random", "sink_window"], 0.4, sink_window=SMALL)) as spy:
        out = run(model, inputs, STEPS)
    keep, _ = spy.in_front(FAMILIES[name], inputs)
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert_close(
        torch.stack(out.logits),
        wanted(clean(name), oracle.shortened(clean(name), inputs, keep), said, **SMALL),
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_prompts_without_pictures_slide_too(name):
    model = precise(name)
    ids = torch.tensor([[0, 0, *text(9, 1)], text(11, 2)])
    inputs = dict(input_ids=ids, attention_mask=(ids > 0).long())
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    prompts = oracle.capture(model, inputs)
    with vtoken.applied(model, "sink_window", sinks=2, recent=9), heard(model) as logits:
        out = run(model, inputs, 12)
    assert out[CACHE].layers[0].keys.shape[2] == 11
    assert_close(torch.stack(logits), wanted(model, prompts, out.sequences[:, 11:], 2, 9), 1e-9)


def test_a_forward_that_makes_its_own_cache():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "sink_window", **SMALL):
        with torch.no_grad():
            out = model(**clone(inputs), use_cache=True)
        assert_close(out.logits, clean("llava")(**clone(inputs)).logits)
    assert out[CACHE].layers[3].keys.shape[2] == 17
    assert out[CACHE].get_seq_length() == inputs["input_ids"].shape[1]


def test_beams():
    """Beams of one prompt, against the same sequences scored alone."""
    model, inputs = precise("llava"), FAMILIES["llava"].batch("one", torch.float64)
    prompts, length = oracle.capture(model, inputs), inputs["input_ids"].shape[1]
    with vtoken.applied(model, "sink_window", **SMALL):
        out = run(model, inputs, STEPS, num_beams=3, num_return_sequences=3, output_scores=True)
    said = out.sequences[:, length:]
    logits = wanted(model, [p for p in prompts for _ in range(3)], said, **SMALL)
    chosen = logits.log_softmax(-1).gather(-1, said.T[..., None]).sum((0, 2)) / STEPS
    assert_close(out.sequences_scores, chosen, 1e-6)


def test_copies_and_pickles():
    model, inputs = subject("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch("one")
    with vtoken.applied(model, "sink_window", **SMALL):
        _, again = first_turn(model, inputs, 20)
        copies = [copy.deepcopy(again), again | {CACHE: pickle.loads(pickle.dumps(again[CACHE]))}]
        first, *others = (run(model, x, 4).logits for x in (again, *copies))
    for other in others:
        assert torch.equal(torch.stack(first), torch.stack(other))


def cropped(model, inputs):
    out = run(model, inputs, 2)
    out[CACHE].crop(-1)


def unpatched(model, inputs):
    _, again = first_turn(model, inputs, 4)
    vtoken.unpatch(model)
    run(model, again, 1)


def static(model, inputs):
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    run(model, inputs | {CACHE: cache}, 2)


def offloaded(model, inputs):
    cache = DynamicCache()
    cache.offloading = True
    run(model, inputs | {CACHE: cache}, 2)


REFUSED = {
    "crop": (cropped, "lost tokens to make room cannot be cropped"),
    "unpatched": (unpatched, "the model that goes on with it is not patched"),
    "static": (static, "found StaticLayer: use a DynamicCache"),
    "offloaded": (offloaded, "found an offloaded cache"),
    "drafts": (lambda m, x: run(m, x, 3, prompt_lookup_num_tokens=2), "leave out assistant_model"),
    "no cache": (lambda m, x: run(m, x, 2, use_cache=False), "acts on the KV cache, found use_cache=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_in_use(case):
    act, why = REFUSED[case]
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with (
        vtoken.applied(model, "sink_window", **SMALL),
        pytest.raises((NotImplementedError, RuntimeError), match=why),
    ):
        act(model, inputs)


def test_drafts_are_welcome_where_nothing_goes():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    plain = run(clean("llava"), inputs, 6).sequences
    with vtoken.applied(model, "sink_window"):
        assert run(model, inputs, 6, prompt_lookup_num_tokens=2).sequences.tolist() == plain.tolist()


def test_a_cache_of_before_has_no_known_positions():
    model, inputs = subject("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch("one")
    _, again = first_turn(model, inputs, 4)
    with (
        vtoken.applied(model, "sink_window", **SMALL),
        pytest.raises(NotImplementedError, match="filled before its strategy was there: start"),
    ):
        run(model, again, 2)
    model = subject("llava")
    _, again = first_turn(model, FAMILIES["llava"].batch("one"), 4)
    with vtoken.applied(model, "sink_window", **SMALL):
        run(model, again, 2)
    assert again[CACHE].layers[0].keys.shape[2] == 17


@pytest.mark.parametrize(
    ("name", "strategy", "why"),
    [
        ("gemma3", "sink_window", "whose layers all cache one slot per token"),
        ("llava", ["fastv", "sink_window"], "use it with a projector strategy"),
        ("aya_vision", "sink_window", r"turn the two halves|one slot per token"),
    ],
)
def test_refusals_when_patched(name, strategy, why):
    with pytest.raises(ValueError, match=why):
        vtoken.patch(subject(name), strategy)


def test_tables_that_depend_on_the_length():
    model = FAMILIES["llava"].build()
    model.get_decoder().config.rope_parameters |= dict(rope_type="dynamic", factor=2.0)
    with pytest.raises(ValueError, match="rotary tables that do not change with the length"):
        vtoken.patch(model, "sink_window")


def test_the_report_tells_the_bytes_of_the_cache():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with vtoken.applied(model, "sink_window", **SMALL):
        cache = run(model, inputs, 10)[CACHE]
        report = vtoken.report(model)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values, layer.beside["sinks"])]
    assert report.kv_bytes == sum(t.numel() * t.element_size() for t in tensors)
    per_token = 2 * 4 * 2 * (LM["hidden_size"] // 4) * LM["num_hidden_layers"]
    assert report.kv_bytes_dense == (int(inputs["attention_mask"].sum()) + 2 * 9) * per_token
    assert "KV cache of the prompts and 9 tokens of the answer" in str(report)
