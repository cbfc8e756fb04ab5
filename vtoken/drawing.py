"""Pictures of the kept visual tokens: dropped cells dimmed, kept cells outlined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from .lettering import INK, KEPT, LINE, PAPER, font, with_legend, wrapped

if TYPE_CHECKING:
    from torch import Tensor


def tower_images(pixel_values: Tensor, image_processor: Any) -> list[Image.Image]:
    """The pictures that the vision tower read, one per tower forward, as the processor made them.

    They are cropped, resized and padded.

    Args:
        pixel_values: (..., 3, H, W) floating point, normalised by the processor.
        image_processor: has `image_mean` and `image_std`, three numbers each in 0..1.

    Raises:
        ValueError: if `pixel_values` is not made of H x W pictures (Qwen's processors flatten patches).
    """
    if pixel_values.ndim < 4 or pixel_values.shape[-3] != 3:
        raise ValueError(
            "tower_images needs pixel_values of shape (..., 3, height, width), found"
            f" {tuple(pixel_values.shape)}; draw on the original image instead."
        )
    pictures = pixel_values.detach().float().cpu().flatten(0, -4).permute(0, 2, 3, 1).numpy()
    mean, std = np.asarray(image_processor.image_mean), np.asarray(image_processor.image_std)
    return [Image.fromarray(((p * std + mean).clip(0, 1) * 255).round().astype(np.uint8)) for p in pictures]


def draw_cells(
    image: Image.Image,
    grid: tuple[int, int],
    kept: Any,
    *,
    cell: int = 32,
    dim: float = 0.75,
    fade: Any = None,
) -> Image.Image:
    """One picture with its kept cells in full colour and outlined, the others dimmed.

    Args:
        image: any PIL image; it is stretched over the grid.
        grid: (rows, columns).
        kept: row-major indices of the kept cells, or a bool mask of rows * columns entries.
        cell: side of a cell in the result, px.
        dim: how far dropped cells fade to white, 0 (not at all) to 1 (white).
        fade: (rows * columns,) share of `dim` for each dropped cell, 0 to 1; all of it if None.

    Returns:
        An RGB image of (columns * cell, rows * cell) px.

    Raises:
        ValueError: if `kept` names cells that the grid does not have.
    """
    rows, columns = grid
    mask = _as_mask(kept, rows * columns).reshape(rows, columns)
    pixels = np.asarray(
        image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC), np.float32
    )
    shown = mask.repeat(cell, 0).repeat(cell, 1)[..., None]
    share = np.ones((rows, columns)) if fade is None else _array(fade).reshape(rows, columns)
    white = dim * share.repeat(cell, 0).repeat(cell, 1)[..., None]
    faded = pixels.mean(-1, keepdims=True) * (1 - white) + 255 * white
    drawn = Image.fromarray(np.where(shown, pixels, faded).astype(np.uint8))
    pen, width = ImageDraw.Draw(drawn), max(1, cell // 12)
    padded = np.pad(mask, 1)
    for r, c in zip(*np.nonzero(mask)):
        left, top, right, bottom = c * cell, r * cell, (c + 1) * cell - 1, (r + 1) * cell - 1
        for is_open, box in (
            (not padded[r, c + 1], (left, top, right, top + width - 1)),
            (not padded[r + 2, c + 1], (left, bottom - width + 1, right, bottom)),
            (not padded[r + 1, c], (left, top, left + width - 1, bottom)),
            (not padded[r + 1, c + 2], (right - width + 1, top, right, bottom)),
        ):
            if is_open:
                pen.rectangle(box, fill=KEPT)
    return drawn


def visualize(
    image: Image.Image | Sequence[Image.Image], tokens: Any, *, cell: int = 32, dim: float = 0.75
) -> Image.Image:
    """Draw one image's kept visual tokens, on all its crops or frames.

    A report of a plain encoder is drawn as one patch colour per token, see `draw_groups`.

    Tokens that are dropped inside the LLM lose their colour; the earlier the drop, the paler they are. A
    legend names the layers that read each shade. Tokens that the last layer reads are outlined.

    Args:
        image: the pictures that the tower read, one PIL image per segment (see `tower_images`), or the
            original image, of which every segment shows its `box`.
        tokens: a `vtoken.report(model)` of one image, one entry of its `visuals`, or anything that has
            `segments` (each with `grid`, `kind`, `place` and, if not the whole image, `box`), `cells` (cell
            of each token, -1 for separators), `keep` (indices of the kept tokens) and, where the LLM drops
            some of them, `layers` (see `vtoken.accounting.LayersRead`).
        cell, dim: as in `draw_cells`.

    Returns:
        An RGB image: a thumbnail to the left of the canvas of its crops, or frames side by side; a legend
        below.

    Raises:
        TypeError: if `tokens` has no segments, as when the arguments are in the wrong order.
        ValueError: if a report of several images is given, if the tokens are queries without a place, or the
            images do not match the segments; of a plain encoder if the images do not match the batch, or its
            patches form no grid of known size.
    """
    if hasattr(tokens, "owner"):
        return _encoder_pictures(image, tokens, cell)
    tokens = _one_image(tokens)
    segments = list(tokens.segments)
    _check_places(segments)
    images = [_region(image, s) for s in segments] if isinstance(image, Image.Image) else list(image)
    if len(images) < len(segments):
        raise ValueError(
            f"visualize needs one picture or one per segment: {len(segments)} segments, {len(images)}"
            " pictures."
        )
    sizes = [s.grid[0] * s.grid[1] for s in segments]
    layers = getattr(tokens, "layers", ())
    keeps = [r.keep for r in layers] or [tokens.keep]
    cells = _array(tokens.cells)
    read = [_as_mask(c[c >= 0], sum(sizes)) for c in (cells[_array(keep)] for keep in keeps)]
    levels = np.sum(read, 0)  # number of ranges of layers that read a cell
    fade, cuts = 1 - levels / len(read), np.cumsum(sizes)[:-1]
    panels = [
        draw_cells(picture, segment.grid, part, cell=cell, dim=dim, fade=share)
        for picture, segment, part, share in zip(
            images, segments, np.split(read[-1], cuts), np.split(fade, cuts)
        )
    ]
    crops = [i for i, s in enumerate(segments) if s.kind == "crop"]
    blocks = [panels[i] for i in range(len(segments)) if i not in crops]
    if crops:
        blocks.append(_canvas([panels[i] for i in crops], [segments[i].place for i in crops]))
    drawn = side_by_side(blocks) if len(blocks) > 1 else blocks[0]
    return with_legend(drawn, layers, levels, dim) if len(layers) > 1 else drawn


def draw_groups(image: Image.Image, grid: tuple[int, int], owner: Any, *, cell: int = 16) -> Image.Image:
    """One picture in which every token has one colour, the mean of its patches, and a border.

    Args:
        image: any PIL image; it is stretched over the grid.
        grid: (rows, columns).
        owner: (rows * columns,) int, the token that each patch ended up in; dropped patches (-1) are white.
        cell: side of a patch in the result, px.

    Returns:
        An RGB image of (columns * cell, rows * cell) px.
    """
    rows, columns = grid
    owner = _array(owner).reshape(-1)
    resized = image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    patches = np.asarray(resized, np.float64).reshape(rows, cell, columns, cell, 3).mean((1, 3))
    patches = patches.reshape(-1, 3)
    _, group = np.unique(owner, return_inverse=True)
    sums = np.stack([np.bincount(group, patches[:, i]) for i in range(3)], 1)
    colours = (sums / np.bincount(group)[:, None])[group]
    colours[owner < 0] = PAPER
    drawn = colours.reshape(rows, columns, 3).repeat(cell, 0).repeat(cell, 1)
    labels = owner.reshape(rows, columns).repeat(cell, 0).repeat(cell, 1)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    drawn[border] = KEPT
    return Image.fromarray(drawn.round().astype(np.uint8))


def _encoder_pictures(image: Image.Image | Sequence[Image.Image], report: Any, cell: int) -> Image.Image:
    """The images of an encoder's batch side by side, one colour per token."""
    images = [image] if isinstance(image, Image.Image) else list(image)
    if report.grid is None:
        raise ValueError(
            "visualize draws an encoder's patches on its own grid, and these images have another size: resize"
            " them as the model's transform does."
        )
    if len(images) != report.images:
        raise ValueError(f"The report is on {report.images} images, found {len(images)} pictures: give all.")
    count = report.grid[0] * report.grid[1]
    owner = np.arange(count) if report.owner is None else _array(report.owner)
    owners = np.broadcast_to(owner.reshape(-1, count), (report.images, count))
    drawn = [draw_groups(p, report.grid, o, cell=cell // 2) for p, o in zip(images, owners)]
    return side_by_side(drawn) if len(drawn) > 1 else drawn[0]


def side_by_side(pictures: Sequence[Image.Image], captions: Sequence[str] = (), gap: int = 12) -> Image.Image:
    """Pictures in a row on white, each under its caption, which is broken at the picture's width."""
    lines = [wrapped(c, p.width) for c, p in zip(captions, pictures)]
    top = gap + max((len(line) for line in lines), default=0) * LINE + (gap // 2 if lines else 0)
    width = sum(p.width for p in pictures) + gap * (len(pictures) + 1)
    sheet = Image.new("RGB", (width, top + max(p.height for p in pictures) + gap), PAPER)
    pen, x = ImageDraw.Draw(sheet), gap
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (x, top))
        for j, line in enumerate(reversed(lines[i] if i < len(lines) else ())):
            pen.text((x, top - gap // 2 - LINE * (j + 1)), line, fill=INK, font=font())
        x += picture.width + gap
    return sheet


def _region(image: Image.Image, segment: Any) -> Image.Image:
    """The part of an image that a segment covers, black outside of the image."""
    x0, y0, x1, y1 = getattr(segment, "box", (0.0, 0.0, 1.0, 1.0))
    if (x0, y0, x1, y1) == (0.0, 0.0, 1.0, 1.0):
        return image
    width, height = image.size
    left, top, right, bottom = round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height)
    return image.convert("RGB").crop((left, top, max(left + 1, right), max(top + 1, bottom)))


def _one_image(tokens: Any) -> Any:
    visuals = getattr(tokens, "visuals", None)
    if visuals is None:
        if not hasattr(tokens, "segments"):
            raise TypeError(
                f"visualize takes an image and a report, found {type(tokens).__name__} in the report's place:"
                " write vtoken.visualize(image, vtoken.report(model))."
            )
        return tokens
    if len(visuals) != 1:
        raise ValueError(f"visualize draws one image, the report has {len(visuals)}: pass report.visuals[i].")
    return visuals[0]


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def _as_mask(kept: Any, size: int) -> np.ndarray:
    kept = _array(kept)
    if kept.dtype == bool:
        if kept.size != size:
            raise ValueError(f"A mask of kept cells needs {size} entries for this grid, found {kept.size}.")
        return kept.reshape(-1)
    if kept.size and (kept.min() < 0 or kept.max() >= size):
        raise ValueError(
            f"Kept cells must lie in 0..{size - 1} for this grid, found {int(kept.min())}..{int(kept.max())}."
        )
    mask = np.zeros(size, bool)
    mask[kept.astype(np.int64)] = True
    return mask


def _canvas(panels: list[Image.Image], places: list[tuple[int, int]], gap: int = 3) -> Image.Image:
    width, height = panels[0].width + gap, panels[0].height + gap
    rows, columns = max(p[0] for p in places) + 1, max(p[1] for p in places) + 1
    sheet = Image.new("RGB", (columns * width - gap, rows * height - gap), PAPER)
    for panel, (row, column) in zip(panels, places):
        sheet.paste(panel, (column * width, row * height))
    return sheet


def _check_places(segments: list[Any]) -> None:
    """Raise ValueError if tokens have no place on the picture."""
    if any(s.kind == "queries" for s in segments):
        raise ValueError(
            "The visual tokens of this model are queries that read the whole picture and have no place on it:"
            " draw the tokens of a model whose tokens are patches."
        )
