"""MustDrop: merging in the tower, key set, dual-attention filter, aligned cache; alone and together."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtoken
from tests.mechanism.common import assert_close, assert_same, clean, expected, run, subject
from tests.mechanism.fixed import Spy, patched
from tests.models import FAMILIES
from tests.oracle import CACHE
from vtoken.mechanism.cache_crop import physical_length
from vtoken.strategies import MustDrop
from vtoken.strategies.common.windows import merge_windows, similar_windows, window_cells

from .common import anyres, image
from .prompts import after_keeping, prompt, run_through

OFF = dict(merging=False, key_rate=0.0)


# -- windows -------------------------------------------------------------------------------------------------
def by_hand(
    x: Tensor, grid: tuple[int, int], window: int, threshold: float
) -> tuple[list[list[list[int]]], Tensor]:
    """Per segment its merged windows (cells), and the mean cosines (segments, windows); loops only."""
    rows, columns = grid
    windows = []
    for top in range(0, rows - window + 1, window):
        for left in range(0, columns - window + 1, window):
            windows.append([(top + i) * columns + left + j for i in range(window) for j in range(window)])
    likeness = torch.zeros(len(x), len(windows), dtype=torch.float64)
    for s in range(len(x)):
        for k, cells in enumerate(windows):
            pairs = [
                F.cosine_similarity(x[s, a].double(), x[s, b].double(), 0)
                for a, b in itertools.permutations(cells, 2)
            ]
            likeness[s, k] = sum(pairs) / len(pairs)
    r = int((likeness >= threshold).sum(1).min()) if windows else 0
    best = [sorted(range(len(windows)), key=lambda k: (-float(likeness[s, k]), k))[:r] for s in range(len(x))]
    return [[windows[k] for k in mine] for mine in best], likeness


def structured(segments: int, n: int, seed: int) -> Tensor:
    """Tokens of which neighbours are alike to different degrees."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(segments, (n + 1) // 2, 6, generator=generator).repeat_interleave(2, 1)[:, :n]
    return base + torch.randn(segments, n, 6, generator=generator) * 0.6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("grid", "window"), [((6, 6), 3), ((4, 4), 2), ((5, 7), 2), ((7, 7), 3)])
def test_merged_windows(grid, window, seed):
    n, m = grid[0] * grid[1], window * window
    x = structured(3, n, seed)
    _, likeness = by_hand(x, grid, window, 2.0)
    threshold = float(likeness.amax(1).min()) - 0.05  # every segment has a window above it
    chosen, _ = by_hand(x, grid, window, threshold)
    cells = window_cells(grid, window)
    assert torch.allclose(similar_windows(x[:, cells]).double(), likeness, atol=1e-5)
    merge = merge_windows(x, grid, window, threshold)
    assert merge is not None and chosen[0], "nothing was merged"
    assert merge.keep.shape == (3, n - len(chosen[0]) * (m - 1))
    for s in range(3):
        groups = {tuple(sorted(w)) for w in chosen[s]}
        found = {}
        for i, j in enumerate(merge.into[s].tolist()):
            found.setdefault(j, []).append(i)
        assert {tuple(g) for g in found.values() if len(g) > 1} == groups
        for j, members in found.items():
            assert int(merge.keep[s, j]) in members
            assert merge.weight[s, members].tolist() == pytest.approx([1 / len(members)] * len(members))
        assert torch.equal(merge.keep[s], merge.keep[s].sort().values)
        # mass: size times feature adds up to what there was
        means = torch.zeros(len(merge.keep[s]), 6).index_add(
            0, merge.into[s], x[s] * merge.weight[s][:, None]
        )
        sizes = torch.bincount(merge.into[s])[:, None]
        assert torch.allclose((means * sizes).sum(0), x[s].sum(0), atol=1e-4)


def test_alike_and_unlike_windows():
    same, apart = torch.ones(1, 4, 4), torch.eye(4)[None]
    assert float(similar_windows(same)) == pytest.approx(1.0)
    assert float(similar_windows(apart)) == pytest.approx(0.0, abs=1e-6)
    assert merge_windows(apart, (2, 2), 2, 0.5) is None
    assert merge_windows(same, (2, 2), 2, 0.8).keep.tolist() == [[3]]
    assert merge_windows(same, (1, 4), 2, 0.8) is None  # no window fits


def test_the_least_segment_sets_the_number():
    x = structured(4, 36, 1)
    alone = [merge_windows(x[i : i + 1], (6, 6), 3, 0.2) for i in range(4)]
    left = [36 if a is None else a.keep.shape[1] for a in alone]
    together = merge_windows(x, (6, 6), 3, 0.2)
    assert max(left) == (36 if together is None else together.keep.shape[1])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = merge_windows(x[order], (6, 6), 3, 0.2)
    assert (together is None and shuffled is None) or torch.equal(together.into[order], shuffled.into)


# -- inside the tower ----------------------------------------------------------------------------------------
def merged_tower(
    model, pixels: Tensor, window: int, threshold: float
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """CLIP layer by layer with windows merged after the first: features before the projector spread over
    all patches (b, n, C), CLS attention of the last layer per merged token (b, m), and per image the
    token of every patch.
    """
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    norm = getattr(tower, "pre_layrnorm", None)
    h = tower.embeddings(pixels)
    h = h if norm is None else norm(h)
    layers = tower.encoder.layers
    for i, layer in enumerate(layers):
        if i == len(layers) - 1:
            x, a = layer.layer_norm1(h), layer.self_attn
            q, k = (getattr(a, f"{w}_proj")(x).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for w in "qk")
            cls = (q[:, :, :1] @ k.mT * a.head_dim**-0.5).softmax(-1)[:, :, 0, 1:].mean(1)
        h = layer(h, None)
        h = h[0] if isinstance(h, tuple) else h
        if i == 0:
            side = math.isqrt(h.shape[1] - 1)
            chosen, _ = by_hand(h[:, 1:], (side, side), window, threshold)
            rows, owners = [], []
            for s, mine in enumerate(chosen):
                gone = {c for w in mine for c in w}
                groups = sorted([[c] for c in range(side * side) if c not in gone] + mine, key=min)
                rows.append(torch.cat([h[s, :1], torch.stack([h[s, 1:][g].mean(0) for g in groups])]))
                owners.append([next(j for j, g in enumerate(groups) if c in g) for c in range(side * side)])
            h = torch.stack(rows)
        if i == len(layers) - 2:
            features = torch.stack([h[s, 1:][owners[s]] for s in range(len(h))])
    return features, cls, owners


def reference_model(name: str, window: int, threshold: float):
    """A model of its own whose features come from `merged_tower`."""
    model = FAMILIES[name].build()
    original = model.model.get_image_features

    @functools.wraps(original)
    def get_image_features(*args, **kwargs):
        out = original(*args, **kwargs)
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        out.pooler_output = list(
            model.model.multi_modal_projector(merged_tower(model, pixels, window, threshold)[0])
        )
        return out

    model.model.get_image_features = get_image_features
    return model


@pytest.mark.parametrize("threshold", [0.15, -1.0], ids=["some windows", "all windows"])
def test_tower_runs_on_merged_tokens(threshold):
    inputs, model = FAMILIES["llava"].batch("ragged"), subject("llava")
    with torch.no_grad():
        features, cls, owners = merged_tower(clean("llava"), inputs["pixel_values"], 2, threshold)
        want = clean("llava").model.multi_modal_projector(features)
        seen = []
        strategy = MustDrop(window=2, merge_threshold=threshold, filtering=True, key_rate=0.3, budget=0.5)
        inner = strategy.select
        strategy.select = lambda t: (seen.append(t), inner(t))[1]
        with patched(model, strategy):
            got = model.model.get_image_features(inputs["pixel_values"]).pooler_output
            run(model, inputs, 1)
    merged = len(set(owners[0]))
    assert merged < 16 and all(len(set(o)) == merged for o in owners)
    for s, item in enumerate(seen):
        assert_close(got[s], want[s])
        number = torch.tensor(owners[s])
        assert torch.equal(item.merged[:, None] == item.merged, number[:, None] == number)
        assert_close(item.cls_attention(3).mean(1)[0], cls[s][owners[s]])
        answer = inner(item).check(16)
        assert answer.into is None and len(answer.keep) == merged
        assert sorted(owners[s][i] for i in answer.keep.tolist()) == list(range(merged))
        keys = sorted(owners[s][i] for i in answer.keep[answer.marked].tolist())
        assert keys == cls[s].topk(math.ceil(0.3 * merged)).indices.sort().values.tolist()
    plain = clean("llava").model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert (plain - got[0]).abs().max() > 1e-2, "merging changed nothing"


@pytest.mark.parametrize(
    "options", [dict(filtering=False), dict(budget=0.5), dict(budget=0.5, align_cache=False)]
)
def test_all_stages_on_a_model(options):
    inputs, model = FAMILIES["llava"].batch("ragged"), subject("llava")
    strategy = MustDrop(window=2, merge_threshold=0.15, **options)
    with patched(model, strategy) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    assert_same(out, inputs, expected("llava", inputs, spy, model=reference_model("llava", 2, 0.15)))
    assert report.tokens_out < report.tokens_in == 48
    assert bool(spy.drops) == options.get("filtering", True)


def test_unpatch_and_disabled_leave_the_tower_alone():
    inputs, model = FAMILIES["llava"].batch("ragged"), subject("llava")
    want = run(clean("llava"), inputs, 2)
    with patched(model, MustDrop(window=2, merge_threshold=-1.0, budget=0.5)), vtoken.disabled(model):
        out = run(model, inputs, 2)
    assert torch.equal(torch.stack(out.logits), torch.stack(want.logits))
    assert torch.equal(torch.stack(run(model, inputs, 2).logits), torch.stack(want.logits))


# -- between the tower and the LLM ---------------------------------------------------------------------------
def test_keys_are_the_best_of_every_crop():
    tokens = anyres(2, 1, 4, top=1)
    answer = MustDrop(merging=False, key_rate=0.2).select(tokens).check(len(tokens))
    assert len(answer.keep) == len(tokens) and answer.into is None
    scores = tokens.cls_attention(5).mean(1).flatten()
    want = []
    for i in range(len(tokens.segments)):
        mine = [j for j in range(len(tokens)) if int(tokens.segment_of[j]) == i]
        want += sorted(mine, key=lambda j: -float(scores[tokens.cells[j]]))[: math.ceil(0.2 * len(mine))]
    assert answer.marked.nonzero()[:, 0].tolist() == sorted(want)
    assert not answer.marked[tokens.cells < 0].any()


def test_windows_of_the_grid_where_the_tower_cannot_merge():
    tokens = image(5, 4)
    cells = window_cells((5, 4), 2)
    tokens.features[cells[1]] = tokens.features[cells[1]][:1].clone()
    answer = MustDrop(window=2, merge_threshold=0.9).select(tokens).check(20)
    assert len(answer.keep) == 17
    out = answer.dense(20) @ tokens.features
    inside = [i for i in answer.keep.tolist() if i in cells[1].tolist()]
    assert len(inside) == 1
    assert torch.allclose(out[answer.keep.tolist().index(inside[0])], tokens.features[cells[1][0]], atol=1e-6)


def test_a_merged_window_in_the_padding_is_represented_by_what_is_left():
    tokens = anyres(1, 1, 4, top=1)
    tokens.merged = torch.arange(tokens.num_cells)
    window = 16 + window_cells((4, 4), 2)[0]  # two of its cells were removed with the padding
    tokens.merged[window] = int(window[0])
    answer = MustDrop(window=2).select(tokens).check(len(tokens))
    left = [int(c) for c in tokens.cells[answer.keep] if int(c) in window.tolist()]
    assert len(left) == 1 and len(answer.keep) == len(tokens) - 1
    assert int((tokens.cells[answer.keep] < 0).sum()) == int((tokens.cells < 0).sum())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision", "internvl", "gemma3", "llava_next"])
def test_other_families(name):
    inputs, model = FAMILIES[name].batch("ragged"), subject(name)
    strategy = MustDrop(0.5, window=2, merge_threshold=0.8)
    with patched(model, strategy) as spy:
        out = run(model, inputs)
    assert all(a.marked is None or a.marked.any() for _, a in spy.items)
    assert_same(out, inputs, expected(name, inputs, spy))


# -- inside the LLM ------------------------------------------------------------------------------------------
def filtered(tokens, share: float, single: float) -> list[int]:
    rows = tokens.attention_rows(tokens.text_rows).mean(0)[:, tokens.visual].double()
    total, largest = rows.sum(0), rows.amax(0)
    keep = ~((total < share * total.sum()) & (largest < single))
    return (keep | tokens.marked[tokens.visual]).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("share", "single"), [(0.03, 0.1), (0.05, 0.05), (0.01, 1.0), (0.2, 0.3)])
def test_published_filter(share, single):
    tokens = prompt(visual=[20, 20], layer=3, marked=[2, 30])
    strategy = MustDrop(global_threshold=share, individual_threshold=single)
    keep = strategy.select_in_prefill(tokens).keep
    assert keep.tolist() == filtered(tokens, share, single)
    higher = (
        MustDrop(global_threshold=share * 2, individual_threshold=single * 2).select_in_prefill(tokens).keep
    )
    assert set(higher.tolist()) <= set(keep.tolist())
    assert {2, 30} <= set(higher.tolist())


def test_budget_form_is_the_filter_with_scaled_thresholds():
    tokens = prompt(visual=60, layer=3, num_layers=32)
    for budget in (0.2, 0.4, 0.7):
        tokens.memory.clear()
        keep = MustDrop(budget, **OFF).select_in_prefill(tokens).keep
        rows = tokens.attention_rows(tokens.text_rows).mean(0)[:, tokens.visual]
        q = torch.maximum(rows.sum(0) / rows.sum(), rows.amax(0))
        c = float(q.sort(descending=True).values[len(keep) - 1])
        strategy = MustDrop(global_threshold=c * (1 - 1e-6), individual_threshold=c * (1 - 1e-6))
        assert strategy.select_in_prefill(tokens).keep.tolist() == keep.tolist()


@pytest.mark.parametrize("budget", [0.15, 0.3333, 0.7, 128])
def test_budget_is_the_average_over_the_layers(budget):
    tokens = prompt(visual=600, layer=3, marked=[5, 6])
    strategy = MustDrop(budget)
    strategy.check_depth(32)
    reads = run_through(strategy, tokens)
    want = 600 * budget if isinstance(budget, float) else budget
    assert want - 18 / 32 <= sum(reads) / 32 <= want
    assert strategy.prefill_layers(32) == (3, 7, 11, 15)
    with pytest.raises(ValueError, match="first 3 of 32 layers"):
        MustDrop(0.05).check_depth(32)


def test_keys_survive_all_filters():
    strategy = MustDrop(global_threshold=math.inf, individual_threshold=math.inf)
    tokens, marked = prompt(visual=40, layer=3, marked=[1, 7, 30]), [1, 7, 30]
    for layer in (3, 7, 11, 15):
        keep = strategy.select_in_prefill(tokens).keep
        assert [int(tokens.positions[tokens.visual_rows[i]]) - 3 for i in keep] == marked
        tokens = after_keeping(tokens, keep, layer)
    budgeted = MustDrop(0.12)
    tokens = prompt(visual=200, layer=3, marked=list(range(0, 200, 5)))
    assert set(range(0, 200, 5)) <= set(budgeted.select_in_prefill(tokens).keep.tolist())


def test_infinite_thresholds_keep_exactly_the_key_set_on_a_model():
    inputs, model = FAMILIES["llava"].batch("ragged"), subject("llava")
    strategy = MustDrop(merging=False, key_rate=0.2, global_threshold=math.inf, individual_threshold=math.inf)
    with patched(model, strategy) as spy:
        out = run(model, inputs)
        report = vtoken.report(model)
    keys = [answer.marked.nonzero()[:, 0].tolist() for _, answer in spy.items]
    assert [len(k) for k in keys] == [math.ceil(0.2 * 16)] * 3
    columns = FAMILIES["llava"].visual(inputs)[0].nonzero()[:, 0]
    assert torch.equal(spy.drops[1][0][0], columns) and spy.drops[1][0][1].keep.tolist() == keys[0]
    assert report.visual_per_layer == [48, 12, 12, 12]
    assert_same(out, inputs, expected("llava", inputs, spy))


@pytest.mark.parametrize("threshold", [0.0, 1e-30])
def test_zero_thresholds_are_the_unpatched_model(threshold):
    inputs, model = FAMILIES["llava"].batch("ragged"), subject("llava")
    strategy = MustDrop(merging=False, global_threshold=threshold, individual_threshold=threshold)
    with patched(model, strategy) as spy:
        out = run(model, inputs)
    assert bool(spy.drops) == (threshold > 0)
    assert torch.equal(torch.stack(out.logits), torch.stack(run(clean("llava"), inputs).logits))


# -- the KV cache --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "cache", [{}, dict(cache_implementation="static", disable_compile=True)], ids=["dynamic", "static"]
)
@pytest.mark.parametrize(("name", "kind"), [("llava", "ragged"), ("llava", "one"), ("qwen3_vl", "ragged")])
def test_aligned_cache(name, kind, cache):
    """Decoding reads the last survivors in every aligned layer: the oracle's answer, which differs from the
    unaligned one.
    """
    inputs, model = FAMILIES[name].batch(kind), subject(name)
    strategy = MustDrop(0.75, **OFF, layers=(1, 2))
    with patched(model, strategy) as spy:
        out = run(model, inputs, **cache)
    spy.items.clear()
    assert strategy.aligned_layers(4) == (1, 2)
    assert_same(out, inputs, expected(name, inputs, spy))
    counts = [max(len(a.keep) for _, a in spy.drops[k]) for k in (2, 3)]
    assert counts[0] > counts[1]
    if not cache:
        lengths = [physical_length(x) for x in out[CACHE].layers]
        assert lengths[0] > lengths[1] == lengths[2] == lengths[3]
        assert len({int(x.get_seq_length()) for x in out[CACHE].layers}) == 1
        with patched(model, MustDrop(0.75, **OFF, layers=(1, 2), align_cache=False)):
            apart = run(model, inputs)
        assert torch.equal(apart.logits[0], out.logits[0])
        assert (apart.logits[1] - out.logits[1]).abs().max() > 1e-4


def test_published_layers():
    assert MustDrop().prefill_layers(32) == (3, 7, 11, 15)
    assert MustDrop().aligned_layers(32) == tuple(range(2, 15))
    assert MustDrop(filtering=False).prefill_layers(32) == () == MustDrop(filtering=False).aligned_layers(32)
    assert MustDrop().prefill_layers(28) == (3, 6, 10, 13)


def test_each_stage_can_be_switched_off():
    info = clean_info()
    assert MustDrop(merging=False).encoder_layers(info) == ()
    assert MustDrop(merging=True).encoder_layers(info) == (0,)
    assert not MustDrop(**OFF).acts_on_projector and MustDrop(merging=False).acts_on_projector
    assert MustDrop(merging=False, filtering=False).is_identity
    assert MustDrop(0.5, filtering=False).needs(info) == vtoken.Needs()
    assert isinstance(Spy(MustDrop()), Spy)


def clean_info() -> vtoken.TowerInfo:
    from .common import tower

    return tower()


def test_bad_options():
    for options in (dict(window=1), dict(key_rate=1.0), dict(global_threshold=0.1), dict(layers=(4, 4))):
        with pytest.raises(ValueError):
            MustDrop(**options)
