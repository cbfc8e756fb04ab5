"""MMTok against loops over words and tokens in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtoken
from tests.mechanism.common import assert_same, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.strategies import create
from vtoken.strategies.mmtok import STOP_WORDS, stop_ids
from vtoken.tokens import Segment

from .common import LAYERS, answer, anyres, build, image, kept_per_segment, separators_kept, video
from .test_scope import INPUTS, compared, cosine, places_of


def softmax(values):
    high = max(values)
    e = [math.exp(v - high) for v in values]
    return [x / sum(e) for x in e]


def matrix(tokens, s, vision="tower", text=0.02, picture=0.2, alpha=0.5):
    """[words + n][n]: how well each visual token covers each word and visual token."""
    rows, _ = places_of(tokens)[s]
    v, u = tokens.features[rows].double(), compared(tokens, s, vision)
    z = [] if tokens.text_embeddings is None else tokens.text_embeddings.double()
    words = [[p / len(z) for p in softmax([cosine(w, x) / text for x in v])] for w in z]
    return words + [[alpha * q / len(u) for q in softmax([cosine(a, b) / picture for b in u])] for a in u]


def greedy(c, k, excluded=()):
    covered, chosen = [0.0] * len(c), []
    for _ in range(min(k, len(c[0]) - len(excluded))):
        left = [j for j in range(len(c[0])) if j not in chosen and j not in excluded]
        gain = {j: sum(max(0.0, row[j] - b) for row, b in zip(c, covered, strict=True)) for j in left}
        # gains may tie nearly where tokens are alike to none: the first is taken
        chosen.append(min(j for j in left if gain[j] >= max(gain.values()) * (1 - 1e-5)))
        covered = [max(b, row[chosen[-1]]) for row, b in zip(c, covered, strict=True)]
    return chosen, sum(covered)


def naive(tokens, counts, **options):
    keep = []
    for s, (rows, _) in enumerate(places_of(tokens)):
        if rows:
            keep += [rows[i] for i in greedy(matrix(tokens, s, **options), counts[s])[0]]
    return sorted(keep)


@pytest.mark.parametrize("kind", INPUTS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    budget=st.sampled_from([1, 0.2, 0.5, 0.8, 7]),
    options=st.sampled_from([{}, {"vision": "projected"}, {"alpha": 2.0}, {"text": 0.1, "picture": 0.4}]),
)
def test_equals_loops(kind, seed, budget, options):
    tokens = INPUTS[kind](seed)
    names = {"text": "text_temperature", "picture": "vision_temperature"}
    strategy = create("mmtok", budget=budget, **{names.get(k, k): v for k, v in options.items()})
    counts = strategy.counts(tokens.segments)
    assert answer(strategy, tokens).keep.tolist() == naive(tokens, counts, **options)


def test_one_word_and_no_weight_of_the_picture_keep_the_nearest_token():
    tokens = image(5, 5, seed=2, text=1)
    nearest = max(
        range(25), key=lambda i: cosine(tokens.features[i].double(), tokens.text_embeddings[0].double())
    )
    assert answer(create("mmtok", budget=1, alpha=0.0), tokens).keep.tolist() == [nearest]


def test_without_text_the_picture_is_covered():
    tokens = image(5, 5, seed=2, text=0)
    assert answer(create("mmtok", budget=6), tokens).keep.tolist() == naive(tokens, [6])
    assert answer(create("mmtok", budget=4, alpha=0.0), tokens).keep.tolist() == [0, 1, 2, 3]


def test_scales_change_nothing_and_order_moves_with_the_tokens():
    tokens = image(5, 5, seed=4)
    strategy = create("mmtok", budget=7, vision="projected")
    want = answer(strategy, tokens).keep
    scaled = replace(tokens, features=tokens.features * (1 + torch.arange(25)[:, None]))
    scaled.text_embeddings = tokens.text_embeddings * torch.tensor([1, 9, 2, 0.1, 30])[:, None]
    assert torch.equal(answer(strategy, scaled).keep, want)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    moved = answer(strategy, replace(tokens, features=tokens.features[order])).keep
    assert sorted(order[moved].tolist()) == want.tolist()


def test_what_is_covered_rises_to_at_most_one_and_alpha():
    tokens = image(5, 5, seed=6)
    c, before = matrix(tokens, 0), 0.0
    for count in range(1, 26):
        order, covered = greedy(c, count)
        assert answer(create("mmtok", budget=count), tokens).keep.tolist() == sorted(order)
        assert before < covered <= 1.5 + 1e-9
        before = covered


def test_padding_around_the_picture_is_never_chosen():
    """The upper and the lower of four rows lie outside of the picture; those of the middle hold a part of it."""
    box = (0.0, -0.6, 1.0, 1.6)
    tokens = build([Segment("image", (4, 4), box=box)], seed=1)
    inside = set(range(4, 12))
    for budget in (1, 5, 8, 16, 0.9):
        strategy = create("mmtok", budget=budget)
        kept = answer(strategy, tokens).keep.tolist()
        want, _ = greedy(matrix(tokens, 0), 16 if budget == 16 else int(budget * 16) if budget < 1 else budget,
                         set(range(16)) - inside)  # fmt: skip
        assert kept == sorted(want) and set(kept) <= inside
        assert len(kept) == strategy.total(tokens.segments) == sum(strategy.counts(tokens.segments))
    touched = build([Segment("image", (4, 4), box=(0.0, -0.4, 1.0, 1.4))], seed=1)  # a part of every row
    assert len(answer(create("mmtok", budget=16), touched).keep) == 16


def test_the_question_decides_and_crops_have_their_own_budgets():
    tokens = anyres(2, 2, 4)
    first = answer(create("mmtok", budget=20), tokens)
    assert kept_per_segment(tokens, first) == [4] * 5 and separators_kept(tokens, first) == 0
    tokens.text_embeddings = -tokens.text_embeddings
    assert not torch.equal(answer(create("mmtok", budget=20), tokens).keep, first.keep)
    assert separators_kept(tokens, answer(create("mmtok", budget=20, keep_newline=True), tokens)) == 8
    frames = video(3, 2, 4)
    assert kept_per_segment(frames, answer(create("mmtok", budget=3), frames)) == [3, 3, 3]


def test_ignored_words_are_not_covered():
    tokens = image(5, 5, seed=3)
    tokens.text_ids = torch.tensor([7, 8, 9, 8, 1])
    strategy = create("mmtok", budget=5, ignored=(8, 1, 50))
    fewer = replace(tokens, text_embeddings=tokens.text_embeddings[[0, 2]])
    assert answer(strategy, tokens).keep.tolist() == naive(fewer, [5])
    # all would be ignored
    assert answer(create("mmtok", budget=5, ignored=(1, 7, 8, 9)), tokens).keep.tolist() == naive(tokens, [5])
    tokens.text_ids = None
    with pytest.raises(ValueError, match="found a prompt of embeddings: pass input_ids"):
        answer(strategy, tokens)


class Words:
    """A tokenizer of whole words, as those of byte pairs: a leading space belongs to the word."""

    all_special_ids = (0, 1)

    def __init__(self):
        self.vocabulary = {}

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        pieces = [w for w in text.replace(" ", "\n ").split("\n") if w]
        return [self.vocabulary.setdefault(w, len(self.vocabulary) + 2) for w in pieces]


def test_ids_of_stop_words():
    tokenizer = Words()
    cat, user = tokenizer.encode(" cat", False)[0], tokenizer.encode("USER:", False)[0]
    ids = stop_ids(tokenizer, "USER: ASSISTANT:")
    assert {0, 1, user, *tokenizer.encode("The", False), *tokenizer.encode(" is", False)} < set(ids)
    assert cat not in ids and len(ids) == 2 + 2 + 4 * len(set(STOP_WORDS.split()))
    create("mmtok", ignored=ids)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl", "qwen2_5_vl/video"])
def test_on_a_model(name):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    with patched(model, create("mmtok", budget=0.4)) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))


def test_a_model_tells_the_ids_of_its_text():
    model, inputs, seen = subject("llava"), FAMILIES["llava"].batch("ragged"), []
    strategy = create("mmtok", budget=0.4)
    original = strategy.select
    strategy.select = lambda tokens: (seen.append(tokens), original(tokens))[1]
    with vtoken.applied(model, strategy):
        run(model, inputs, 1)
    visual, real = FAMILIES["llava"].visual(inputs), inputs["attention_mask"].bool()
    embed = model.get_input_embeddings()
    for tokens, b in zip(seen, (0, 1, 1), strict=True):
        ids = inputs["input_ids"][b][real[b] & ~visual[b]]
        assert torch.equal(tokens.text_ids, ids) and torch.equal(tokens.text_embeddings, embed(ids))


def test_options_out_of_range():
    for options, words in (
        (dict(alpha=-1.0), "alpha"),
        (dict(text_temperature=0.0), "text_temperature"),
        (dict(text_temperature=1e-40), "must be at least 1e-06, found 1e-40 and 0.2"),
        (dict(vision_temperature=-1.0), "vision_temperature"),
        (dict(ignored=("the",)), "ignored"),
    ):
        with pytest.raises(ValueError, match=words):
            create("mmtok", **options)
    assert create("mmtok").needs(None).text_embeddings and LAYERS
