"""SCOPE and its baseline against loops over tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtoken
from tests.mechanism.common import assert_same, clean, expected, run, subject
from tests.mechanism.fixed import patched
from tests.models import FAMILIES
from vtoken.adapters.registry import adapter_for
from vtoken.integrations.vllm.reduction import why_not
from vtoken.strategies import create

from .common import (
    HEADS,
    LAYERS,
    answer,
    anyres,
    build,
    image,
    kept_per_segment,
    separators_kept,
    tower,
    video,
)

LAYER = LAYERS - 2


def places_of(tokens):
    """Per segment its rows, and their cells within it."""
    out, start = [], 0
    for segment in tokens.segments:
        rows = [r for r in range(len(tokens)) if start <= int(tokens.cells[r]) < start + segment.size]
        out.append((rows, [int(tokens.cells[r]) - start for r in rows]))
        start += segment.size
    return out


def pooled(states, grid):
    """Mean over the patches that a cell touches: (cells, C) float64."""
    (down, across), (rows, columns) = states.shape[:2], grid
    out = []
    for y in range(rows):
        for x in range(columns):
            ys = range(math.floor(y * down / rows), math.ceil((y + 1) * down / rows))
            xs = range(math.floor(x * across / columns), math.ceil((x + 1) * across / columns))
            out.append(sum(states[i, j].double() for i in ys for j in xs) / (len(ys) * len(xs)))
    return torch.stack(out)


def compared(tokens, s, vision):
    """(fed, C) float64: the features of a segment that are compared."""
    rows, cells = places_of(tokens)[s]
    if vision == "projected":
        return tokens.features[rows].double()
    return pooled(tokens.provided["states", LAYER][s, -1], tokens.segments[s].grid)[cells]


def cosine(x, y):
    return float(x @ y / max(1e-12, float(x.norm() * y.norm())))


def greedy(values, weight, k):
    """Selection order; values[i][j] is how well i covers j.

    Two tokens that are next to each other, and far from all others, add the same: the first of them is taken.
    """
    covered, chosen = [0.0] * len(values[0]), []
    for _ in range(min(k, len(values))):
        left = [i for i in range(len(values)) if i not in chosen]
        gain = {i: sum(max(0.0, v - c) for v, c in zip(values[i], covered, strict=True)) for i in left}
        score = {i: gain[i] * weight[i] for i in left}
        best = min(i for i in left if score[i] >= max(score.values()) * (1 - 1e-5))
        chosen.append(best)
        covered = [max(v, c) for v, c in zip(values[best], covered, strict=True)]
    return chosen


def attention_of(tokens, s, score):
    _, cells = places_of(tokens)[s]
    if score is None:
        return [1.0] * len(cells)
    a = tokens.provided["cls_attention" if score == "cls" else "received_attention", LAYER][s].double()
    return (a.sum(0) if score == "cls" else a)[cells].tolist()


def naive(tokens, counts, vision="tower", score="cls", alpha=1.0):
    keep = []
    for s, (rows, _) in enumerate(places_of(tokens)):
        if rows:
            x = compared(tokens, s, vision)
            values = [[cosine(a, b) for b in x] for a in x]
            weight = [a**alpha for a in attention_of(tokens, s, score)]
            keep += [rows[i] for i in greedy(values, weight, counts[s])]
    return sorted(keep)


INPUTS = {
    "image": lambda seed: image(5, 3, seed=seed),
    "crops": lambda seed: anyres(2, 1, 4, top=3, seed=seed),
    "video": lambda seed: video(3, 2, 4, seed=seed),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("vision", ["tower", "projected"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    budget=st.sampled_from([1, 0.2, 0.5, 0.8, 7]),
    alpha=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_equals_a_triple_loop(kind, vision, seed, budget, alpha):
    tokens = INPUTS[kind](seed)
    strategy = create("scope", budget=budget, vision=vision, alpha=alpha)
    want = naive(tokens, strategy.counts(tokens.segments), vision, alpha=alpha)
    assert answer(strategy, tokens).keep.tolist() == want
    base = create("coverage", budget=budget, vision=vision)
    want = naive(tokens, strategy.counts(tokens.segments), vision, score=None)
    assert answer(base, tokens).keep.tolist() == want
    assert answer(create("scope", budget=budget, vision=vision, alpha=0.0), tokens).keep.tolist() == want


def test_towers_without_cls_weigh_by_attention_received():
    tokens = image(5, 5, has_cls=False, seed=3)
    strategy = create("scope", budget=0.3)
    assert strategy.needs(tokens.tower).received_attention == (LAYER,)
    assert answer(strategy, tokens).keep.tolist() == naive(tokens, [7], score="received")
    both = image(5, 5, seed=3)
    assert answer(create("scope", budget=0.3, score="received"), both).keep.tolist() == naive(
        both, [7], score="received"
    )


def test_the_last_full_layer_is_read_of_a_tower_with_windows():
    info = tower(False, 8, (1, 3, 5))
    assert create("scope").needs(info).received_attention == (5,)
    assert create("scope").needs(info).states == (info.feature_layer,)
    assert create("scope", vision="projected").needs(info).states == ()


def test_scales_change_nothing():
    tokens = image(6, 6, seed=5)
    strategy = create("scope", budget=9, vision="projected", alpha=1.5)
    want = answer(strategy, tokens).keep
    tokens.features = tokens.features * (1 + torch.arange(36)[:, None])
    tokens.provided["cls_attention", LAYER] = tokens.provided["cls_attention", LAYER] * 1e-7
    assert torch.equal(answer(strategy, tokens).keep, want)


def test_coverage_never_falls_and_every_step_is_the_best():
    tokens = image(3, 4, seed=8)
    x = tokens.features.double()
    s = torch.tensor([[cosine(a, b) for b in x] for a in x], dtype=torch.float64)
    a = attention_of(tokens, 0, "cls")
    before, chosen, total = set(), [], 0.0
    for count in range(1, 13):
        now = set(answer(create("scope", budget=count, vision="projected"), tokens).keep.tolist())
        (new,) = now - before
        gains = {}
        for i in set(range(12)) - before:
            reach = s[[*chosen, i]].amax(0).clamp(min=0).sum()
            gains[i] = float(reach - total) * a[i]
        assert gains[new] >= max(gains.values()) - 1e-6
        chosen.append(new)
        reached = float(s[chosen].amax(0).clamp(min=0).sum())
        assert reached >= total
        before, total = now, reached


def test_the_larger_cluster_is_covered_first():
    tokens = image(2, 5)
    tokens.features = torch.eye(16)[[0] * 3 + [1] * 7] * 2
    assert answer(create("coverage", budget=1, vision="projected"), tokens).keep.tolist() == [3]
    for name in ("coverage", "scope"):
        two = answer(create(name, budget=2, vision="projected"), tokens).keep
        assert (two >= 3).sum() == 1 and len(two) == 2
        assert {0, 3} <= set(answer(create("coverage", budget=3, vision="projected"), tokens).keep.tolist())


def test_attention_decides_among_tokens_that_cover_alike():
    tokens = image(2, 5)
    tokens.features = torch.eye(16)[[0] * 3 + [1] * 7]
    attention = torch.zeros(1, HEADS, 10)
    attention[..., 2], attention[..., 8] = 0.6, 0.4
    tokens.provided["cls_attention", LAYER] = attention
    assert answer(create("scope", budget=2, vision="projected"), tokens).keep.tolist() == [2, 8]
    assert answer(create("scope", budget=1, vision="projected", alpha=9.0), tokens).keep.tolist() == [2]
    # no gain is left, and ties go to the lower index
    assert answer(create("scope", budget=4, vision="projected"), tokens).keep.tolist() == [0, 1, 2, 8]


def test_crops_are_chosen_one_by_one_and_newlines_on_top():
    tokens = anyres(2, 2, 4)
    chosen = answer(create("scope", budget=25), tokens)
    assert kept_per_segment(tokens, chosen) == [5] * 5 and separators_kept(tokens, chosen) == 0
    more = answer(create("scope", budget=25, keep_newline=True), tokens)
    assert separators_kept(tokens, more) == 8 and set(chosen.keep.tolist()) < set(more.keep.tolist())
    alone = build([tokens.segments[0]])
    alone.features, alone.provided = tokens.features[:16], {k: v[:1] for k, v in tokens.provided.items()}
    assert answer(create("scope", budget=5), alone).keep.tolist() == [
        i for i in chosen.keep.tolist() if i < 16
    ]


def test_half_precision_and_any_budget():
    for name in ("scope", "coverage"):
        for budget, count in ((1, 1), (35, 35), (36, 36), (999, 36)):
            chosen = answer(create(name, budget=budget), image(6, 6, dtype=torch.bfloat16))
            assert len(chosen.keep) == count
    with torch.autocast("cpu", torch.bfloat16):
        kept = answer(create("scope", budget=9), image(6, 6)).keep
    assert torch.equal(kept, answer(create("scope", budget=9), image(6, 6)).keep)


def test_options_out_of_range():
    for options, words in (
        (dict(alpha=-1.0), "alpha"),
        (dict(score="sum"), "score"),
        (dict(vision="text"), "vision"),
    ):
        with pytest.raises(ValueError, match=words):
            create("scope", **options)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl", "llava_onevision/video"])
@pytest.mark.parametrize("method", ["scope", "coverage"])
def test_on_a_model(name, method):
    family, model = FAMILIES[name], subject(name)
    inputs = family.batch("ragged")
    with patched(model, create(method, budget=0.4)) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected(name, inputs, spy))


def test_models_without_a_readable_tower_are_told_of_the_option():
    model = subject("fast_vlm")
    with pytest.raises(ValueError, match='pass vision="projected" to compare projected features, or use'):
        vtoken.patch(model, "coverage")
    with patched(model, create("coverage", budget=0.4, vision="projected")) as spy:
        inputs = FAMILIES["fast_vlm"].batch("ragged")
        out = run(model, inputs)
    assert_same(out, inputs, expected("fast_vlm", inputs, spy))


def test_a_server_reads_no_outputs_of_tower_layers():
    adapter = adapter_for(clean("llava"))
    for name in ("scope", "coverage"):
        assert why_not(adapter, create(name)) == "reads outputs of tower layers"
        assert why_not(adapter, create(name, vision="projected")) == ""


def test_tower_features_are_those_of_the_tower():
    """`hidden_states` of the tower, the mean over the patches of a merged token."""
    model, family = subject("llava"), FAMILIES["llava"]
    inputs, strategy, seen = family.batch("one"), create("coverage", budget=0.4), []
    original = strategy.select
    strategy.select = lambda tokens: (seen.append(tokens), original(tokens))[1]
    with vtoken.applied(model, strategy):
        run(model, inputs, 1)
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    x = states[model.config.vision_feature_layer][0, 1:].double()
    values = [[cosine(a, b) for b in x] for a in x]
    want = sorted(greedy(values, [1.0] * len(x), strategy.counts(seen[0].segments)[0]))
    assert original(seen[0]).keep.tolist() == want
