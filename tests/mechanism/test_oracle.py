"""The oracle itself: nothing dropped equals the unpatched model, and its two ways of shortening agree."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.models import FAMILIES

from .common import EFFECT, assert_close, assert_same, clean, random_keep, run


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["ragged", "text_only_row"])
def test_nothing_dropped_is_the_unpatched_model(name, kind):
    model, inputs = clean(name), FAMILIES[name].batch(kind)
    out = run(model, inputs)
    assert_same(out, inputs, oracle.generate(model, inputs))
    everything = torch.ones_like(inputs["attention_mask"]).bool()
    if FAMILIES[name].inside:
        assert_same(out, inputs, oracle.generate(model, inputs, drop={0: everything}))


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.inside])
def test_shortened_embeddings_are_masked_tokens(name):
    family, model = FAMILIES[name], clean(name)
    inputs = family.batch("ragged")
    keep = random_keep(family, inputs)
    short = oracle.generate(model, inputs, keep)
    masked = oracle.generate(model, inputs, drop={0: keep}, forced=short[0])
    assert_close(masked[1], short[1])
    later = oracle.generate(model, inputs, drop={2: keep}, forced=short[0])
    assert (later[1] - short[1]).abs().max() > EFFECT


def test_merging_by_matrix():
    family, model = FAMILIES["llava"], clean("llava")
    inputs = family.batch("ragged")
    keep = random_keep(family, inputs)
    pick, mean = [], []
    for b, visual in enumerate(family.visual(inputs)):
        rows = keep[b][visual]
        pick.append(torch.eye(int(visual.sum()))[rows])
        mean.append(pick[-1] * 0.5 + 0.5 / int(visual.sum()))
    plain = oracle.generate(model, inputs, keep)
    assert_close(oracle.generate(model, inputs, keep, merge=pick)[1], plain[1], 0)
    merged = oracle.generate(model, inputs, keep, merge=mean, forced=plain[0])[1]
    assert (merged - plain[1]).abs().max() > EFFECT
    # the same merge inside the language model, in front of layer 0 and at full length
    mix = []
    for b, prompt in enumerate(oracle.capture(model, inputs)):
        visual, kept = family.visual(inputs)[b, prompt.index], keep[b, prompt.index]
        matrix = torch.eye(len(prompt))
        block = matrix[visual & kept]
        block[:, visual] = mean[b]
        matrix[visual & kept] = block
        mix.append({0: matrix})
    assert_close(oracle.generate(model, inputs, drop={0: keep}, mix=mix, forced=plain[0])[1], merged)


def test_loss_is_that_of_the_unpatched_model():
    family, model = FAMILIES["llava"], clean("llava")
    inputs = family.batch("ragged")
    labels = inputs["input_ids"].masked_fill(family.visual(inputs) | (inputs["attention_mask"] == 0), -100)
    everything = torch.ones_like(labels).bool()
    want = model(**inputs, labels=labels).loss
    # the first label of a left-padded row is predicted from padding, which the oracle does not have
    first = inputs["attention_mask"].argmax(1)
    labels[torch.arange(len(labels)), first] = -100
    want = model(**inputs, labels=labels).loss
    assert_close(oracle.loss(model, inputs, labels, everything), want)
