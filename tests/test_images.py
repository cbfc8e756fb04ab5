"""The picture loader: equal to transformers' `load_image` for every kind of input."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from vtoken.cli.demo import open_image as of_the_command_line
from vtoken.eval.benchmarks.task import decoded
from vtoken.images import open_image, pixels, rgb
from vtoken.streaming.pictures import picture_of
from vtoken.video import Limits, LiveReader, VideoError, open_video

ORIENTATION = 0x112


def photo() -> Image.Image:
    """48 x 32, a quarter of it red, one of them green: no turn or mirror of it is like another."""
    image = Image.new("RGB", (48, 32), (40, 40, 200))
    image.paste((200, 40, 40), (0, 0, 24, 16))
    image.paste((40, 200, 40), (24, 0, 48, 16))
    return image


def saved(folder: Path, orientation: int, suffix: str = ".png") -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = folder / f"photo{orientation}{suffix}"
    photo().save(path, exif=exif)
    return path


def first(video: object) -> np.ndarray:
    with video as reader:  # type: ignore[attr-defined]
        return next(iter(reader)).image


def from_file_object(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return first(open_video(file))


WAYS = {
    "open_image": lambda p: np.asarray(open_image(p)),
    "command line": lambda p: np.asarray(of_the_command_line(str(p))),
    "bytes": lambda p: np.asarray(open_image(io.BytesIO(p.read_bytes()))),
    "session": lambda p: picture_of(Image.open(p))[0],
    "evaluation": lambda p: np.asarray(decoded("one", lambda: Image.open(p))),
    "video": lambda p: first(open_video(p)),
    "video by index": lambda p: open_video(p).get_frames([0])[0].image,
    "video, file object": from_file_object,
    "stream": lambda p: first(LiveReader(p, speed=None)),
    "stream of pictures": lambda p: first(LiveReader([Image.open(p)], speed=None)),
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
@pytest.mark.parametrize("way", WAYS)
def test_upright_on_every_way(tmp_path, way, suffix):
    seen = set()
    for orientation in range(1, 9):
        path = saved(tmp_path, orientation, suffix)
        image = WAYS[way](path)
        np.testing.assert_array_equal(image, np.asarray(load_image(str(path))))
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        seen.add((image.shape, image[2, 2].tobytes(), image[2, -3].tobytes(), image[-3, 2].tobytes()))
    assert len(seen) == 8  # they are eight pictures, not one


def test_exif_data_that_cannot_be_read(tmp_path):
    photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xffgarbage" * 3)
    assert open_image(tmp_path / "a.jpg").size == (48, 32)
    assert first(open_video(tmp_path / "a.jpg")).shape == (32, 48, 3)


MODES = ("1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa")


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_what_pillow_makes_of_them(mode):
    image = photo().convert("RGBA").convert("RGBa") if mode == "RGBa" else photo()
    if mode == "LAB":
        image = Image.new("LAB", (4, 4), (120, 128, 128))
    elif mode == "PA":
        image = photo().convert("P").convert("PA")
    elif mode not in ("RGBa", "LAB"):
        image = photo().convert(mode)
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_sixteen_bits_keep_their_upper_eight(tmp_path, mode):
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = Image.frombytes(mode, (16, 16), grey.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    np.testing.assert_array_equal(pixels(image)[..., 1], grey >> 8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    for way in ("open_image", "video", "stream", "session"):
        np.testing.assert_array_equal(WAYS[way](tmp_path / "a.png")[..., 2], grey >> 8)


def test_values_without_a_range_are_refused():
    for image in (
        Image.fromarray(np.full((4, 4), 0.5, np.float32)),
        Image.fromarray(np.full((4, 4), 70_000, np.int32)),
    ):
        with pytest.raises(ValueError, match="have no known range: convert it to 8-bit RGB"):
            rgb(image)
    assert (pixels(Image.fromarray(np.full((4, 4), 200, np.int32))) == 200).all()


def arrays() -> dict[str, np.ndarray]:
    image = np.asarray(photo())
    return {
        "mirrored": image[:, ::-1],
        "upside down": image[::-1],
        "BGR": image[..., ::-1],
        "Fortran": np.asfortranarray(image),
        "planes": np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0),
        "every other": image[::2, ::2],
        "read-only": np.broadcast_to(image[:1, :1], image.shape),
        "matrix": np.ma.masked_array(image),
    }


@pytest.mark.parametrize("case", arrays())
def test_arrays_in_any_order(case):
    image = arrays()[case]
    found, _ = picture_of(image)
    np.testing.assert_array_equal(found, np.asarray(image))
    assert found.flags.c_contiguous and type(found) is np.ndarray
    np.testing.assert_array_equal(
        picture_of(torch.tensor(np.array(image)).permute(1, 0, 2))[0], found.transpose(1, 0, 2)
    )
    np.testing.assert_array_equal(first(LiveReader([image], speed=None)), found)


def wrong() -> dict[str, object]:
    image = np.asarray(photo())
    return {
        "float": image / 255,
        "float tensor": torch.zeros(4, 4, 3),
        "16 bits": image.astype(np.uint16),
        "signed": image.astype(np.int8),
        "bool": image > 3,
        "alpha": np.dstack([image, image[..., :1]]),
        "grey": image[..., 0],
        "channels first": image.transpose(2, 0, 1),
        "batch": image[None],
        "no rows": image[:0],
        "no columns": image[:, :0],
        "none": None,
        "text": "photo.jpg",
        "objects": np.full((4, 4, 3), None),
    }


@pytest.mark.parametrize("case", wrong())
def test_arrays_that_are_no_picture(case):
    kind = ValueError if case in ("no rows", "no columns") else TypeError
    with pytest.raises(kind, match=r"^A frame is an \(h, w, 3\) uint8 RGB array .* found \w+ of shape"):
        picture_of(wrong()[case])
    with pytest.raises(VideoError, match=r"^a frame is an"):
        first(LiveReader([wrong()[case]], speed=None))


def broken(folder: Path, case: str) -> object:
    path = folder / "a.png"
    photo().save(path)
    data = path.read_bytes()
    if case == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif case == "damaged":
        path.write_bytes(data[:45] + bytes(20) + data[65:])
    elif case == "text":
        path.write_text("no picture " * 30)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "svg":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    elif case == "eps":  # Pillow has Ghostscript run it
        photo().save(path, "EPS")
    elif case == "pipe":
        os.mkfifo(folder / "pipe")
        return folder / "pipe"
    elif case == "cut tiff":
        photo().save(path, "TIFF", compression="tiff_lzw")
        path.write_bytes(path.read_bytes()[:150])
    return {
        "folder": folder,
        "missing": folder / "none.png",
        "zero": "/dev/zero",
        "null": "a\0b",
        "tilde": "~.png",
    }.get(case, path)


CASES = "cut damaged text empty svg eps pipe folder missing zero null tilde"


@pytest.mark.parametrize("case", [*CASES.split(" "), "cut tiff"])
def test_what_is_no_picture_gets_one_sentence(tmp_path, case):
    with pytest.raises(ValueError, match=r"^[^\n]+\.$"):
        open_image(broken(tmp_path, case))


def test_a_tilde_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~.png", "~root", "~nobody-of-that-name"):
        photo().save(tmp_path / name, "PNG")
        assert open_image(name).size == (48, 32)


def test_an_array_with_too_many_pixels_is_refused_before_it_is_copied():
    huge = np.broadcast_to(np.zeros(3, np.uint8), (2**14, 2**14, 3))
    for way in (lambda: pixels(huge), lambda: first(LiveReader([huge], speed=None))):
        tracemalloc.start()
        with pytest.raises(ValueError, match="has pictures of 16384 x 16384 pixels, more than"):
            way()
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
        tracemalloc.stop()


def test_a_tensor_with_too_many_pixels_is_refused_before_it_comes_from_its_device():
    class Away(torch.Tensor):
        def cpu(self, *args, **kwargs):
            raise AssertionError("it is copied")

    for shape, match in (
        ((2**14, 2**14, 3), "has pictures of 16384 x 16384"),
        ((2**14, 2**14), "A frame is"),
    ):
        huge = torch.zeros(1, dtype=torch.uint8).expand(shape).as_subclass(Away)
        with pytest.raises((TypeError, ValueError), match=match):
            pixels(huge)


def test_an_icon_with_a_large_picture_is_not_decoded(tmp_path):
    """Pillow decodes an icon while it opens it, whatever size the icon says it has."""
    huge, path = io.BytesIO(), tmp_path / "a.png"
    Image.new("L", (9000, 9000)).save(huge, "PNG")
    data = huge.getvalue()
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22)
    path.write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + data)
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail(f"{image.size} are decoded"))
        open_image(path, Limits(pixels=2**25))
    assert "is an icon" in str(caught.value)
    with path.open("rb") as file, pytest.raises(ValueError, match="is an icon"):
        open_image(file)
