"""HiRED on images with crops: budgets, packing and newlines, compared with a second implementation."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llava_next.modeling_llava_next import unpad_image

import vtoken
from tests.mechanism.fixed import patched
from vtoken import Segment, TowerInfo, VisualTokens
from vtoken.strategies import HiRED, create

from .anyres import SIDE, model_of, picture, prompts

TOWER = TowerInfo(4, 2, True, (0, 1, 2, 3))
GRIDS = [(1, 2), (2, 1), (3, 1), (1, 3), (2, 2), (2, 3), (3, 3)]
BUDGETS = [(0.2, 0.5), (0.4, 0.5), (0.9, 1.0), (0.3, 0.0), (0.07, 0.7)]


def image(rows: int, columns: int, side: int = 6, heads: int = 2, seed: int = 0) -> VisualTokens:
    """Thumbnail and rows x columns crops without padding, in crop order, with random attention."""
    generator = torch.Generator().manual_seed(seed)
    places = [(r, c) for r in range(rows) for c in range(columns)]
    segments = (Segment("thumbnail", (side, side)), *(Segment("crop", (side, side), p) for p in places))
    cells = torch.arange(len(segments) * side**2)
    attention = {
        i: torch.rand(len(segments), heads, 1 + side**2, generator=generator).softmax(-1) for i in (0, 2)
    }
    provided = {("cls_attention", i): a[:, :, 1:] for i, a in attention.items()}
    return VisualTokens(torch.zeros(len(cells), 4), segments, cells, TOWER, provided=provided)


def weights(
    early: torch.Tensor, rows: int, columns: int, side: int, alpha: float, allocation: str
) -> list[float]:
    """Region weights of the crops, token by token."""
    n, out = side * side, [0.0] * (rows * columns)
    if allocation == "code":
        order = sorted(range(n), key=lambda j: -float(early[j]))[: int(n * (1 - alpha))]
        chunk = n // (rows * columns)
        for j in order:
            if j // chunk < len(out):
                out[j // chunk] += 1
        return out
    for j in range(n):
        y, x = divmod(j, side)
        out[math.floor(y * rows / side) * columns + math.floor(x * columns / side)] += float(
            early[j].double()
        )
    return out


def budgets(n: int, parts: int, rho: float, alpha: float, w: list[float], allocation: str) -> list[int]:
    """Section 3b of the method: tokens of the thumbnail, then of every crop."""
    total = int(parts * n * rho)
    full = min(int(total * alpha), n)
    sub = min(total - full, (parts - 1) * n)
    w = w if sum(w) else [1.0] * len(w)
    if allocation == "code":
        return [full, *(min(n, sub * int(x) // int(sum(w))) for x in w)]
    return [full, *(min(n, math.floor(sub * x / sum(w) + 1e-9)) for x in w)]


def best(scores: torch.Tensor, k: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda j: -float(scores[j]))[:k])


@pytest.mark.parametrize("allocation", ["paper", "code"])
@pytest.mark.parametrize("rho, alpha", BUDGETS)
@pytest.mark.parametrize("grid", GRIDS)
def test_budgets_and_ranking(grid, rho, alpha, allocation):
    rows, columns = grid
    tokens = image(rows, columns)
    n, parts = 36, 1 + rows * columns
    early, late = (tokens.provided["cls_attention", i].sum(1) for i in (0, 2))
    w = weights(early[0], rows, columns, 6, alpha, allocation)
    wanted = budgets(n, parts, rho, alpha, w, allocation)
    keep = HiRED(rho, alpha=alpha, allocation=allocation).select(tokens).keep
    assert sum(wanted[1:]) <= int(parts * n * rho) - wanted[0]
    for i, k in enumerate(wanted):
        mine = keep[(keep >= i * n) & (keep < (i + 1) * n)] - i * n
        assert set(mine.tolist()) == best(late[i], k)
    assert sorted(keep.tolist()) == keep.tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_even_attention_keeps_what_counts_says(grid):
    tokens = image(*grid)
    tokens.provided["cls_attention", 0] = torch.full_like(tokens.provided["cls_attention", 0], 0.01)
    strategy = HiRED(0.3)
    assert len(strategy.select(tokens).keep) == sum(strategy.counts(tokens.segments))


def test_invariance():
    tokens, other = image(2, 2), image(2, 2)
    for key, value in other.provided.items():
        other.provided[key] = 3.5 * value.flip(1)
    for allocation in ("paper", "code"):
        strategy = HiRED(0.2, allocation=allocation)
        assert torch.equal(strategy.select(tokens).keep, strategy.select(other).keep)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("crop", [0, -1])
def test_a_region_that_draws_all_attention_gets_the_budget(grid, crop):
    rows, columns = grid
    tokens = image(rows, columns)
    row, column = tokens.segments[1:][crop].place
    early = torch.ones(6, 6)
    early[[y for y in range(6) if y * rows // 6 != row]] = 0
    early[:, [x for x in range(6) if x * columns // 6 != column]] = 0
    tokens.provided["cls_attention", 0] = early.flatten().expand(len(tokens.segments), 2, 36).contiguous()
    keep = HiRED(0.1).select(tokens).keep
    total = int(36 * len(tokens.segments) * 0.1)
    target = list(range(1, len(tokens.segments)))[crop]
    assert [int((keep // 36 == i).sum()) for i in range(1, len(tokens.segments))] == [
        min(36, total - total // 2) if i == target else 0 for i in range(1, len(tokens.segments))
    ]


def test_both_allocations_see_the_same_bands():
    """In a column of crops consecutive chunks of the thumbnail are the crops' regions."""
    tokens = image(3, 1)
    early = torch.zeros(36)
    early[:18] = 1  # the 18 tokens that "code" marks with alpha = 0.5
    tokens.provided["cls_attention", 0] = early.expand(4, 2, 36).contiguous()
    kept = [HiRED(0.3, allocation=a).select(tokens).keep for a in ("paper", "code")]
    assert torch.equal(*kept)


def towers_attention(model, vision) -> dict[int, torch.Tensor]:
    """(tiles, cells) CLS attention summed over heads, of layers 0 and -2, from the tower's own attention
    maps.
    """
    tower = model.base_model.vision_tower
    tower.set_attn_implementation("eager")
    sizes = vision["image_sizes"].tolist()
    tiles = len(vision["pixel_values"][0])
    assert len(sizes) == 1
    with torch.no_grad():
        maps = tower(vision["pixel_values"][0, :tiles], output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    return {i: maps[i][:, :, 0, 1:].sum(1) for i in (0, len(maps) - 2)}


@pytest.mark.parametrize("keep_newline", [False, True])
@pytest.mark.parametrize(
    "size, grid", [((28, 56), (1, 2)), ((300, 90), (3, 1)), ((33, 70), (2, 3)), ((20, 84), (1, 3))]
)
def test_packing_on_a_model(size, grid, keep_newline):
    """Which rows of the prompt stay: thumbnail first, then the unpadded canvas line by line."""
    model, (rows, columns), n = model_of("llava_next"), grid, SIDE**2
    inputs = prompts("llava_next", model, [[picture(*size, seed=5)]])
    late, early = (towers_attention(model, inputs)[i] for i in (2, 0))
    w = weights(early[0], rows, columns, SIDE, 0.5, "paper")
    counts = budgets(n, 1 + rows * columns, 0.3, 0.5, w, "paper")
    masks = torch.zeros(1 + rows * columns, n)
    for i, k in enumerate(counts):
        masks[i, list(best(late[i], k))] = 1
    canvas = (
        masks[1:].view(rows, columns, SIDE, SIDE).permute(0, 2, 1, 3).reshape(1, rows * SIDE, columns * SIDE)
    )
    canvas = unpad_image(canvas, list(size))[0]
    lines = torch.cat([canvas, torch.full((len(canvas), 1), float(keep_newline))], 1)
    wanted = torch.cat([masks[0], lines.flatten()]).nonzero()[:, 0]
    with patched(model, HiRED(0.3, keep_newline=keep_newline)) as spy, torch.no_grad():
        model(**inputs)
    ((total, answer),) = spy.items
    assert total == n + lines.numel()
    assert answer.keep.tolist() == wanted.tolist()
    if keep_newline:
        separators = n + (torch.arange(len(canvas)) + 1) * lines.shape[1] - 1
        assert torch.isin(separators, answer.keep).all()


def test_newlines_one_per_line_of_the_canvas():
    model = model_of("llava_next")
    inputs = prompts("llava_next", model, [[picture(70, 61, seed=1)]])
    kept = {}
    for keep_newline in (False, True):
        with vtoken.applied(model, "hired", budget=0.2, keep_newline=keep_newline), torch.no_grad():
            model(**inputs)
            visual = vtoken.report(model).visuals[0]
        kept[keep_newline] = visual
    lines = unpad_image(torch.zeros(1, 12, 12), [70, 61]).shape[1]
    assert (
        int((kept[True].cells[kept[True].keep] < 0).sum())
        == lines
        == kept[True].tokens_out - kept[False].tokens_out
    )
    assert int((kept[False].cells[kept[False].keep] < 0).sum()) == 0


@pytest.mark.parametrize("name", ["hired", "vtc_cls", "uniform", "random", "pool"])
def test_a_batch_is_its_rows(name):
    model, pictures = model_of("llava_next"), [picture(33, 70, seed=1), picture(84, 28, seed=2)]

    def kept(rows):
        with patched(model, create(name, budget=0.3)) as spy, torch.no_grad():
            model(**prompts("llava_next", model, rows))
        return [answer.keep.tolist() for _, answer in spy.items]

    together = kept([[p] for p in pictures])
    assert together == kept([pictures]) == [kept([[p]])[0] for p in pictures]


@pytest.mark.parametrize("name", ["hired", "vtc_cls", "uniform", "random", "pool"])
@pytest.mark.parametrize("size", [(33, 70), (300, 90), (61, 33)])
@pytest.mark.parametrize("budget", [0.3, 10])
def test_shares_and_numbers(name, size, budget):
    """A share is one of what the unpatched model feeds, a number counts per image; padding is never chosen."""
    model = model_of("llava_next")
    options = dict(keep_newline=False) if name in ("hired", "vtc_cls") else {}
    with vtoken.applied(model, name, budget=budget, **options), torch.no_grad():
        model(**prompts("llava_next", model, [[picture(*size, seed=1)]]))
        visual = vtoken.report(model).visuals[0]
    assert visual.tokens_out == len(visual.kept_cells) >= 1
    if name == "hired":  # its shares are of all cells, padding included
        most = budget if budget > 1 else int(budget * sum(s.size for s in visual.segments))
        assert visual.tokens_out <= most
        return
    fed = [s.fed for s in visual.segments]
    counts = create(name, budget=budget, **options).counts(visual.segments)
    assert all(c <= n for c, n in zip(counts, fed))
    if budget > 1:
        assert sum(counts) <= budget
    elif name != "pool":
        assert counts == [max(1, int(budget * n)) if n else 0 for n in fed]
    starts = torch.tensor([0] + [s.size for s in visual.segments]).cumsum(0)
    kept = torch.histogram(visual.kept_cells.double(), starts.double()).hist.long().tolist()
    assert kept == counts if name != "pool" else sum(kept) <= sum(fed)


@pytest.mark.parametrize("allocation", ["paper", "code"])
def test_no_image_is_left_without_a_token(allocation):
    """alpha = 0 and all attention on cells of padding."""
    segments = (
        Segment("thumbnail", (6, 6)),
        Segment("crop", (6, 6), tokens=12),
        Segment("crop", (6, 6), (0, 1), tokens=12),
    )
    tokens = image(1, 2)
    cells = torch.cat([torch.arange(36), *(36 * i + torch.arange(12, 24) for i in (1, 2))])
    tokens = VisualTokens(torch.zeros(60, 4), segments, cells, TOWER, provided=tokens.provided)
    late = torch.full((3, 2, 36), 0.001)
    late[:, :, :12] = 0.01
    tokens.provided["cls_attention", 2] = late
    assert len(HiRED(0.1, alpha=0.0, allocation=allocation).select(tokens).keep) == 1
    masked = HiRED(0.1, alpha=0.0, allocation=allocation, mask_padding=True).select(tokens)
    assert len(masked.keep) >= 8


def test_shrunk_canvases_rank_what_is_fed():
    """LLaVA-OneVision: a share of what is fed, chosen among the cells that have a token."""
    model = model_of("llava_onevision", 0, "anyres_max_1")
    with vtoken.applied(model, "hired", budget=0.5, score="received"), torch.no_grad():
        model(**prompts("llava_onevision", model, [[picture(70, 61, seed=2)]]))
        visual = vtoken.report(model).visuals[0]
    fed = sum(s.fed for s in visual.segments)
    assert fed == 16 + 12
    assert fed // 2 - 9 <= visual.tokens_out <= fed // 2
