"""What a video is read from: a file, a file object, a stream of the network, a device or a pipe."""

from __future__ import annotations

import os
import re
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import VideoError
from .waiting import over_pipe

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Source:
    """Attributes:
    target: what libav opens: a name or a file object.
    name: what messages call it, without a password.
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
        """Whether what has been read is gone."""
        return self.kind in ("device", "pipe") or (self.kind == "object" and not _seekable(self.target))


def resolve(
    source: Any, format: str | None = None, options: dict[str, str] | None = None, growing: bool = False
) -> Source:
    """The `Source` that a user's path, address, file object or camera number names.

    Raises:
        VideoError: nothing of the kind exists, or it is a directory, or empty and not `growing`.
    """
    if isinstance(source, Source):
        return source
    rest: dict[str, Any] = dict(format=format, options=dict(options or {}))
    if isinstance(source, int) and not isinstance(source, bool) and source >= 0:
        source = f"/dev/video{source}"
    if hasattr(source, "read"):
        if isinstance(source.read(0), str):
            raise VideoError(f"{source!r} is a text file object; open it with mode 'rb'")
        name = getattr(source, "name", None)
        name = name if isinstance(name, str) else type(source).__name__
        return Source(source, name, "pipe" if over_pipe(source) else "object", **rest)
    if not isinstance(source, (str, os.PathLike)):
        raise VideoError(f"a video is a path, an address or a binary file object, got {type(source).__name__}")
    text = os.fspath(source)
    if text == "-":
        return Source(0, "standard input", "pipe", **rest)
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if _SCHEME.match(text):
        return Source(text, _without_password(text), "network", **rest)
    return _local(text, rest, growing)


def _local(text: str, rest: dict[str, Any], growing: bool) -> Source:
    path = Path(text).expanduser()
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if rest["format"] in ("lavfi", "dshow", "avfoundation"):
            return Source(text, text, "device", **rest)
        why = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or str(error)
        raise VideoError(f"cannot open {text!r}: {why}") from error
    if stat.S_ISDIR(mode):
        raise VideoError(f"{text!r} is a directory, not a video; name one file in it")
    if stat.S_ISCHR(mode):
        rest["format"] = rest["format"] or ("v4l2" if sys.platform.startswith("linux") else None)
        return Source(str(path), text, "device", path=str(path), **rest)
    if stat.S_ISFIFO(mode):
        return Source(str(path), text, "pipe", path=str(path), **rest)
    if path.stat().st_size == 0 and not growing:
        raise VideoError(f"{text!r} is empty (0 bytes)")
    # with its protocol named, a file called "a:b.mp4" is not taken for an address
    return Source(f"file:{path}", text, "file", path=str(path), **rest)


def _seekable(file: Any) -> bool:
    seekable = getattr(file, "seekable", None)
    return bool(seekable()) if callable(seekable) else hasattr(file, "seek") and hasattr(file, "tell")


def _without_password(address: str) -> str:
    return re.sub(r"://[^/@]*@", "://", address)
