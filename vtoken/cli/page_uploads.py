"""Files that visitors upload to a page, and which of them an event may name.

gradio copies whatever an event names as a file, from this machine or from an address, wherever it stands. Its
own route for uploads keeps the parts of one that broke off, opens a file for each part, and remembers every
name of an upload that is asked about.
"""

from __future__ import annotations

import re
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._json import parse

MOST_FILES = 256  # that lie in the folder
UNNAMED = 60.0  # seconds for which a file lies there without an event that names it
ODD = re.compile(r"[^\w. -]")  # characters that a file's name loses
LONGEST = 60  # characters of a name
NO_FORM = "An upload is a form with one file."


class Uploads:
    """The uploaded files of a page, each in a folder of its own whose name nobody can guess.

    Args:
        folder: where they lie.
        most: bytes of all of them. One address has at most half of the bytes and of the files.
        known: gets the path of each, for gradio to delete it in the end.
    """

    def __init__(self, folder: Path, most: int, known: set[str] | None = None) -> None:
        self.folder, self.most, self.known = folder, most, set() if known is None else known
        self.coming: Counter[str] = Counter()  # bytes on their way, by address
        self._owners: dict[str, str] = {}  # path -> address
        self._unnamed: dict[str, float] = {}  # path -> time of its coming
        self._lock = threading.Lock()

    def room(self, address: str) -> int:
        """Bytes that an address may still upload."""
        self.tidy()
        held, files = Counter[str](), Counter(self._owners.values())
        for path, owner in self._owners.items():
            with suppress(OSError):
                held[owner] += Path(path).stat().st_size
        if files.total() >= MOST_FILES or files[address] >= MOST_FILES // 2:
            return 0
        own = self.most // 2 - held[address] - self.coming[address]
        return max(0, min(own, self.most - held.total() - self.coming.total()))

    @contextmanager
    def under_way(self, address: str, length: int) -> Iterator[None]:
        """Count an upload within the block."""
        self.coming[address] += length
        try:
            yield
        finally:
            self.coming[address] -= length
            if not self.coming[address]:
                del self.coming[address]

    async def take(self, scope: dict[str, Any], receive: Callable[..., Any]) -> str:
        """The path of an uploaded file, which lies there now.

        Raises:
            ValueError: for what is no form with one file, or breaks off.
        """
        from starlette.concurrency import run_in_threadpool
        from starlette.formparsers import MultiPartException
        from starlette.requests import ClientDisconnect, Request

        request = Request(scope, receive)
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ValueError(NO_FORM)
        try:
            async with request.form(max_files=1, max_fields=0) as form:
                file: Any = form.get("files")
                if not hasattr(file, "filename"):
                    raise ValueError(NO_FORM)
                path = await run_in_threadpool(self._keep, file.file, file.filename or "")
        except (MultiPartException, ClientDisconnect, KeyError, ValueError):
            raise ValueError(NO_FORM) from None
        except OSError as error:
            raise ValueError(f"The file cannot be kept: {error.strerror}.") from None
        self._owners[path], self._unnamed[path] = (scope.get("client") or ("",))[0], time.monotonic()
        self.known.add(path)
        return path

    def _keep(self, file: Any, name: str) -> str:
        place = self.folder / secrets.token_hex(16)
        path = place / (ODD.sub("", Path(name).name)[-LONGEST:].strip(". ") or "file")
        with self._lock:  # else it is tidied away while it is empty
            place.mkdir(parents=True)
            out = path.open("xb")
        try:
            with out:
                shutil.copyfileobj(file, out)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return str(path)

    def may_name(self, found: list[dict[str, Any]]) -> bool:
        """Whether all the mappings name uploaded files by their paths; notes that these are named."""
        paths = [each.get("path") for each in found]
        if not all(isinstance(path, str) and path in self._owners and _is_plain(path) for path in paths):
            return False
        for path in paths:
            self._unnamed.pop(str(path), None)
        if paths:
            self.tidy()
        return True

    def tidy(self) -> None:
        """Delete files that no event has named for a while, and the empty ones that gradio makes."""
        now = time.monotonic()
        for path in [p for p, since in self._unnamed.items() if now - since > UNNAMED]:
            Path(path).unlink(missing_ok=True)
        for path in [path for path in self._owners if not _is_plain(path)]:
            del self._owners[path]
            self._unnamed.pop(path, None)
            self.known.discard(path)
        with self._lock, suppress(OSError):
            for entry in [*self.folder.iterdir()]:
                with suppress(OSError):  # it is not empty, or gone
                    if entry.is_dir():
                        entry.rmdir()
                    elif not entry.is_symlink() and not entry.stat().st_size:
                        entry.unlink()


def _is_plain(path: str) -> bool:
    """Whether there is a regular file, and no link."""
    return Path(path).is_file() and not Path(path).is_symlink()


def files_named(body: bytes) -> list[dict[str, Any]] | None:
    """The mappings in an event that gradio takes for files, wherever they stand.

    None if it is no JSON, or such as parsers read differently: a key is there twice, or it is not in UTF-8.
    """
    try:
        return list(_files(parse(body)))
    except ValueError:
        return None


def _files(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if {"path", "url"} & set(value):
            yield value
        value = [*value.values()]
    if isinstance(value, list):
        for each in value:
            yield from _files(each)
