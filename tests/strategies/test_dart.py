"""DART against loops in float64, its counts, and the whole method on a model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken.strategies import create

from .common import answer, anyres, image, video
from .prompts import NORM, prompt
from .test_scope import cosine


def choose(h, k, g, gk, count, each, image_pivots=4, text_pivots=4):
    """Kept tokens among h (n, d) with keys k; g (t, d) and gk are the text's."""
    norm = [float(row.abs().sum()) for row in k.double()]
    kept = sorted(range(len(h)), key=lambda i: (-norm[i], i))[:image_pivots]
    norm = [float(row.abs().sum()) for row in gk.double()]
    guides = [h[i] for i in kept] + [
        g[j] for j in sorted(range(len(g)), key=lambda j: (-norm[j], j))[:text_pivots]
    ]
    for guide in guides:
        left = [i for i in range(len(h)) if i not in kept]
        left.sort(key=lambda i: cosine(guide.double(), h[i].double()))
        kept += left[: min(each(len(guides)), count - len(kept))]
    return sorted(kept)


def naive(tokens, budget, published=False, normed=True, image_pivots=4, text_pivots=4):
    visual = tokens.visual_rows.tolist()
    h = tokens.hidden_states.double() * (NORM[: tokens.hidden_states.shape[1]] if normed else 1)
    keys, keep = tokens.keys(), []
    items = sorted({int(tokens.item[i]) for i in visual})
    for item in items:
        rows = [i for i in visual if int(tokens.item[i]) == item]
        text = [j for j in range(rows[-1] + 1, tokens.end) if not tokens.visual[j]]
        n = len(rows)
        allowed = budget * n if isinstance(budget, float) else budget * tokens.units / len(items)
        count = min(n, max(1, round(allowed)))
        first = min(n, image_pivots) if published else min(count, image_pivots)
        if published:
            step = math.floor(allowed / (image_pivots + text_pivots) + 1e-9)
            count = min(n, first + step * (first + min(text_pivots, len(text))))
            each = lambda guides, step=step: step  # noqa: E731
        else:
            each = lambda guides, left=count - first: math.ceil(left / guides)  # noqa: E731
        some = choose(h[rows], keys[rows], h[text], keys[text], count, each, first, text_pivots)
        keep += [visual.index(rows[i]) for i in some]
    return sorted(keep)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    after=st.integers(1, 8),
    drafts=st.integers(0, 2),
    budget=st.sampled_from([0.05, 0.2222, 0.5, 0.9, 1, 6, 50]),
    options=st.sampled_from(
        [{}, {"normed": False}, {"image_pivots": 1, "text_pivots": 0}, {"image_pivots": 3, "text_pivots": 7}]
    ),
    published=st.booleans(),
)
def test_equals_loops(seed, sizes, after, drafts, budget, options, published):
    tokens = prompt(visual=sizes, after=after, drafts=drafts, seed=seed, layer=2, dim=12)
    strategy = create("dart", budget=budget, kept="published" if published else "exact", **options)
    keep = strategy.select_in_prefill(tokens).check(sum(sizes)).keep.tolist()
    assert keep == naive(tokens, budget, published, **options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 700), budget=st.floats(0.01, 0.99) | st.integers(1, 800))
def test_exactly_the_budget_and_the_pivots_stay(n, budget):
    tokens = prompt(visual=n, layer=2, heads=1, attention=torch.zeros(1), preview=torch.zeros(1))
    keep = create("dart", budget=budget).select_in_prefill(tokens).check(n).keep
    count = min(n, max(1, round(budget * n) if isinstance(budget, float) else budget))
    assert len(keep) == count
    pivots = tokens.keys()[tokens.visual].abs().sum(1).topk(min(4, count)).indices
    assert set(pivots.tolist()) <= set(keep.tolist())


@pytest.mark.parametrize(
    "budget, count", [(128, 132), (1 - 0.7778, 124), (128 / 576, 132), (7, 4), (576, 576)]
)
def test_published_counts(budget, count):
    tokens = prompt(visual=576, layer=2, heads=1, attention=torch.zeros(1), preview=torch.zeros(1))
    keep = create("dart", budget=budget, kept="published").select_in_prefill(tokens).keep
    assert len(keep) == count


def test_images_never_share_a_quota():
    tokens = prompt(visual=[30, 1, 12], layer=2)
    keep = create("dart", budget=0.5).select_in_prefill(tokens).keep
    item = tokens.item[tokens.visual_rows[keep]]
    assert torch.bincount(item).tolist() == [15, 1, 6]
    alone = prompt(visual=[30, 1, 12], layer=2)
    alone.hidden_states = alone.hidden_states.clone()
    alone.hidden_states[tokens.visual_rows[31:]] *= -1  # another third image
    again = create("dart", budget=0.5, normed=False).select_in_prefill(alone).keep
    want = create("dart", budget=0.5, normed=False).select_in_prefill(tokens).keep
    assert again[again < 31].tolist() == want[want < 31].tolist()
    frames = prompt(visual=[24], units=4, layer=2)  # a video of four frames
    assert len(create("dart", budget=3).select_in_prefill(frames).keep) == 12


def test_what_no_pivot_holds_is_kept_first():
    tokens = prompt(visual=20, layer=2, dim=8)
    hidden = torch.zeros(len(tokens), 8)
    hidden[:, 0] = 1
    odd = int(tokens.visual_rows[13])
    hidden[odd] = torch.eye(8)[1]
    keys = torch.rand(len(tokens), 8)
    keys[odd] = 0
    tokens = prompt(visual=20, layer=2, dim=8, hidden=hidden, keys=keys)
    keep = create("dart", budget=5).select_in_prefill(tokens).keep.tolist()
    assert 13 in keep and len(keep) == 5


def test_order_moves_with_the_tokens():
    tokens = prompt(visual=25, layer=2, dim=10)
    keep = create("dart", budget=0.4).select_in_prefill(tokens).keep
    rows, order = tokens.visual_rows, torch.randperm(25, generator=torch.Generator().manual_seed(0))
    hidden, keys = tokens.hidden_states.clone(), tokens.keys().clone()
    hidden[rows], keys[rows] = hidden[rows[order]], keys[rows[order]]
    moved = prompt(visual=25, layer=2, dim=10, hidden=hidden, keys=keys)
    assert sorted(order[create("dart", budget=0.4).select_in_prefill(moved).keep].tolist()) == keep.tolist()


def test_after_a_projector_strategy_the_budget_is_of_all_tokens():
    tokens = prompt(visual=20, total=40, layer=2)
    assert len(create("dart", budget=0.25).select_in_prefill(tokens).keep) == 10


# -- before the LLM ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make", [lambda: image(6, 7), lambda: anyres(2, 2, 4), lambda: video(3, 3, 4, trailing=1)]
)
@pytest.mark.parametrize("budget", [0.05, 0.2222, 0.7, 9, 10_000])
def test_the_projector_variant_equals_loops(make, budget):
    tokens = make()
    strategy = create("dart", budget=budget, stage="projector")
    n, text = len(tokens), tokens.text_embeddings.double()
    allowed = (
        budget * n
        if isinstance(budget, float)
        else budget * max(1, sum(s.kind == "frame" for s in tokens.segments))
    )
    count = min(n, max(1, round(allowed)))
    x, first = tokens.features.double(), min(count, 4)
    want = choose(x, x, text, text, count, lambda guides: math.ceil((count - first) / guides), first)
    assert answer(strategy, tokens).keep.tolist() == want
    separators = int((tokens.cells < 0).sum())
    assert strategy.total(tokens.segments, separators) == count
    assert strategy.prefill_layers(32) == () and strategy.needs(None).text_embeddings
    assert strategy.budget_counts() == create("random").budget_counts()


def test_the_projector_variant_without_text_and_with_published_counts():
    tokens = image(6, 6)
    tokens.text_embeddings = None
    assert len(answer(create("dart", budget=9, stage="projector"), tokens).keep) == 9
    strategy = create("dart", budget=16, stage="projector", kept="published")
    assert len(answer(strategy, image(6, 6)).keep) == 4 + 8 * 2 and strategy.total(image().segments) is None
    exact = create("dart", budget=0.25, stage="projector")
    assert exact.per_segment(video(3).segments) is None and exact.per_segment(image().segments) == [4]


# -- on models -----------------------------------------------------------------------------------------------
def cached_keys(model, inputs, layer):
    """Keys (B, q, heads * head_dim) and normed input of the next layer, of the unpatched model."""
    with torch.no_grad():
        out = model(**clone(inputs), output_hidden_states=True, use_cache=True)
    keys = out.past_key_values.layers[layer - 1].keys.transpose(1, 2).flatten(2)
    return keys, model.get_decoder().norm(out.hidden_states[layer])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next_video/video"])
def test_selection_follows_the_cache_of_the_unpatched_model(name, layer):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    keys, hidden = cached_keys(clean(name), inputs, layer)
    with patched(model, create("dart", budget=0.5, layer=layer)) as spy:
        seen, original = [], spy.strategy.select_in_prefill
        spy.strategy.select_in_prefill = lambda tokens: (seen.append(tokens), original(tokens))[1]
        out = run(model, inputs)
    real = inputs["attention_mask"].bool()
    for b, tokens in zip([b for b in range(len(real)) if family.visual(inputs)[b].any()], seen, strict=False):
        assert (tokens.keys() - keys[b][real[b]]).abs().max() < 1e-4
        assert (tokens.normed() - hidden[b][real[b]]).abs().max() < 1e-3
    assert_same(out, inputs, expected(name, inputs, spy))


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_the_kind_of_cache_does_not_matter(options):
    model, inputs, chosen = subject("llava"), FAMILIES["llava"].batch("ragged"), []
    for kind in ({}, options):
        with patched(model, create("dart", budget=0.4)) as spy:
            run(model, inputs, 1, **kind)
        chosen.append([a.keep.tolist() for _, a in spy.drops[2]])
    assert chosen[0] == chosen[1]


def test_the_implementation_of_attention_does_not_matter():
    inputs, chosen = FAMILIES["llava"].batch("ragged"), []
    for attention in ("sdpa", "eager"):
        with patched(subject("llava", attention), create("dart", budget=0.4)) as spy:
            run(spy and subject("llava", attention), inputs, 1)
        chosen.append([a.keep.tolist() for _, a in spy.drops[2]])
    assert chosen[0] == chosen[1]


def test_the_projector_variant_on_a_model():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with patched(model, create("dart", budget=0.4, stage="projector")) as spy:
        out = run(model, inputs)
        assert not spy.drops and len(spy.items) == 3
    assert_same(out, inputs, expected("llava", inputs, spy))


def test_it_joins_a_projector_strategy():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    with vtoken.applied(model, vtoken.strategies.combine(["visionzip", "dart"], 0.25)):
        run(model, inputs)
        assert vtoken.report(model).visual_per_layer[-1] == sum(round(0.25 * n) for n in (16, 16, 16))


def test_bad_options():
    for options, words in (
        (dict(layer=0), "layer must be at least 1, found 0: use stage='projector'"),
        (dict(image_pivots=0), "image_pivots"),
        (dict(text_pivots=-1), "text_pivots"),
        (dict(kept="floor"), "kept"),
        (dict(stage="tower"), "stage"),
    ):
        with pytest.raises(ValueError, match=words):
            create("dart", **options)
    with pytest.raises(ValueError, match="before LLM layer 7, but this LLM has the layers 0 to 3"):
        vtoken.patch(subject("llava"), create("dart", layer=7))
    tokens = prompt(visual=6, after=0, layer=2)  # no text after the image
    assert len(create("dart", budget=3).select_in_prefill(replace(tokens, query=len(tokens) - 1)).keep) == 3
