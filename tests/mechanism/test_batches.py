"""Tokens dropped before the language model: every kind of batch generates what the oracle generates."""

from __future__ import annotations

import pytest
import torch

from tests.models import FAMILIES, KINDS

from .common import (
    ALIGNED,
    BOTH,
    FRONT,
    INSIDE,
    ONE_ROPE,
    PATCHABLE,
    SOME,
    assert_moved,
    assert_same,
    consistent,
    everywhere,
    expected,
    new_ids,
    recurrent,
    run,
    subject,
)
from .fixed import patched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATCHABLE)
def test_greedy(name, kind):
    model, inputs = subject(name), FAMILIES[name].batch(kind)
    with patched(model) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)


@pytest.mark.parametrize("name", PATCHABLE)
def test_merging(name):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    with patched(model, merge=True) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))
    spy.items = [(n, type(s)(s.keep)) for n, s in spy.items]
    assert (expected(name, inputs, spy)[1] - torch.stack(out.logits)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, FRONT, id=f"{name}-before") for name in ONE_ROPE]
    + [pytest.param(n, dict(BOTH, layers=(1, 3)), id=f"{n}-both") for n in ONE_ROPE if n in INSIDE],
)
def test_renumbered_positions(name, options):
    if options.get("layers") and name not in INSIDE:
        pytest.skip("no drops inside this LLM")
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    with patched(model, positions="renumber", **options) as spy:
        out = run(model, inputs)
    want = expected(name, inputs, spy, renumber=True)
    assert_same(out, inputs, want)
    assert (want[1] - expected(name, inputs, spy)[1]).abs().max() > 1e-2


@everywhere(before=FRONT, aligned=ALIGNED)
def test_static_cache(name, options):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    static = dict(cache_implementation="static", disable_compile=True)
    if not consistent(name, inputs, **static):
        pytest.skip("the unpatched model disagrees with itself")
    with patched(model, **options) as spy:
        out = run(model, inputs, **static)
    assert_same(out, inputs, expected(name, inputs, spy))


@everywhere(never=("aligned",), before=FRONT)
def test_without_cache(name, options):
    """Every step reads the whole prompt again, and the strategy is asked again: it must have the same answer."""
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    if not consistent(name, inputs, use_cache=False):
        pytest.skip("the unpatched model disagrees with itself")
    with patched(model, **options) as spy:
        run(model, inputs, steps=1, use_cache=False)
        want = expected(name, inputs, spy)
        out = run(model, inputs, use_cache=False)
    assert_same(out, inputs, want)
    assert_moved(out, name, inputs)


@pytest.mark.parametrize(("name", "size"), [(n, 7) for n in PATCHABLE] + [(n, 20) for n in SOME])
def test_chunked_prefill(name, size):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    if not consistent(name, inputs, prefill_chunk_size=size):
        pytest.skip("the unpatched model disagrees with itself")
    with patched(model) as spy:
        if recurrent(name):
            with pytest.raises(NotImplementedError, match="recurrent layers would read filler"):
                run(model, inputs, prefill_chunk_size=size)
            return
        out = run(model, inputs, prefill_chunk_size=size)
    assert_same(out, inputs, expected(name, inputs, spy))
    assert_moved(out, name, inputs)


@pytest.mark.parametrize("name", PATCHABLE)
def test_text_only_prompts_are_untouched(name):
    model = subject(name)
    inputs = FAMILIES[name].prompt([[]])
    inputs["input_ids"], inputs["attention_mask"] = (
        inputs["input_ids"].repeat(2, 1),
        inputs["attention_mask"].repeat(2, 1),
    )
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    plain = run(model, inputs)
    with patched(model) as spy:
        out = run(model, inputs)
    assert not spy.items
    assert torch.equal(new_ids(out, inputs), new_ids(plain, inputs))
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
