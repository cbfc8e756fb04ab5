"""Load images as upright 8-bit RGB pictures, for every entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .limits import Limits, given

# Formats that are decoded in this process and name no other file; EPS, for instance, runs a program. No
# icons: Pillow decodes them before their size can be looked at.
FORMATS = "JPEG,MPO,PNG,WEBP,GIF,BMP,DIB,TIFF,PPM,AVIF,HEIF,JPEG2000,TGA,PCX,SGI,QOI,DDS,PSD"
ICON = b"\0\0\1\0"  # its first bytes, which pass for a TGA
PHOTO = Limits(pixels=2**27)  # large enough for the largest common phone sensor but one
_FRAME = "A frame is an (h, w, 3) uint8 RGB array with h, w >= 1, or a PIL image"


def open_image(source: Any, limits: Limits | None = PHOTO, name: str | None = None) -> Image.Image:
    """An RGB picture, turned by its EXIF orientation as transformers' `load_image` does.

    Args:
        source: path, or binary file object with `seek`.
        limits: bounds on its pixels, None for none. Pillow's own bound against decompression bombs stays.
        name: its name in messages; default: the path.

    Raises:
        ValueError: one sentence: there is no such file, it is not a picture, damaged or too large, or its
            colours are unknown.
    """
    if name is None:
        name = "the picture" if hasattr(source, "read") else repr(str(source))
    if not hasattr(source, "read"):
        _check_file(source, name)
    Image.init()
    try:
        if _begins(source, ICON):
            raise ValueError(f"{name} is an icon, which is not read: save it as a PNG or JPEG.")
        with Image.open(source, formats=[f for f in FORMATS.split(",") if f in Image.OPEN]) as image:
            return rgb(image, limits, f"The image {name}")
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} is not an image that can be read: use a PNG or JPEG, for instance."
        ) from None
    except ValueError:
        raise
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, DecompressionBombError and others
        raise ValueError(f"The image {name} cannot be read: {_first_line(error)}.") from None


def rgb(image: Image.Image, limits: Limits | None = PHOTO, name: str = "The picture") -> Image.Image:
    """A picture in mode RGB, upright, without alpha as in transformers; 16-bit values keep the upper 8 bits.

    Raises:
        ValueError: one sentence: it is damaged or too large, or its values have no known range.
    """
    excess = given(limits).excess_pixels(*image.size)
    if excess:
        raise ValueError(f"{name} {excess}.")
    try:
        return _eight_bits(_upright(image), image.format).convert("RGB")
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {_first_line(error)}.") from None


def pixels(image: Any, limits: Limits | None = PHOTO) -> np.ndarray:
    """(h, w, 3) uint8 RGB in C order of a PIL image, array or tensor.

    Raises:
        TypeError: for another shape or dtype.
        ValueError: for an array without pixels or with too many, and for a PIL image as `rgb`.
    """
    if isinstance(image, Image.Image):
        return np.ascontiguousarray(rgb(image, limits))
    if hasattr(image, "detach"):
        if image.is_meta:
            raise TypeError(f"{_FRAME}, found a tensor without data of shape {tuple(image.shape)}.")
        _check_array(image, tuple(image.shape), str(image.dtype).removeprefix("torch."), limits)
        image = image.detach().cpu()
    array = np.asarray(image)
    _check_array(image, array.shape, str(array.dtype), limits)
    return np.ascontiguousarray(array)


def _check_array(image: Any, shape: tuple[int, ...], dtype: str, limits: Limits | None) -> None:
    """Refuse what is no frame or too large, before it is copied."""
    wrong = TypeError if len(shape) != 3 or shape[-1] != 3 or dtype != "uint8" else ValueError
    if wrong is TypeError or 0 in shape:
        raise wrong(f"{_FRAME}, found {type(image).__name__} of shape {shape} and {dtype}.")
    excess = given(limits).excess_pixels(shape[1], shape[0])
    if excess:
        raise ValueError(f"The picture {excess}.")


def _check_file(path: Any, name: str) -> None:
    try:
        found = Path(path).is_file()
    except (TypeError, ValueError, OSError):
        found = False
    if not found:
        raise ValueError(f"There is no image file {name}.") from FileNotFoundError(name)


def _begins(source: Any, first: bytes) -> bool:
    """Whether a file has these first bytes."""
    if not hasattr(source, "read"):
        with open(source, "rb") as file:
            return file.read(len(first)) == first
    source.seek(0)
    found = source.read(len(first)) == first
    source.seek(0)  # where Pillow reads too
    return found


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF data turn nothing
        return image


def _eight_bits(image: Image.Image, format: str | None) -> Image.Image:
    """The picture in a mode whose range of values Pillow knows."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    if image.mode == "I" and format == "PNG":  # earlier releases of Pillow open 16 bits of grey in this mode
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "I" and values.min() >= 0 and values.max() <= 255:
        return Image.fromarray(values.astype(np.uint8))
    raise ValueError(
        f"its values, of mode {image.mode!r} from {values.min():g} to {values.max():g}, have no known range:"
        " convert it to 8-bit RGB"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
