"""transformers' own quantised and offloaded caches, which hold a shortened prompt as they hold any other."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import QuantizedCache

import vtoken
from tests import oracle
from tests.models import FAMILIES
from tests.oracle import CACHE
from vtoken import strategies

from .common import assert_close, assert_same, clean, expected, new_ids, run, subject
from .fixed import patched
from .packed_oracle import decode

NEEDS = {"quanto": ("optimum", "optimum.quanto", "ninja"), "hqq": ("hqq", "hqq.core.quantize", "termcolor")}
SIZES = dict(nbits=4, q_group_size=8, residual_length=3)
AXES = {"quanto": {}, "hqq": dict(axis_key=1, axis_value=1)}  # hqq takes other axes than transformers' own

MUSTDROP = strategies.create("mustdrop", budget=0.5, merging=False)


def here(backend: str) -> bool:
    top, *rest = NEEDS[backend]
    return importlib.util.find_spec(top) is not None and all(map(importlib.util.find_spec, rest))


backends = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.skipif(not here(b), reason=f"{b} is not installed")) for b in NEEDS],
)


def options(backend: str) -> dict:
    return dict(
        cache_implementation="quantized", cache_config=dict(backend=backend, **SIZES, **AXES[backend])
    )


@backends
@pytest.mark.parametrize("name", ["hired", "divprune", "farcover"])
def test_a_shortened_prompt_in_a_quantised_cache(name, backend):
    """As the unpatched model reads it, given the kept tokens alone, from the same back-end."""
    model, plain, inputs = subject("llava"), clean("llava"), FAMILIES["llava"].batch("one")
    with patched(model, strategies.create(name, budget=0.5)) as spy:
        out = run(model, inputs, 8, **options(backend))
    prompts = oracle.shortened(plain, inputs, spy.in_front(FAMILIES["llava"], inputs)[0])
    config = plain.config.get_text_config()
    cache = QuantizedCache(backend=backend, config=config, **SIZES, **AXES[backend])
    assert_same(out, inputs, decode(plain, prompts, [cache], 8))
    assert int(out[CACHE].get_seq_length()) == inputs["input_ids"].shape[1] + 7


@backends
def test_batches_and_drops_inside_the_llm_keep_their_first_answer(backend):
    """Rows of a batch share groups there, so that later logits are not those of a row alone."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    for strategy in (strategies.create("hired", budget=0.5), strategies.create("fastv", budget=0.5, layer=2)):
        with patched(model, strategy) as spy:
            out = run(model, inputs, 6, **options(backend))
        assert_close(out.logits[0], expected("llava", inputs, spy, 1)[1][0])
        assert new_ids(out, inputs).shape == (2, 6) and torch.stack(out.logits).isfinite().all()


@backends
def test_what_cannot_be_quantised_so_is_refused(backend):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    for strategy, words in (
        (MUSTDROP, "be shortened after prefill, found .*QuantizedLayer: use a Dynamic.*align_cache=False"),
        (strategies.create("vidkv"), "its own form, found .*QuantizedLayer: use a DynamicCache"),
    ):
        with vtoken.applied(model, strategy), pytest.raises(NotImplementedError, match=words):
            run(model, inputs, 1, **options(backend))


class Stream:
    """In place of a stream of an accelerator, where there is none: everything is done at once."""

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "more"), [("hired", {}), ("divprune", {}), ("farcover", {}), ("fastv", dict(layer=2))]
)
def test_a_shortened_prompt_in_an_offloaded_cache(name, more, monkeypatch):
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, strategies.create(name, budget=0.5, **more)) as spy:
        out = run(model, inputs, cache_implementation="offloaded")
    assert out[CACHE].offloading
    assert_same(out, inputs, expected("llava", inputs, spy))
    for other in (MUSTDROP, strategies.create("vidkv")):
        with (
            vtoken.applied(model, other),
            pytest.raises(NotImplementedError, match="found an offloaded cache"),
        ):
            run(model, inputs, 1, cache_implementation="offloaded")
