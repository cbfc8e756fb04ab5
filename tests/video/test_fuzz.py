"""Randomly changed bytes: an answer or a VideoError of one sentence, in time, for every container."""

from __future__ import annotations

import io
import random
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.video.hostile import PLAYLISTS
from tests.video.media import in_time, picture, write
from vtoken.images import open_image
from vtoken.video import Limits, LiveReader, VideoError, open_video, sample_fps, sample_uniform

VIDEOS = {
    ".mp4": {},
    ".mov": {},
    ".ts": {},
    ".flv": {},
    ".mkv": {},
    ".avi": dict(codec="mpeg4"),
    ".webm": dict(codec="libvpx"),
    ".gif": dict(codec="gif", pixels="rgb8"),
    ".h264": dict(format="h264"),
}
PICTURES = (".tiff", ".png", ".jpg", ".webp", ".bmp")
SMALL = Limits(pixels=2**22, frames=10_000, nbytes=2**26, seconds=10)


@lru_cache
def sound(folder: Path, kind: str) -> bytes:
    path = folder / f"sound{kind}"
    if kind in PICTURES:
        Image.fromarray(picture(5)).save(path)
        return path.read_bytes()
    if kind[1:] in PLAYLISTS:
        return PLAYLISTS[kind[1:]]("sound.ts")
    if kind == ".svg":
        return (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="5" height="5"/></svg>'
        )
    return write(path, 8, **VIDEOS[kind]).read_bytes()


def changed(data: bytes, seed: int) -> bytes:
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at, size = rng.randrange(len(changed)), rng.randrange(1, 200)
        if rng.random() < 0.5:
            at %= 600  # headers
        change = rng.randrange(5)
        if change == 0:
            changed = changed[: at + 1]
        elif change == 1:
            del changed[at : at + size]
        elif change == 2:
            changed[at:at] = changed[-size:]
        else:
            changed[at : at + 1] = bytes([rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])])
        changed = changed or bytearray(b"x")
    return bytes(changed)


def use(path: Path, backend: str) -> None:
    for work in (
        lambda v: [v.duration, v.fps, *zip(v, range(12))],
        lambda v: sample_uniform(v, 4),
        lambda v: sample_fps(v, 2),
        lambda v: v.get_frames([0]),
    ):
        try:
            with open_video(path, backend, limits=SMALL, timeout=2) as video:
                work(video)
        except VideoError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
    try:
        with LiveReader(path, speed=None, limits=SMALL, timeout=2) as live:
            list(zip(live, range(12)))
    except VideoError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


KINDS = (*VIDEOS, *PICTURES, *(f".{kind}" for kind in PLAYLISTS), ".svg")


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from((".mp4", ".m3u8", None)),
    seed=st.integers(0, 2**32),
    auto=st.booleans(),
)
def test_changed_bytes(folder, kind, name, seed, auto):
    path = folder / f"changed{name or kind}"
    path.write_bytes(changed(sound(folder, kind), seed))
    in_time(lambda: use(path, "auto" if auto else "pyav"), 60)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(kind=st.sampled_from((*PICTURES, ".gif")), seed=st.integers(0, 2**32))
def test_changed_pictures(folder, kind, seed):
    try:
        image = open_image(io.BytesIO(changed(sound(folder, kind), seed)), SMALL)
        assert image.mode == "RGB"
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from(
        [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"\0\0\0\x18ftypisom",
            b"\x1a\x45\xdf\xa3",
            b"#EXTM3U\n",
            b"RIFF",
            b"FLV\x01",
            b"G" * 188,
            b"II*\0",
            b"\xff\xd8\xff",
        ]
    ),
)
def test_any_bytes(data, start):
    try:
        with open_video(io.BytesIO(start + data), limits=SMALL) as video:
            list(zip(video, range(4)))
    except VideoError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_name(name):
    try:
        open_video(name, timeout=0.1).close()
    except VideoError as error:
        assert "\n" not in str(error) or "\n" in name
