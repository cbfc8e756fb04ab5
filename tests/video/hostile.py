"""Harmful media that name other files or declare more than they hold, and a canary file."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path

from tests.video.media import write

_OPEN, _NONBLOCK = 0x20, 0o4000  # IN_OPEN, IN_NONBLOCK of inotify(7)


class Canary:
    """A sound video, and whether anybody has opened it since it was made."""

    def __init__(self, folder: Path, name: str = "canary.ts"):
        self.path = write(folder / name, 8)
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(_NONBLOCK)
        assert libc.inotify_add_watch(self._watch, os.fsencode(self.path), _OPEN) >= 0, os.strerror(
            ctypes.get_errno()
        )

    def opened(self) -> bool:
        try:
            return bool(os.read(self._watch, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._watch)


def hls(target: str) -> bytes:
    text = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"
    return text.encode()


def ffconcat(target: str) -> bytes:
    return f"ffconcat version 1.0\nfile '{target}'\n".encode()


def sdp(target: str) -> bytes:
    return (
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n"
        b"a=rtpmap:96 H264/90000\r\na=control:" + target.encode() + b"\r\n"
    )


def dash(target: str) -> bytes:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT1S"><Period><AdaptationSet>'
        f'<Representation id="1" bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>'
    ).encode()


PLAYLISTS: dict[str, Callable[[str], bytes]] = {"m3u8": hls, "ffconcat": ffconcat, "sdp": sdp, "mpd": dash}


def boxes(data: bytes | bytearray, *path: bytes) -> list[int]:
    """Where the boxes on a path through an mp4 begin, one after the other."""
    found, at, end = [], 0, len(data)
    for name in path:
        while data[at + 4 : at + 8] != name:
            at += struct.unpack_from(">I", data, at)[0]
            assert at < end, name
        found.append(at)
        end, at = at + struct.unpack_from(">I", data, at)[0], at + 8
    return found


def with_reference(folder: Path, target: str) -> Path:
    """A mov whose pictures lie in another file of its folder: what QuickTime calls a data reference."""
    data = bytearray(write(folder / "whole.mov", 8, group=8).read_bytes())
    name = target.encode()
    path = b"/" + name + b"\0" * ((len(name) + 1) % 2)
    record = (
        bytes(10) + b"\0" + bytes(27) + bytes(12) + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16)
    )
    record += (
        struct.pack(">HH", 1, 1)
        + bytes(16)
        + struct.pack(">HH", 2, len(path))
        + path
        + struct.pack(">hh", -1, 0)
    )
    entry = struct.pack(">I4sI", 12 + len(record), b"alis", 0) + record
    *around, at = boxes(data, b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")
    old = struct.unpack_from(">I", data, at)[0]
    new = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    for place in around:
        struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + len(new) - old)
    data[at : at + old] = new
    found = folder / "reference.mov"
    found.write_bytes(data)
    return found
