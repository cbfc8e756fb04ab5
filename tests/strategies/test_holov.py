"""HoloV against a loop over pairs of tokens."""

from __future__ import annotations

import pytest
import torch

from vtoken import Segment
from vtoken.strategies import create

from .common import LAYERS, answer, build, image, kept_per_segment, outputs, several, top
from .test_vispruner import rows_and_cells

LAYER = LAYERS - 2


def variety(x):
    """Per token of a part (s, d): the mean and the variance of its cosines, its own counted as zero."""
    out = []
    for i in range(len(x)):
        cosine = [float(torch.cosine_similarity(x[i], x[j], dim=0)) if i != j else 0.0 for j in range(len(x))]
        mean = sum(cosine) / max(1, len(x) - 1)
        out.append(sum((c - mean) ** 2 for c in cosine) / max(1, len(x) - 1))
    return torch.tensor(out, dtype=torch.float64)


def naive(tokens, counts, parts=16, beta=0.09, scale="segment", kind="cls"):
    """Kept rows and, of every segment, the numbers wanted of its parts."""
    out, wanted = [], []
    for s, (rows, cells) in enumerate(rows_and_cells(tokens)):
        a = tokens.provided[f"{kind}_attention", LAYER][s].double()
        a = (a.mean(0) if kind == "cls" else a)[cells]
        x, count, n = tokens.features[rows].double(), counts[s], len(rows)
        if not count:
            continue
        p = min(n, max(1, int(16 / 9 * n / count)) if parts is None else parts)
        runs, start = [], 0
        for i in range(p):
            size = n // p + (1 if i < n % p else 0)
            runs.append(list(range(start, start + size)))
            start += size
        v = torch.cat([variety(x[run]) for run in runs])
        score = []
        for run in runs:
            over = run if scale == "part" else list(range(n))
            scaled = v[run] * (1000 * a[over]).mean() / (v[over].mean() + 1e-6)
            score.append(float((1000 * a[run] + beta * scaled).mean()))
        numbers = [int(w / sum(score) * count) for w in score]
        order = sorted(range(p), key=lambda i: (-score[i], i))
        for i in order[: count - sum(numbers)]:
            numbers[i] += 1
        wanted.append(list(numbers))
        surplus = 0
        for i in range(p):
            surplus, numbers[i] = surplus + max(0, numbers[i] - len(runs[i])), min(numbers[i], len(runs[i]))
        for i in order:
            more = min(surplus, len(runs[i]) - numbers[i])
            numbers[i], surplus = numbers[i] + more, surplus - more
        for run, k in zip(runs, numbers):
            out += [rows[run[i]] for i in top(a[run], k)]
    return sorted(out), wanted


@pytest.mark.parametrize("options", [{}, dict(scale="part"), dict(parts=5, beta=2.0), dict(parts=1)])
@several
@pytest.mark.parametrize("budget", [0.5, 0.2, 1, 9])
def test_equals_the_definition(tokens, options, budget):
    strategy = create("holov", budget=budget, **options)
    got = answer(strategy, tokens)
    assert got.keep.tolist() == naive(tokens, strategy.counts(tokens.segments), **options)[0]
    assert kept_per_segment(tokens, got) == strategy.counts(tokens.segments)


@pytest.mark.parametrize("budget", [0.5, 0.2, 5])
def test_a_tower_without_cls_token(budget):
    tokens = build([Segment("image", (7, 8))], has_cls=False)
    strategy = create("holov", budget=budget)
    got = answer(strategy, tokens)
    assert (
        got.keep.tolist() == naive(tokens, strategy.counts(tokens.segments), parts=None, kind="received")[0]
    )


def test_variety_decides_over_the_segment_alone():
    """Equal attention: a part of different tokens gets more than parts of equal ones, or as much if scaled in
    each part.
    """
    tokens = image(8, 8)
    tokens.provided["cls_attention", LAYER] = torch.full_like(tokens.provided["cls_attention", LAYER], 1 / 64)
    tokens.features[:] = tokens.features[:1].clone()
    tokens.features[49::2] *= -1  # the last part: two opposite vectors
    numbers = {}
    for scale in ("segment", "part"):
        kept = answer(create("holov", budget=16, parts=4, beta=1.0, scale=scale), tokens).keep
        numbers[scale] = torch.bincount(kept // 16, minlength=4).tolist()
    assert numbers["segment"][3] >= 6 and numbers["segment"][0] < 4
    assert all(abs(k - 4) <= 1 for k in numbers["part"])  # the divisor is a millionth larger


def dominant():
    """Nearly all attention in the first of 16 parts of four tokens."""
    tokens = image(8, 8)
    attention = torch.full((1, 2, 64), 1e-4)
    attention[..., :4] = 1.0
    tokens.provided["cls_attention", LAYER] = attention
    return tokens


def test_what_a_part_has_no_room_for_goes_to_the_others():
    tokens = dominant()
    kept = answer(create("holov", budget=20, beta=0.0), tokens).keep.tolist()
    assert kept[:4] == [0, 1, 2, 3] and len(kept) == 20
    assert kept == naive(tokens, [20], beta=0.0)[0]


def test_zero_vectors_as_the_public_code():
    tokens = dominant()
    strategy = create("holov", budget=20, beta=0.0, surplus="zeros")
    got = answer(strategy, tokens)
    (wanted,) = naive(tokens, [20], beta=0.0)[1]
    real = sum(min(k, 4) for k in wanted)
    read = outputs(tokens, got)
    assert len(read) == 20 and real < 20
    assert int((read == 0).all(1).sum()) == 20 - real
    stays = read.abs().sum(1) > 0
    assert torch.equal(read[stays], tokens.features[got.keep[stays]].double())


def test_options_that_are_none():
    with pytest.raises(ValueError, match="parts must be a whole number of at least 1, found 0"):
        create("holov", parts=0)
    with pytest.raises(ValueError, match="beta must be at least 0, found -1"):
        create("holov", beta=-1.0)
