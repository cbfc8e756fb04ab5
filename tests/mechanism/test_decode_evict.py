"""Visual tokens that leave the KV cache during the answer, against a decoder written out in
eviction_oracle.py.
"""

from __future__ import annotations

import functools

import pytest
import torch

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.models.common import LM
from tests.oracle import CACHE

from .common import assert_close, clean, run, subject
from .eviction_oracle import AnswerRow, exact, follow, heard
from .fixed import patched
from .test_turns import first_turn

NAMES = ("llava", "qwen2_5_vl", "qwen3_vl")
OPTIONS = dict(budget=0.25, decode_every=3, rounds=2)


@functools.cache
def precise(name: str):
    return exact(FAMILIES[name].build())


def rows_of(
    name: str, model, inputs: dict, budget: float | int, keep=None, newest: bool = False
) -> list[AnswerRow]:
    visual, rows = FAMILIES[name].visual(inputs), []
    for b, prompt in enumerate(oracle.shortened(model, inputs, keep)):
        seen = visual[b, prompt.index]
        total = int(seen.sum())
        wanted = min(total, max(1, round(total * budget) if isinstance(budget, float) else budget))
        rows.append(AnswerRow(model, seen, wanted, 3, 2, newest))
    return rows


def wanted_logits(rows, prompts, said):
    each = [follow(row, p, s[:-1]) for row, p, s in zip(rows, prompts, said, strict=True)]
    return torch.stack(each, 1)


@pytest.mark.parametrize("queries", ["all", "newest"])
@pytest.mark.parametrize("kind", ["one", "ragged", "text_only_row"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_written_out_decoder(name, kind, queries):
    model, inputs = precise(name), FAMILIES[name].batch(kind, torch.float64)
    start, prompts = inputs["input_ids"].shape[1], oracle.capture(model, inputs)
    with vtoken.applied(model, "decode_evict", queries=queries, **OPTIONS), heard(model) as logits:
        out = run(model, inputs, 12)
    said, cache = out.sequences[:, start:], out[CACHE]
    rows = rows_of(name, model, inputs, 0.25, newest=queries == "newest")
    assert_close(torch.stack(logits), wanted_logits(rows, prompts, said), 1e-9)
    stored = max(len(row.visual[0]) for row in rows)
    assert {layer.keys.shape[2] for layer in cache.layers} == {stored}
    assert {int(cache.get_seq_length(i)) for i in range(4)} == {start + 11}
    for b, row in enumerate(rows):
        assert sum(row.visual[0]) == row.wanted or not row.total
        for i, layer in enumerate(cache.layers):
            noted = layer.beside["visual"][b].tolist()
            filled = [False] * (stored - len(row.visual[i])) + row.visual[i]
            assert noted == filled[: len(noted)] and not any(filled[len(noted) :])


def test_layers_keep_different_tokens():
    model, inputs = precise("llava"), FAMILIES["llava"].batch("one", torch.float64)
    rows = rows_of("llava", model, inputs, 0.25)
    prompts = oracle.capture(model, inputs)
    follow(rows[0], prompts[0], torch.arange(5, 15))
    assert len({tuple(p.tolist()) for p in rows[0].of_layer}) > 1


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_a_projector_strategy_and_a_whole_number(name):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    both = vtoken.strategies.combine(["random", "decode_evict"], 0.6, decode_evict=OPTIONS | dict(budget=2))
    with patched(model, both) as spy:
        out = run(model, inputs, 9)
    keep, _ = spy.in_front(FAMILIES[name], inputs)
    rows = rows_of(name, clean(name), inputs, 2, keep)
    rows[1].wanted = 4  # of two images
    prompts = oracle.shortened(clean(name), inputs, keep)
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert_close(torch.stack(out.logits), wanted_logits(rows, prompts, said))


def test_a_second_turn_goes_on_with_what_is_left():
    """The question of the second turn asks nothing; the next answer evicts no more once the budget is reached."""
    model, inputs = precise("llava"), FAMILIES["llava"].batch("ragged", torch.float64)
    prompts, read = oracle.capture(model, inputs), inputs["input_ids"].shape[1]
    with vtoken.applied(model, "decode_evict", **OPTIONS), heard(model) as logits:
        _, again = first_turn(model, inputs, 9)
        stored = again[CACHE].layers[0].keys.shape[2]
        out = run(model, again, 5)
    assert out[CACHE].layers[0].keys.shape[2] == stored + 6 + 4
    assert len(logits) == 14 and int(out[CACHE].get_seq_length()) == read + 9 + 5 + 4
    said = out.sequences[:, read:]
    rows = rows_of("llava", model, inputs, 0.25)
    for b, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        embed = model.get_input_embeddings()
        with torch.no_grad():
            follow(row, prompt, said[b, :8])
            last = int(prompt.positions.max())
            row.every = 10**9
            got = [
                row.read(embed(said[b, t : t + 1]), torch.tensor([last + 1 + t]))[-1] for t in range(8, 18)
            ]
        assert_close(torch.stack([x[b] for x in logits[9:]]), torch.stack(got[5:]), 1e-9)


def test_beams():
    model, inputs = precise("llava"), FAMILIES["llava"].batch("one", torch.float64)
    prompts, length = oracle.capture(model, inputs), inputs["input_ids"].shape[1]
    with vtoken.applied(model, "decode_evict", **OPTIONS):
        out = run(model, inputs, 9, num_beams=3, num_return_sequences=3, output_scores=True)
    said = out.sequences[:, length:]
    rows = [row for _ in range(3) for row in rows_of("llava", model, inputs, 0.25)]
    logits = wanted_logits(rows, [p for p in prompts for _ in range(3)], said)
    chosen = logits.log_softmax(-1).gather(-1, said.T[..., None]).sum((0, 2)) / 9
    assert_close(out.sequences_scores, chosen, 1e-6)


def test_crop_within_the_answer_and_not_before():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "decode_evict", **OPTIONS):
        cache = run(model, inputs, 6)[CACHE]
        length = int(cache.get_seq_length())
        cache.crop(-2)
        assert int(cache.get_seq_length()) == length - 2
        with pytest.raises(NotImplementedError, match="cannot be cropped to before it lost them"):
            cache.crop(-1)


def test_short_answers_change_nothing():
    model, inputs = subject("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch("ragged")
    plain = run(clean("qwen2_5_vl"), inputs, 5)
    for strategy in (
        dict(strategy="decode_evict"),
        dict(strategy="decode_evict", budget=1.0, decode_every=1),
    ):
        with vtoken.applied(model, **strategy):
            out = run(model, inputs, 5)
        assert out.sequences.tolist() == plain.sequences.tolist()
        assert_close(torch.stack(out.logits), torch.stack(plain.logits))


def test_refusals():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "decode_evict", **OPTIONS):
        with pytest.raises(NotImplementedError, match="leave out assistant_model"):
            run(model, inputs, 6, prompt_lookup_num_tokens=2)
        with pytest.raises(NotImplementedError, match="acts on the KV cache, found use_cache=False"):
            run(model, inputs, 6, use_cache=False)
        _, again = first_turn(model, inputs, 6)
    with pytest.raises(RuntimeError, match="the model that goes on with it is not patched"):
        run(model, again, 2)
    for strategy in ("sink_window", ["fastv", "decode_evict"]):
        with pytest.raises(ValueError, match=r"projector strategy|choose one of them"):
            vtoken.patch(model, ["decode_evict", strategy] if isinstance(strategy, str) else strategy)


def test_the_report_tells_the_bytes_of_the_cache():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with vtoken.applied(model, "decode_evict", **OPTIONS):
        cache = run(model, inputs, 9)[CACHE]
        report = vtoken.report(model)
    tensors = [t for x in cache.layers for t in (x.keys, x.values, *x.beside.values(), *sum(x.asked, ()))]
    assert report.kv_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert report.kv_bytes < report.kv_bytes_dense
    assert report.kv_bytes_dense % (2 * 4 * 2 * (LM["hidden_size"] // 4) * LM["num_hidden_layers"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        pytest.param("sink_window", dict(recent=14), id="window", marks=pytest.mark.product),
        pytest.param("decode_evict", OPTIONS, id="evict"),
    ],
)
def test_compiled_decode_is_right(strategy, options):
    """torch.compile breaks the graph where a cache loses tokens, and the answer stays."""
    torch.compiler.reset()
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")

    def logits(forward) -> torch.Tensor:
        out, said = model(**inputs, use_cache=True), []
        cache, length = out[CACHE], inputs["input_ids"].shape[1]
        for i in range(8):
            mask = torch.ones(1, length + i + 1, dtype=torch.long)
            token = oracle.pick(out.logits[:, -1:])
            out = forward(input_ids=token, attention_mask=mask, use_cache=True, **{CACHE: cache})
            said.append(out.logits[:, -1])
        return torch.stack(said)

    with vtoken.applied(model, strategy, **options), torch.no_grad():
        want = logits(model)
        assert_close(logits(torch.compile(model.forward, backend="eager")), want)
