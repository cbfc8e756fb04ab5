"""Step 3.7: crops and the whole image, found again from painted pixels through the family's own processor."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.mechanism.common import subject
from tests.models import FAMILIES
from tests.models.common import END, IMG, ROW, START, left_pad, text

from .families import check, check_attention_rows, check_full_budget, quiet, seen
from .pictures import find, painted

pytestmark = pytest.mark.skipif("step3p7" not in FAMILIES, reason="not in this transformers")


def processed(box: tuple[int, int, int, int] | None) -> dict[str, torch.Tensor]:
    """A picture of 168 x 112 pixels: two rows of three crops, and the whole in a square."""
    processor = transformers.Step3p7ImageProcessor(size={"height": 112, "width": 112}, patch_size=56)
    out = processor([painted((168, 112), box)], return_tensors="pt")
    ids = text(3, 1)
    for last in out.pop("patch_newline_masks")[0]:
        ids += [START, *[IMG] * 4, END, *([ROW] if last else [])]
    ids, mask = left_pad([[*ids, ROW + 1, *[IMG] * 16, ROW + 2, *text(4, 2)]])
    return dict(input_ids=ids, attention_mask=mask, **out)


@pytest.mark.parametrize("strategy", ["random", "uniform", "pool"])
def test_strategies(strategy):
    check("step3p7", strategy, FAMILIES["step3p7"].prompt([[0], [1, 2], []]))


def test_full_budget_is_the_unpatched_model():
    check_full_budget("step3p7")


def test_attention_rows_are_those_of_the_eager_model():
    check_attention_rows("step3p7")


def test_places_of_crops():
    items = seen(subject("step3p7"), FAMILIES["step3p7"].prompt([[0], [1, 2]]), received=False, keys=False)
    assert [[(s.kind, s.place, s.grid) for s in item.segments] for item in items] == [
        [("thumbnail", (0, 0), (4, 4)), *[("crop", (0, c), (2, 2)) for c in range(3)]],
        [("image", (0, 0), (4, 4))],
        [("thumbnail", (0, 0), (4, 4)), *[("crop", (r, c), (2, 2)) for r in (0, 1) for c in (0, 1)]],
    ]
    for item in items:
        assert sorted(item.cells.tolist()) == list(range(len(item)))
        assert item.cells[-16:].tolist() == list(range(16))  # the whole image is the last in the prompt
    (box,) = {s.box for s in items[2].segments[1:] if s.place == (1, 0)}
    assert box == (0, 0.5, 0.5, 1)


@pytest.mark.parametrize("crop", [(0, 0), (0, 2), (1, 1)])
@pytest.mark.parametrize("cell", [(0, 0), (0, 1), (1, 0)])
def test_a_marked_square_is_found_in_its_crop(crop, cell):
    (r, c), (y, x) = crop, cell
    left, top = c * 56 + x * 28 + 7, r * 56 + y * 28 + 7
    prompts = [processed(box) for box in (None, (left, top, left + 14, top + 14))]
    found, tokens = find(quiet("step3p7"), *prompts, segment=1 + 3 * r + c)
    assert tokens.segments[1 + 3 * r + c].place == crop
    assert found == 16 + 4 * (3 * r + c) + 2 * y + x


@pytest.mark.parametrize("cell", [(0, 0), (1, 3), (3, 1)])
def test_a_marked_square_is_found_in_the_whole(cell):
    top, left = cell[0] * 28 + 7, cell[1] * 42 + 10
    prompts = [processed(box) for box in (None, (left, top, left + 21, top + 14))]
    found, _ = find(quiet("step3p7"), *prompts)
    assert divmod(found, 4) == cell
