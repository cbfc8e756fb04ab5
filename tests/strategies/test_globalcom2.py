"""GlobalCom2 against its steps written out crop by crop."""

from __future__ import annotations

import math

import pytest
import torch

from vtoken.strategies import create

from .common import (
    LAYERS,
    answer,
    anyres,
    equal,
    flat,
    image,
    kept_per_segment,
    outputs,
    separators_kept,
    top,
    tower,
)

LAST = LAYERS - 1


def maps(tokens, score="cls"):
    """Importance over the cells of every segment, None where the model fed nothing."""
    if score == "cls":
        return [row.double() for row in tokens.provided["cls_logits", LAST]]
    out = []
    for s in range(len(tokens.segments)):
        rows = tokens.segment_of == s
        x = tokens.features[rows].double()
        values = torch.zeros(tokens.segments[s].size, dtype=torch.float64)
        start = sum(q.size for q in tokens.segments[:s])
        values[tokens.cells[rows] - start] = torch.stack(
            [-torch.cosine_similarity(v, x.mean(0), dim=0) for v in x]
        ) if len(x) else values[:0]  # fmt: skip
        out.append(values)
    return out


def bilinear(grid, height, width):
    """align_corners=False, by hand."""
    h, w = grid.shape
    out = torch.zeros(height, width, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y, x = max((i + 0.5) * h / height - 0.5, 0), max((j + 0.5) * w / width - 0.5, 0)
            y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top_row = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
            low_row = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
            out[i, j] = top_row * (1 - (y - y0)) + low_row * (y - y0)
    return out


def crop_ratios(tokens, guide, ratio, tau=10.0):
    down = 1 + max(s.place[0] for s in tokens.segments)
    across = 1 + max(s.place[1] for s in tokens.segments)
    height, width = guide.shape
    ch, cw = max(height // down, 1), max(width // across, 1)
    sums = {s.place: 0.0 for s in tokens.segments[1:]}
    for i in range(height):
        for j in range(width):
            sums[min(i // ch, down - 1), min(j // cw, across - 1)] += float(guide[i, j])
    powers = [math.exp((v - max(sums.values())) / tau) for v in sums.values()]
    shares = [p / sum(powers) for p in powers]
    return [min(ratio * (1 + s - sum(shares) / len(shares)), 1) for s in shares]


def naive(tokens, ratio, tau=10.0, alpha=0.5, score="cls"):
    """Kept rows: (thumbnail by falling score, one list per crop ascending)."""
    values = maps(tokens, score)
    (side, _), guide = tokens.segments[0].grid, values[0].view(tokens.segments[0].grid)
    first = sorted(range(side * side), key=lambda i: (-float(values[0][i]), i))[
        : max(1, int(side * side * ratio + 1e-9))
    ]
    position, start = {}, side * side
    for c, segment in enumerate(tokens.segments[1:]):
        for row in range(len(tokens)):
            cell = int(tokens.cells[row]) - start
            if 0 <= cell < segment.size:
                y, x = divmod(cell, segment.grid[1])
                position[row] = (c, cell, segment.place[0] * side + y, segment.place[1] * side + x)
        start += segment.size
    ys, xs = [p[2] for p in position.values()], [p[3] for p in position.values()]
    resized = bilinear(guide, max(ys) - min(ys) + 1, max(xs) - min(xs) + 1)
    kept = []
    for c, r in enumerate(crop_ratios(tokens, guide, ratio, tau)):
        rows = [row for row, p in position.items() if p[0] == c]
        if not rows:
            kept.append([])
            continue
        local = torch.stack([values[c + 1][position[row][1]] for row in rows])
        wide = torch.stack([resized[position[row][2] - min(ys), position[row][3] - min(xs)] for row in rows])
        mixed = alpha * wide / wide.norm().clamp(min=1e-12) + (1 - alpha) * local / local.norm().clamp(
            min=1e-12
        )
        kept.append([rows[i] for i in top(mixed, int(len(rows) * r + 1e-9))])
    return first, kept


CANVASES = {
    "2x2": dict(down=2, across=2, side=4),
    "1x3": dict(down=1, across=3, side=4),
    "3x1 odd": dict(down=3, across=1, side=5),
    "unpadded rows": dict(down=2, across=2, side=5, top=2),
    "unpadded columns": dict(down=2, across=3, side=4, left=3),
    "empty crops": dict(down=3, across=1, side=2, top=2),
    "1x1": dict(down=1, across=1, side=4),
}


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("options", [{}, {"tau": 0.5}, {"alpha": 0.8}, {"importance": "cosine"}])
@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_equals_the_steps(canvas, options, ratio):
    tokens = anyres(**CANVASES[canvas], seed=3)
    score = {"importance": "cls"} | options
    first, kept = naive(
        tokens, ratio, options.get("tau", 10.0), options.get("alpha", 0.5), score["importance"]
    )
    chosen = answer(create("globalcom2", budget=ratio, **options), tokens)
    rows = [i for i in chosen.keep.tolist() if tokens.cells[i] >= 0]
    assert rows == sorted(first + flat(kept))
    assert separators_kept(tokens, chosen) == len(tokens.separator_rows)


def test_ratios_average_to_the_budget_and_follow_the_thumbnail():
    tokens = anyres(2, 2, 4)
    guide = tokens.provided["cls_logits", LAST][0].double().view(4, 4)
    strategy = create("globalcom2", budget=0.25)
    places = [s.place for s in tokens.segments[1:]]
    ratios = strategy._crop_ratios(guide, places, 0.25)
    assert sum(ratios) == pytest.approx(4 * 0.25)
    sums = [
        float(guide[:2, :2].sum()),
        float(guide[:2, 2:].sum()),
        float(guide[2:, :2].sum()),
        float(guide[2:, 2:].sum()),
    ]
    assert sorted(range(4), key=ratios.__getitem__) == sorted(range(4), key=sums.__getitem__)
    assert strategy._crop_ratios(guide + 7, places, 0.25) == pytest.approx(ratios)
    assert strategy._crop_ratios(torch.ones(4, 4).double(), places, 0.25) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("down,across", [(2, 2), (1, 2), (2, 3), (3, 2)])
def test_an_even_thumbnail_keeps_exact_shares(down, across):
    """Six crops have shares of 1/6 each; their floors must not fall a token short."""
    tokens = anyres(down, across, 6, newline=False)
    tokens.provided["cls_logits", LAST][0] = 1.0
    assert kept_per_segment(tokens, answer(create("globalcom2", budget=0.25), tokens)) == [9] * (
        1 + down * across
    )


def test_a_rich_crop_is_kept_whole():
    tokens = anyres(2, 2, 4)
    tokens.provided["cls_logits", LAST][0].view(4, 4)[2:, :2] += 1000
    guide, places = (
        tokens.provided["cls_logits", LAST][0].double().view(4, 4),
        [s.place for s in tokens.segments[1:]],
    )
    assert create("globalcom2")._crop_ratios(guide, places, 0.8) == pytest.approx([0.6, 0.6, 1.0, 0.6])
    assert kept_per_segment(tokens, answer(create("globalcom2", budget=0.8), tokens))[3] == 16


def test_scores_in_the_padding_do_not_matter():
    tokens = anyres(2, 1, 4, top=2)
    want = answer(create("globalcom2", budget=0.4), tokens).keep
    padded = torch.ones(tokens.num_cells, dtype=torch.bool)
    padded[tokens.cells[tokens.patch_rows]] = False
    tokens.provided["cls_logits", LAST][padded.view(3, 16)] = 1e4
    assert torch.equal(answer(create("globalcom2", budget=0.4), tokens).keep, want)


def test_scale_of_a_crops_scores_does_not_matter():
    tokens = anyres(2, 2, 4)
    want = answer(create("globalcom2", budget=0.4), tokens).keep
    tokens.provided["cls_logits", LAST][1:] *= torch.tensor([2.0, 0.1, 30.0, 5.0])[:, None]
    assert torch.equal(answer(create("globalcom2", budget=0.4), tokens).keep, want)


def test_one_crop_without_padding_is_guided_by_the_thumbnail_alone():
    """On a 1 x 1 canvas the resized map is the thumbnail's own."""
    tokens = anyres(1, 1, 4)
    tokens.provided["cls_logits", LAST][1] = 0.0
    chosen = answer(create("globalcom2", budget=0.25), tokens)
    cells = tokens.cells[chosen.keep]
    assert (cells[cells >= 16] - 16).tolist() == cells[(cells >= 0) & (cells < 16)].tolist()


def test_without_crops_the_score_alone_decides():
    tokens = image(5, 5)
    assert answer(create("globalcom2", budget=0.3), tokens).keep.tolist() == top(
        tokens.provided["cls_logits", LAST][0], 7
    )


def test_towers_without_cls_use_the_published_substitute():
    assert create("globalcom2").needs(tower(False)).cls_logits == ()
    assert create("globalcom2").needs(tower()).cls_logits == (LAST,)
    assert create("globalcom2", importance="cls").needs(tower(False)).cls_logits == (LAST,)
    tokens = anyres(2, 1, 4, has_cls=False)
    first, kept = naive(tokens, 0.25, score="cosine")
    chosen = answer(create("globalcom2"), tokens)
    assert [i for i in chosen.keep.tolist() if tokens.cells[i] >= 0] == sorted(first + flat(kept))


def test_a_whole_number_is_the_budget_of_the_image():
    tokens = anyres(2, 2, 4)
    chosen = answer(create("globalcom2", budget=20), tokens)
    assert 20 - 5 <= len(chosen.keep) - separators_kept(tokens, chosen) <= 20


@pytest.mark.parametrize("canvas", ["2x2", "unpadded rows", "unpadded columns"])
def test_reference_layout_is_the_order_of_the_public_code(canvas):
    """Kept crop tokens go to the cell of their number among the crop's unpadded tokens; the canvas is read
    row by row.
    """
    tokens = anyres(**CANVASES[canvas], seed=5)
    side, across = CANVASES[canvas]["side"], CANVASES[canvas]["across"]
    first, kept = naive(tokens, 0.5)
    chosen = answer(create("globalcom2", budget=0.5, layout="reference"), tokens)
    spatial = answer(create("globalcom2", budget=0.5), tokens)
    assert torch.equal(chosen.keep, spatial.keep)
    places = {}
    for c, rows in enumerate(kept):
        every = (tokens.segment_of == c + 1).nonzero()[:, 0].tolist()
        for row in rows:
            q = every.index(row)
            places[row] = ((c // across) * side + q // side, (c % across) * side + q % side)
    want = first + sorted(places, key=places.__getitem__)
    got = outputs(tokens, chosen)
    newline = tokens.features[tokens.separator_rows[0]].double()
    is_newline = (got == newline).all(1)
    assert torch.equal(got[~is_newline], tokens.features[want].double())
    assert int(is_newline.sum()) == len(tokens.separator_rows)
    if canvas == "2x2":  # without padding every row of the canvas ends with its newline
        stream = [places[r][0] for r in want[len(first) :]]
        lines = [int((~is_newline[:i]).sum()) - len(first) for i in is_newline.nonzero()[:, 0].tolist()]
        assert lines == [sum(row <= y for row in stream) for y in range(8)]


def test_equal_scores_keep_the_first():
    tokens = equal(anyres(1, 2, 4, newline=False))
    chosen = answer(create("globalcom2", budget=0.25), tokens)
    assert kept_per_segment(tokens, chosen) == [4, 4, 4]
    assert sorted(tokens.cells[chosen.keep].tolist()) == [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35]


def test_images_only():
    assert create("globalcom2").needs(tower()).modalities == ("image",)
    with pytest.raises(ValueError, match="tau"):
        create("globalcom2", tau=0)
