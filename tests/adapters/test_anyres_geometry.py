"""Geometry of anyres: a mark painted on a picture is found where the report places the kept cells."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import vtoken
from tests.models import FAMILIES
from tests.models.common import VID, text
from vtoken.adapters.anyres import canvas_box, square_box
from vtoken.drawing import tower_images, visualize

from .anyres import SIDE, SIZE, Changed, blind, differ, encode, model_of, picture, prompts, see

# (height, width) px and the grid of crops: the aspect ratios leave padding above and below, left and right,
# or none
SIZES = {
    (28, 56): (1, 2),
    (56, 28): (2, 1),
    (84, 28): (3, 1),
    (20, 84): (1, 3),
    (70, 61): (3, 3),
    (33, 70): (2, 3),
    (61, 33): (3, 3),
    (36, 30): (2, 2),
    (100, 300): (1, 3),
    (300, 90): (3, 1),
    (21, 25): (1, 1),
}
SPOTS = [(0.06, 0.06), (0.5, 0.5), (0.3, 0.9), (0.94, 0.45), (0.95, 0.95)]


def marked(
    size: tuple[int, int], spot: tuple[float, float]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A picture with a white square around a spot (y, x), and the square's box in fractions."""
    height, width = size
    side = max(1, round(max(size) / 28))
    y, x = min(int(spot[0] * height), height - side), min(int(spot[1] * width), width - side)
    pixels = np.array(picture(height, width))
    pixels[y : y + side, x : x + side] = 255
    return Image.fromarray(pixels), (x / width, y / height, (x + side) / width, (y + side) / height)


def overlap(boxes: torch.Tensor, box: tuple[float, ...], slack: torch.Tensor) -> torch.Tensor:
    """Which of (n, 4) boxes, each widened by (n, 2) slack, touch a box."""
    low, high = boxes[:, :2] - slack, boxes[:, 2:] + slack
    return ((low < torch.tensor(box[2:])) & (high > torch.tensor(box[:2]))).all(1)


def check_marks(segments, cells, kept, box: tuple[float, ...], resampled: float = 0.55) -> None:
    """Every segment that is fed under the mark shows it, and what is kept touches it but for the blur of
    resampling.

    `cells` are the cells of all tokens, `kept` those of the tokens that show the mark.
    """
    starts = np.cumsum([0] + [s.size for s in segments])
    centre = torch.tensor([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]).double()
    shown = 0
    for segment, start in zip(segments, starts):
        mine = kept[(kept >= start) & (kept < start + segment.size)] - start
        boxes = segment.cell_boxes()
        cell = boxes[:1, 2:] - boxes[:1, :2]
        assert bool(overlap(boxes[mine], box, cell * (resampled + segment.shrink - 1)).all())
        away = (centre - (boxes[mine][:, :2] + boxes[mine][:, 2:]) / 2).abs() / cell
        fed = torch.isin(torch.arange(start, start + segment.size), cells)
        under = (boxes[:, :2] <= centre).all(1) & (boxes[:, 2:] > centre).all(1)
        if bool((under & fed).any()):  # the cell under the mark's centre is fed: its token stays
            shown += 1
            assert len(mine) and float(away.amax(1).min()) <= 0.5 + (segment.shrink - 1) / 2 + 0.05
    assert shown >= 1


def check_pictures(model, name: str, size: tuple[int, int], alone: bool = True):
    """Encodes a grey picture and marked ones of the same size, checks each mark, returns the picture's
    segments.
    """
    pictures, boxes = zip(*(marked(size, spot) for spot in SPOTS))
    beside = [] if alone else [picture(30, 60)]
    items = encode(model, see(name, [[p, *beside] for p in (picture(*size), *pictures)]))
    grey, *others = items if alone else items[::2]
    for other, box in zip(others, boxes, strict=True):
        rows = differ(other.features, grey.features)
        assert 0 < len(rows) < len(grey) and bool((other.cells[rows] >= 0).all())
        check_marks(other.segments, other.cells, other.cells[rows], box)
    assert sum(s.fed for s in grey.segments) == len(grey.patch_rows)
    return grey


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_mark_is_found_again(name, size):
    item = check_pictures(blind(model_of(name, 1)), name, size)
    rows, columns = SIZES[size]
    assert [s.kind for s in item.segments] == ["thumbnail"] + ["crop"] * (rows * columns)
    assert [s.place for s in item.segments[1:]] == [(r, c) for r in range(rows) for c in range(columns)]
    crops = item.cells[item.cells >= SIDE**2]
    assert item.cells[: SIDE**2].tolist() == list(range(SIDE**2)) and len(crops.unique()) == len(crops)


# by hand: the unpadded canvas, and what is left of it under a limit of so many tiles (1 and 2)
SHRUNK = {
    ((70, 61), 1): ((12, 10), (4, 3)),
    ((70, 61), 2): ((12, 10), (6, 5)),
    ((33, 70), 1): ((6, 12), (2, 5)),
    ((33, 70), 2): ((6, 12), (4, 8)),
    ((84, 28), 1): ((12, 4), (6, 2)),
    ((84, 28), 2): ((12, 4), (9, 3)),
    ((20, 84), 1): ((2, 12), (1, 9)),
    ((20, 84), 2): ((2, 12), (2, 12)),
}


@pytest.mark.parametrize("size, limit", SHRUNK)
def test_a_mark_on_a_shrunk_canvas(size, limit):
    item = check_pictures(
        blind(model_of("llava_onevision", 1, f"anyres_max_{limit}")), "llava_onevision", size
    )
    (height, width), (rows, columns) = SHRUNK[size, limit]
    assert len(item) == SIDE**2 + rows * (columns + 1)
    steps = [n / m for n, m in ((height, rows), (width, columns)) if m > 1]
    assert item.segments[-1].shrink == pytest.approx(max(steps), abs=1e-5)
    assert len(item.cells[item.cells >= 0].unique()) == len(item.patch_rows)


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (50, 50)])
def test_a_mark_on_one_of_several_images(size):
    """Images that share a prompt are padded to a square and not cut."""
    (segment,) = check_pictures(
        blind(model_of("llava_onevision", 1)), "llava_onevision", size, alone=False
    ).segments
    assert segment.kind == "image" and segment.box == pytest.approx(square_box(size))


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision"])
def test_a_mark_in_the_report(name):
    """The same through a whole prompt that is pruned to what shows the mark, behind another picture."""
    model = blind(model_of(name, 1))
    after, box = marked((61, 33), (0.3, 0.9))
    with vtoken.applied(model, Changed()) as patched, torch.no_grad():
        patched(**prompts(name, model, [[picture(61, 33)]]))
        patched(**prompts(name, model, [[after]]))
        visual = vtoken.report(patched).visuals[0]
    assert 0 < visual.tokens_out < visual.tokens_in / 4
    check_marks(visual.segments, visual.cells, visual.kept_cells, box)


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision", "video_llava"])
def test_a_mark_in_a_video(name):
    """Frame 2 of 4, in the cell in row 1 and the last column of what is left of the frame after pooling."""
    family = FAMILIES[f"{name}/video"]
    model = blind(family.build())
    per_frame, extra = {"llava_next_video": (4, 0), "llava_onevision": (4, 1), "video_llava": (17, 0)}[name]
    side = SIDE if name == "video_llava" else SIDE // 2
    ids = torch.tensor([text(3, 1) + [VID] * (4 * per_frame + extra) + text(3, 2)])
    before = torch.zeros(1, 4, 3, SIZE, SIZE)
    after = before.clone()
    pixels, (row, column) = SIZE // side, (1, side - 1)
    after[
        0, 2, :, row * pixels + 2 : (row + 1) * pixels - 2, column * pixels + 2 : (column + 1) * pixels - 2
    ] = 2
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    with vtoken.applied(model, Changed()) as patched, torch.no_grad():
        patched(**given, pixel_values_videos=before)
        patched(**given, pixel_values_videos=after)
        visual = vtoken.report(patched).visuals[0]
    assert [s.kind for s in visual.segments] == ["frame"] * 4
    assert visual.kept_cells.tolist() == [2 * side**2 + row * side + column]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_boxes_are_what_the_processor_cut(name, size):
    """Padding is where a box lies outside of the picture."""
    vision = see(name, [[Image.new("RGB", size[::-1], (255, 255, 255))]])
    (item,) = encode(model_of(name), vision)
    black = vision["pixel_values"].min()
    for segment, tile in zip(item.segments, vision["pixel_values"][0], strict=True):
        x0, y0, x1, y1 = segment.box
        x = (torch.arange(SIZE) + 0.5) / SIZE * (x1 - x0) + x0
        y = (torch.arange(SIZE) + 0.5) / SIZE * (y1 - y0) + y0
        inside = ((y > 0) & (y < 1))[:, None] & ((x > 0) & (x < 1))
        padded = (tile < 0).all(0) if black < 0 else torch.zeros(SIZE, SIZE, dtype=torch.bool)
        assert bool((inside == ~padded).float().mean() > 0.97)


@pytest.mark.parametrize(
    "name, size", [("llava_next", (36, 60)), ("llava_next", (90, 40)), ("llava_onevision", (33, 70))]
)
def test_the_picture_of_the_original_is_that_of_the_tower(name, size):
    """Drawn from the original image by boxes, or from the tiles that the tower saw, it is the same picture."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack([255 * x / width, 255 * y / height, 128 + 127 * np.sin(6 * x / width)], -1)
    original, model = Image.fromarray(colours.astype(np.uint8)), model_of(name)
    inputs = prompts(name, model, [[original]])
    with vtoken.applied(model, "random", budget=0.5), torch.no_grad():
        model(**inputs)
        visual = vtoken.report(model).visuals[0]
    processor = SimpleNamespace(image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD)
    drawn = [
        visualize(p, visual, cell=8) for p in (original, tower_images(inputs["pixel_values"], processor))
    ]
    assert drawn[0].size == drawn[1].size
    a, b = (np.asarray(d).astype(float) for d in drawn)
    assert np.abs(a - b).mean() < 6 < np.abs(a - b[::-1]).mean()


def test_canvas_box():
    assert canvas_box((28, 56), (28, 56)) == (0, 0, 1, 1)
    assert canvas_box((28, 56), (56, 56)) == (0, -0.5, 1, 1.5)
    assert canvas_box((100, 50), (200, 200)) == (-0.5, 0, 1.5, 1)
    assert square_box((40, 80)) == (0, -0.5, 1, 1.5)
