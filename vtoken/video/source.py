"""Sources of a video: a file, a file object, a network stream, a device or a pipe."""

from __future__ import annotations

import os
import re
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import Unreadable, VideoError, brief
from .growing_files import over_pipe

_HTTP = ("http", "https", "httpproxy", "tcp", "tls", "crypto")
_RTSP = ("rtp", "srtp", "udp", "tcp", "tls", "http", "https", "httpproxy")
PROTOCOLS = {  # of an address: the protocols that libav may use for it
    "http": _HTTP,
    "https": _HTTP,
    "rtsp": _RTSP,
    "rtsps": _RTSP,
    "rtmp": ("rtmp", "tcp"),
    "rtmps": ("rtmps", "tcp", "tls"),
    "rtmpt": ("rtmpt", "ffrtmphttp", "http", "tcp"),
    "rtmpts": ("rtmpts", "ffrtmphttp", "http", "https", "tcp", "tls"),
    "tcp": ("tcp",),
    "udp": ("udp",),
    "rtp": ("rtp", "srtp", "udp"),
    "srt": ("srt",),
}
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_LONGEST = 200  # characters of a name in a message


@dataclass(frozen=True)
class Source:
    """A source that libav can open.

    Attributes:
        target: argument for libav: a file object, or a name that begins with its protocol.
        name: its name in messages, without a password.
        kind: "file", "object", "network", "device" or "pipe".
        format: name of the demuxer, None to probe.
        path: path on disk of a file or pipe, None otherwise.
    """

    target: Any
    name: str
    kind: str
    format: str | None = None
    path: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        """Whether data that has been read is gone."""
        return self.kind in ("device", "pipe") or (self.kind == "object" and not _seekable(self.target))


def resolve(
    source: Any, format: str | None = None, options: dict[str, str] | None = None, growing: bool = False
) -> Source:
    """The `Source` of a user's path, address, file object or camera number.

    Raises:
        VideoError: nothing of the kind exists, or it is a directory, or empty and not `growing`.
    """
    if isinstance(source, Source):
        return source
    rest: dict[str, Any] = dict(format=format, options=dict(options or {}))
    if isinstance(source, int) and not isinstance(source, bool) and source >= 0:
        source = f"/dev/video{source}"
    if hasattr(source, "read"):
        return _object(source, rest)
    if not isinstance(source, (str, os.PathLike)):
        raise VideoError(
            f"a video is a path, an address or a binary file object, got {type(source).__name__}"
        )
    text = os.fsdecode(source)
    if not isinstance(source, str):  # a path object is no address, whatever it is called
        return _local(text, rest, growing)
    if text == "-":
        return Source(0, "standard input", "pipe", **rest)
    if text[:5].lower() == "file:":
        return _local(_path_of(text), rest, growing)
    scheme = _SCHEME.match(text)
    return _address(text, scheme[1].lower(), rest) if scheme else _local(text, rest, growing)


def _object(file: Any, rest: dict[str, Any]) -> Source:
    try:
        text = isinstance(file.read(0), str)
    except Exception as error:
        raise VideoError(f"cannot read from the file object {file!r}: {brief(error)}") from error
    if text:
        raise VideoError(f"{file!r} is a text file object; open it with mode 'rb'")
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) else type(file).__name__
    return Source(file, _short(name), "pipe" if over_pipe(file) else "object", **rest)


def _address(text: str, scheme: str, rest: dict[str, Any]) -> Source:
    name = _short(_without_password(text))
    if scheme not in PROTOCOLS:
        raise Unreadable(
            f"{name!r}: vtoken knows no such protocol as {scheme[:40]!r}, only {', '.join(PROTOCOLS)}"
        )
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise VideoError(f"{name!r} holds a control character, which no address does")
    return Source(scheme + text[len(scheme) :], name, "network", **rest)


def _path_of(address: str) -> str:
    """The path of a file: address."""
    if address[5:7] != "//":
        return address[5:]
    parts = urlsplit(address)
    if parts.netloc.lower() not in ("", "localhost"):
        raise VideoError(
            f"{_short(address)!r} names a file of another machine; mount it, and name its path here"
        )
    return unquote(parts.path)


def _existing(text: str) -> Path:
    """The path of that name; if there is none, with the user's home for its ~."""
    path = Path(text)
    if text.startswith("~"):
        with suppress(RuntimeError, ValueError, OSError):
            return path if os.path.lexists(path) else path.expanduser()
    return path


def _local(text: str, rest: dict[str, Any], growing: bool) -> Source:
    name, path = _short(text), _existing(text)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if rest["format"] in ("lavfi", "dshow", "avfoundation"):
            return Source(text, name, "device", **rest)
        why = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else getattr(error, "strerror", None) or str(error)
        )
        raise VideoError(f"cannot open {name!r}: {why}") from error
    path, mode = path.absolute(), status.st_mode
    if stat.S_ISDIR(mode):
        raise VideoError(f"{name!r} is a directory, not a video; name one file in it")
    if stat.S_ISCHR(mode):
        rest["format"] = rest["format"] or ("v4l2" if sys.platform.startswith("linux") else None)
        return Source(str(path), name, "device", path=str(path), **rest)
    if stat.S_ISFIFO(mode):
        return Source(str(path), name, "pipe", path=str(path), **rest)
    if not stat.S_ISREG(mode):
        raise VideoError(f"cannot open {name!r}: it is a socket or a block device, not a file")
    if status.st_size == 0 and not growing:
        raise VideoError(f"{name!r} is empty (0 bytes)")
    # with its protocol named, a file called "a:b.mp4" is not taken for an address
    return Source(f"file:{path}", name, "file", path=str(path), **rest)


def _seekable(file: Any) -> bool:
    seekable = getattr(file, "seekable", None)
    return bool(seekable()) if callable(seekable) else hasattr(file, "seek") and hasattr(file, "tell")


def _without_password(address: str) -> str:
    return re.sub(r"://[^/@]*@", "://", address)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}...{name[-_LONGEST // 2 :]}"
