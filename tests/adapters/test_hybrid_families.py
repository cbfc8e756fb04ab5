"""Qwen3.5, LFM, Nemotron-H Omni, Llama 4: the cell of every token, found again from painted pixels."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.mechanism.common import run, subject
from tests.models import FAMILIES

from .families import Probe, check_full_budget, loudest, quiet, seen

# family: rows and columns of the cells of its first picture, side of a cell in patches
GRIDS = {
    "qwen3_5": (3, 6),
    "qwen3_5_moe": (3, 6),
    "lfm2_vl": (2, 3),
    "lfm3_vl": (3, 6),
    "nemotron_h_omni": (2, 3),
}
BLOCKS = ("qwen3_5", "qwen3_5_moe", "lfm3_vl")  # patches come cell by cell
NAMES = [name for name in GRIDS if name in FAMILIES]


def painted(name: str, cell: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """A prompt of one grey picture whose patches of one cell are white."""
    inputs, (_, columns) = FAMILIES[name].prompt([[0]]), GRIDS[name]
    values = torch.full_like(inputs["pixel_values"], -0.3)
    flat = values[0] if values.ndim == 3 else values  # (patches, pixels)
    if cell is not None and name in BLOCKS:
        first = 4 * (cell[0] * columns + cell[1])
        flat[first : first + 4] = 3
    elif cell is not None:
        for y in (0, 1):
            start = (2 * cell[0] + y) * 2 * columns + 2 * cell[1]
            flat[start : start + 2] = 3
    return inputs | dict(pixel_values=values)


@pytest.mark.parametrize("cell", [(0, 0), (0, 2), (1, 0), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_a_marked_patch_is_found_at_its_cell(name, cell):
    model = quiet(name)
    (before,), (after,) = (seen(model, painted(name, c), received=False, keys=False) for c in (None, cell))
    assert after.segments[0].grid == GRIDS[name]
    found = loudest(before, after)
    assert divmod(int(after.cells[found]), GRIDS[name][1]) == cell
    with vtoken.applied(model, Probe(budget=0.5, received=False, keys=False, mark=(found,))):
        run(model, painted(name, cell), 1)
        visual = vtoken.report(model).visuals[0]
    assert visual.cells[visual.keep].tolist() == [cell[0] * GRIDS[name][1] + cell[1]]


@pytest.mark.parametrize("name", [*NAMES, *[n for n in ("llama4",) if n in FAMILIES]])
def test_full_budget_is_the_unpatched_model(name):
    check_full_budget(name)


@pytest.mark.skipif("llama4" not in FAMILIES, reason="it does not run in this transformers")
def test_tiles_of_llama4_have_places():
    items = seen(subject("llama4"), FAMILIES["llama4"].prompt([[0, 1], [2]]), received=False, keys=False)
    assert [[s.place for s in item.segments] for item in items] == [
        [(0, 0)],
        [(0, 0), (0, 0), (1, 0)],
        [(0, 0), (0, 0), (0, 1), (0, 2)],
    ]
    assert [item.segments[0].kind for item in items] == ["image", "thumbnail", "thumbnail"]
    for item in items[1:]:  # the whole image is the last tile of the prompt and the first segment
        assert sorted(item.cells.tolist()) == list(range(len(item)))
        assert item.cells[-16:].tolist() == list(range(16))


@pytest.mark.skipif(
    "nemotron_h_omni/video" not in FAMILIES, reason="it reads other videos in this transformers"
)
def test_the_own_pruner_of_nemotron_must_be_off():
    name = "nemotron_h_omni/video"
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("one")
    model.video_pruning_rate = 0.5
    with (
        vtoken.applied(model, "random", budget=0.5),
        pytest.raises(NotImplementedError, match=r"prunes videos itself .*set model.video_pruning_rate = 0"),
    ):
        run(model, inputs, 1)
