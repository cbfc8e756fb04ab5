"""Pictures of kept cells: which pixels are dimmed, outlined, and where segments go."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vtoken import lettering
from vtoken.accounting import LayersRead
from vtoken.drawing import draw_cells, side_by_side, tower_images, visualize
from vtoken.lettering import KEPT
from vtoken.tokens import Segment

BLUE = (20, 60, 220)


def plain(colour=BLUE, size=(50, 40)):
    return Image.new("RGB", size, colour)


def centres(picture, grid, cell):
    pixels = np.asarray(picture)[cell // 2 :: cell, cell // 2 :: cell]
    assert pixels.shape[:2] == grid
    return (pixels == BLUE).all(-1)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (12, 12)])
def test_kept_cells_keep_their_colour_and_the_others_fade(grid):
    n = grid[0] * grid[1]
    kept = torch.randperm(n)[: (n + 1) // 2].sort().values
    drawn = draw_cells(plain(), grid, kept, cell=16)
    assert drawn.size == (grid[1] * 16, grid[0] * 16)
    assert centres(drawn, grid, 16).ravel().nonzero()[0].tolist() == kept.tolist()


def test_mask_and_indices_draw_the_same():
    mask = np.arange(12) % 3 == 1
    a, b = (draw_cells(plain(), (3, 4), k) for k in (mask, mask.nonzero()[0]))
    assert np.array_equal(np.asarray(a), np.asarray(b))


def test_outline_runs_around_a_block_and_not_through_it():
    pixels = np.asarray(draw_cells(plain(), (3, 3), [0, 1], cell=24))
    line = (pixels == KEPT).all(-1)
    assert line[0, :48].all() and line[23, :48].all() and line[:24, 0].all() and line[:24, 47].all()
    assert not line[4:20, 20:28].any() and not line[24:].any() and not line[:, 48:].any()


def test_nothing_kept_is_all_faded():
    drawn = draw_cells(plain(), (2, 2), [])
    assert not centres(drawn, (2, 2), 32).any() and np.asarray(drawn).min() > 150


@pytest.mark.parametrize("kept", [[4], [-1], np.ones(3, bool)])
def test_cells_that_do_not_exist_are_refused(kept):
    with pytest.raises(ValueError, match="for this grid"):
        draw_cells(plain(), (2, 2), kept)


def test_tower_images_undo_the_normalisation():
    processor = SimpleNamespace(image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28])
    pictures = torch.randint(0, 256, (2, 3, 3, 8, 10), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    images = tower_images((pictures / 255 - mean) / std, processor)
    assert [np.asarray(i).transpose(2, 0, 1).tolist() for i in images] == pictures.flatten(0, 1).tolist()


def test_flattened_patches_are_refused():
    with pytest.raises(ValueError, match="original image"):
        tower_images(torch.zeros(64, 1176), SimpleNamespace())


def anyres():
    """A thumbnail of 2 x 2 cells and two crops side by side, with one separator row at the end."""
    segments = (
        Segment("thumbnail", (2, 2)),
        Segment("crop", (2, 2), (0, 0)),
        Segment("crop", (2, 2), (0, 1)),
    )
    cells = torch.tensor([*range(12), -1])
    return SimpleNamespace(segments=segments, cells=cells, keep=torch.tensor([0, 5, 11, 12]))


def test_crops_go_to_their_place_beside_the_thumbnail():
    picture = visualize(plain(), anyres(), cell=16)
    pixels = np.asarray(picture)
    blue = (pixels == BLUE).all(-1)
    gap, size = 12, 32
    thumbnail = blue[gap : gap + size, gap : gap + size]
    left = 2 * gap + size
    first, second = (blue[gap : gap + size, x : x + size] for x in (left, left + size + 3))
    assert [panel[8::16, 8::16].ravel().tolist() for panel in (thumbnail, first, second)] == [
        [True, False, False, False],
        [False, True, False, False],
        [False, False, False, True],
    ]


def test_one_picture_per_segment():
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    pixels = np.asarray(visualize([plain(c) for c in colours], anyres(), cell=16)).reshape(-1, 3).tolist()
    assert all(list(c) in pixels for c in colours)
    with pytest.raises(ValueError, match="3 segments, 2 pictures"):
        visualize([plain()] * 2, anyres())


def in_layers(*keeps, cells=16, side=4):
    """A report's entry for one image whose LLM layers 0, 1, ... read these tokens."""
    layers = tuple(LayersRead(i, i, torch.as_tensor(keep)) for i, keep in enumerate(keeps))
    segments = (Segment("image", (side, side)),)
    return SimpleNamespace(
        segments=segments, cells=torch.arange(cells), keep=torch.as_tensor(keeps[0]), layers=layers
    )


@pytest.mark.parametrize(
    "keeps",
    [
        [range(16), range(4)],  # a strategy that drops inside the LLM only
        [range(0, 16, 2), range(0, 16, 4)],  # and one before it
        [range(16), range(8), range(4), range(2)],
    ],
)
def test_what_layers_drop_is_shaded_the_lighter_the_earlier(keeps):
    grey = plain((100, 100, 100), (64, 64))
    pixels = np.asarray(visualize(grey, in_layers(*keeps), cell=16))[:64, :64]
    centre = pixels[8::16, 8::16, 0].ravel().astype(int)
    levels = np.array([sum(i in keep for keep in keeps) for i in range(16)])
    for low in range(len(keeps)):
        for high in range(low + 1, len(keeps) + 1):
            lighter, darker = centre[levels == low], centre[levels == high]
            assert not len(lighter) or not len(darker) or lighter.min() > darker.max() + 10
    assert (centre[levels == len(keeps)] == 100).all()
    outlined = (pixels == KEPT).all(-1).reshape(4, 16, 4, 16).any((1, 3)).ravel()
    assert outlined[levels == len(keeps)].any() and not outlined[levels < len(keeps)].any()


def test_the_legend_says_at_which_layer():
    bare = visualize(plain(size=(64, 64)), in_layers(range(16)), cell=32)
    two = visualize(plain(size=(64, 64)), in_layers(range(16), range(4)), cell=32)
    three = visualize(plain(size=(64, 64)), in_layers(range(8), range(4)), cell=32)
    assert bare.size == (128, 128) and bare.height < two.height < three.height and two.width == bare.width
    assert (np.asarray(two)[128:] < 100).any()  # there are words


def test_every_swatch_of_the_legend_is_in_the_picture(monkeypatch):
    """The first is empty with the frame of the tokens that every layer reads."""
    said = []
    monkeypatch.setattr(lettering, "wrapped", lambda text, width: said.append(text) or [text])
    grey = plain((110, 110, 110), (64, 64))
    pixels = np.asarray(visualize(grey, in_layers(range(8), range(4), [3]), cell=32))
    assert said == [
        "outlined: read by every LLM layer, 1 token",
        "dropped before LLM layer 2: 3 tokens",
        "dropped before LLM layer 1: 4 tokens",
        "not read by the LLM: 8 tokens",
    ]
    tops = [128 + 12 + i * 28 for i in range(4)]
    assert (pixels[tops[0] + 1, :18] == KEPT).all() and (pixels[tops[0] + 9, 9] == 255).all()
    for top, cell in zip(tops[1:], (1, 4, 8)):
        row, column = divmod(cell, 4)
        seen = pixels[row * 32 + 16, column * 32 + 16].astype(int)
        assert np.abs(pixels[top + 9, 9] - seen).max() <= 1


def test_a_report_of_several_images_asks_which():
    one = anyres()
    assert visualize(plain(), SimpleNamespace(visuals=[one])).size == visualize(plain(), one).size
    with pytest.raises(ValueError, match="has 2"):
        visualize(plain(), SimpleNamespace(visuals=[one, one]))


def test_captions_stand_in_line_above_pictures_of_any_height():
    red, blue = plain((250, 0, 0), (50, 90)), plain()
    bare = side_by_side([red, blue])
    short, long = (side_by_side([red, blue], [text, "kept"]) for text in ("kept", "many words " * 6))
    assert bare.width == short.width == long.width and bare.height < short.height < long.height
    for sheet in (short, long):
        pixels, top = np.asarray(sheet), sheet.height - bare.height + 12
        assert (pixels[top : top + 90, 12:62] == (250, 0, 0)).all()
        assert (pixels[top : top + 40, 74:124] == BLUE).all()
        assert (pixels[:top] < 100).any() and not (pixels[top + 90 :] < 100).any()
        dark = (pixels[:top] < 100).all(-1)  # the last lines stand at one height
        assert dark[top - 28 : top - 6, 12:62].any() and dark[top - 28 : top - 6, 74:124].any()
        assert dark[:, 74:124].nonzero()[0].min() >= top - 28


def test_arguments_in_the_wrong_order_are_a_sentence():
    with pytest.raises(TypeError, match=r"found Image in the report's place: write vtoken.visualize"):
        visualize(object(), Image.new("RGB", (8, 8)))
