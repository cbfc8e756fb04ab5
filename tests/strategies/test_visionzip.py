"""VisionZip against a loop over tokens, for a tower with and one without CLS token."""

from __future__ import annotations

import pytest
import torch

from vtoken.strategies import create

from .common import (
    HEADS,
    LAYERS,
    answer,
    anyres,
    equal,
    image,
    kept_per_segment,
    outputs,
    separators_kept,
    top,
    video,
)

LAYER = LAYERS - 2


def naive(tokens, counts, contextual=None, merge="sum", score="cls"):
    """(kept rows ascending, their features) by the definition, segment by segment."""
    out, start = {}, 0
    for s, segment in enumerate(tokens.segments):
        rows = [r for r in range(len(tokens)) if start <= int(tokens.cells[r]) < start + segment.size]
        cells = [int(tokens.cells[r]) - start for r in rows]
        start += segment.size
        total = min(counts[s], len(rows))
        late = min(max(1, total * 10 // 64) if contextual is None else contextual, max(0, total - 1))
        attention = tokens.provided["cls_attention" if score == "cls" else "received_attention", LAYER][s]
        attention = attention.double().sum(0) if score == "cls" else attention.double()
        keys = tokens.provided["keys", LAYER][s].double().view(segment.size, HEADS, -1).mean(1)
        dominant = top(attention[cells], total - late)
        rest = [i for i in range(len(rows)) if i not in dominant]
        for i in dominant:
            out[rows[i]] = tokens.features[rows[i]].double()
        step = max(1, len(rest) // late) if late else 1
        targets = rest[::step][:late]
        groups = {t: [] for t in targets}
        for i in rest:
            if i not in targets and targets:
                cosine = [
                    float(torch.cosine_similarity(keys[cells[i]], keys[cells[t]], dim=0)) for t in targets
                ]
                groups[targets[max(range(len(targets)), key=lambda j: (cosine[j], -j))]].append(i)
        assert sum(map(len, groups.values())) == (len(rest) - len(targets) if targets else 0)
        for t, members in groups.items():
            x = tokens.features[rows[t]].double()
            others = [tokens.features[rows[i]].double() for i in members]
            if merge == "sum":
                out[rows[t]] = x + sum(others) / max(1, len(others))
            else:
                out[rows[t]] = (x + sum(others)) / (1 + len(others))
    keep = sorted(out)
    return keep, torch.stack([out[i] for i in keep])


CASES = {
    "image": lambda **o: image(6, 7, **o),
    "anyres": lambda **o: anyres(2, 1, 5, **o),
    "unpadded": lambda **o: anyres(1, 2, 4, left=2, **o),
    "video": lambda **o: video(3, 4, 4, **o),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"merge": "mean"}, {"contextual": 4}, {"contextual": 0}, {"score": "received"}]
)
@pytest.mark.parametrize("budget", [0.3, 0.8])
def test_equals_the_loop(case, options, budget):
    tokens = CASES[case]()
    strategy = create("visionzip", budget=budget, **options)
    keep, features = naive(tokens, strategy.counts(tokens.segments), **options)
    chosen = answer(strategy, tokens)
    assert chosen.keep.tolist() == keep
    torch.testing.assert_close(outputs(tokens, chosen), features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "total,dominant,contextual", [(192, 162, 30), (128, 108, 20), (64, 54, 10), (63, 54, 9), (32, 27, 5)]
)
def test_published_pairs(total, dominant, contextual):
    assert create("visionzip").split(total) == (dominant, contextual)


def test_small_totals():
    split = create("visionzip").split
    assert split(1) == (1, 0) and split(2) == (1, 1) and split(0) == (0, 0)
    assert create("visionzip", contextual=10).split(4) == (1, 3)


def test_towers_without_cls_are_read_by_received_attention():
    tokens = image(5, 5, has_cls=False)
    strategy = create("visionzip", budget=0.4)
    needs = strategy.needs(tokens.tower)
    assert not needs.cls_attention and needs.received_attention == (LAYER,) == needs.keys
    keep, features = naive(tokens, strategy.counts(tokens.segments), score="received")
    chosen = answer(strategy, tokens)
    assert chosen.keep.tolist() == keep
    torch.testing.assert_close(outputs(tokens, chosen), features, rtol=1e-5, atol=1e-6)


def test_dominant_tokens_are_untouched_and_others_all_join():
    tokens = image(6, 6)
    chosen = answer(create("visionzip", budget=12), tokens)
    merged = chosen.into[chosen.into >= 0].unique().tolist()
    assert len(merged) <= 1 and len(chosen.keep) == 12
    assert int((chosen.into >= 0).sum()) == 36 - 11  # every token but the dominant ones is in the one group
    dense = chosen.dense(36)
    for j in range(12):
        if j not in merged:
            assert dense[j].nonzero()[:, 0].tolist() == [int(chosen.keep[j])] and float(dense[j].sum()) == 1.0


def test_an_empty_group_returns_the_target():
    tokens = image(1, 4)
    tokens.provided["cls_attention", LAYER][:] = torch.tensor([0.9, 0.1, 0.1, 0.1])
    keys = torch.zeros(1, 4, 16)
    keys[0, 1, 0], keys[0, 2, 1], keys[0, 3, 0] = 1, 1, 2
    tokens.provided["keys", LAYER] = keys
    chosen = answer(create("visionzip", budget=3, contextual=2), tokens)  # targets 1 and 2, token 3 is like 1
    assert chosen.keep.tolist() == [0, 1, 2]
    got = outputs(tokens, chosen)
    assert torch.equal(got[2], tokens.features[2].double())
    torch.testing.assert_close(got[1], (tokens.features[1] + tokens.features[3]).double())


def test_length_of_keys_does_not_matter():
    tokens, strategy = image(5, 5), create("visionzip", budget=0.5)
    want = answer(strategy, tokens)
    tokens.provided["keys", LAYER] = tokens.provided["keys", LAYER] * (1 + torch.arange(25.0))[None, :, None]
    got = answer(strategy, tokens)
    assert torch.equal(got.keep, want.keep) and torch.equal(got.into, want.into)


def test_every_token_kept_is_no_merge():
    tokens = image(3, 3)
    chosen = answer(create("visionzip", budget=9), tokens)
    assert chosen.keep.tolist() == list(range(9)) and bool((chosen.into < 0).all())
    nearly = answer(create("visionzip", budget=8), tokens)
    assert len(nearly.keep) == 8 and int((nearly.into >= 0).sum()) == 2


def test_reference_layout_reads_the_same_features_in_the_order_of_the_public_code():
    """Thumbnail: dominant, contextual; then all dominant tokens of the canvas in raster order, then
    contextual by crop.
    """
    tokens = anyres(1, 2, 4)
    spatial = answer(create("visionzip", budget=0.5, contextual=2), tokens)
    chosen = answer(create("visionzip", budget=0.5, contextual=2, layout="reference"), tokens)
    assert torch.equal(chosen.keep, spatial.keep)
    features, segment = outputs(tokens, spatial), tokens.segment_of[spatial.keep]
    late = torch.zeros(len(spatial.keep), dtype=torch.bool)
    for s in range(3):
        rows = (tokens.segment_of == s).nonzero()[:, 0]
        cells = tokens.cells[rows] - 16 * s
        dominant = rows[top(tokens.provided["cls_attention", LAYER][s].sum(0)[cells], 6)].tolist()
        mine = (segment == s).nonzero()[:, 0]
        late[[i for i in mine.tolist() if int(spatial.keep[i]) not in dominant]] = True
    crops = segment > 0
    order = [
        *(~crops & ~late).nonzero()[:, 0].tolist(),
        *(~crops & late).nonzero()[:, 0].tolist(),
        *(crops & ~late).nonzero()[:, 0].tolist(),
        *((segment == 1) & late).nonzero()[:, 0].tolist(),
        *((segment == 2) & late).nonzero()[:, 0].tolist(),
    ]
    torch.testing.assert_close(outputs(tokens, chosen), features[order])
    assert order != sorted(order)


def test_newlines_are_dropped_unless_asked_for():
    tokens = anyres(2, 2, 4)
    assert separators_kept(tokens, answer(create("visionzip", budget=0.3), tokens)) == 0
    assert separators_kept(tokens, answer(create("visionzip", budget=0.3, keep_newline=True), tokens)) == 8
    assert (
        kept_per_segment(tokens, answer(create("visionzip", budget=100), tokens)) == [16] * 5
    )  # no more than there are
    assert sum(kept_per_segment(tokens, answer(create("visionzip", budget=50), tokens))) == 50


def test_equal_tokens_keep_the_first():
    chosen = answer(create("visionzip", budget=4), equal(image(4, 4)))
    assert chosen.keep.tolist() == [0, 1, 2, 3]


def test_attention_of_other_layers_does_not_matter():
    tokens, strategy = image(4, 4), create("visionzip", budget=0.5)
    want = answer(strategy, tokens).keep
    for layer in range(LAYERS):
        if layer != LAYER:
            tokens.provided["cls_attention", layer] = torch.rand(1, HEADS, 16)
    assert torch.equal(answer(strategy, tokens).keep, want)
