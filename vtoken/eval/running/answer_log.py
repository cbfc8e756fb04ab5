"""Answer log of a run: one JSON line per question, safe against a kill at any moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..._json import parse
from ...checks import fit, found
from .asker import Reply

Record = dict[str, Any]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other evaluations for a `with` block; makes it if needed; blocks may be nested.

    The operating system holds the lock for this process: when it dies, however it dies, the folder is free
    again.

    Raises:
        BlockingIOError: if another process or thread evaluates into this folder.
        OSError: if nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"Another evaluation writes into {str(folder)!r}: wait until it ends, or give another --output."
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_settings(folder: Path, settings: dict[str, Any], write: bool) -> None:
    """Store the settings of a run in its folder, or compare them with the stored ones.

    Raises:
        ValueError: if the folder holds a run under other settings, naming the first that differs.
    """
    path = folder / "settings.json"
    if not path.is_file():
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        return
    try:
        had = fit("settings", parse(path.read_bytes()), dict)
    except ValueError:
        raise ValueError(
            f"{str(path)!r} cannot be read: remove the folder, or give another --output."
        ) from None
    for key in sorted(had.keys() | settings.keys()):
        if had.get(key) != settings.get(key):
            there, here = found(had.get(key)), found(settings.get(key))
            raise ValueError(
                f"{str(folder)!r} holds answers under {key} = {there}, this run has {here}: use "
                "the same settings to continue it, or give another --output."
            )


def _answered(record: Record) -> bool:
    """Whether a record has an answer with its cost."""
    costs = [record.get(f.name) for f in fields(Reply) if f.name != "text"]
    return isinstance(record.get("answer"), str) and all(type(c) in (int, float) for c in costs)


def read(
    folder: Path, stem: str, names: Iterable[str], answered: Callable[[Record], bool] = _answered
) -> dict[str, Record]:
    """The records of one run by item, from the files of all processes; a half-written last line is dropped.

    An item counts once: of several answers to it the first is read, of an answer and an error the answer.
    `answered` says whether a record that is no error is complete.

    Raises:
        ValueError: naming the file, for a broken line or an item that the data set does not have.
    """
    known = set(names)
    records: dict[str, Record] = {}
    for path in sorted(folder.glob(f"{stem}.*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                record = fit("record", parse(line), dict)
                name = fit("item", record.get("item"), str)
            except ValueError:
                raise ValueError(
                    f"Line {number} of {str(path)!r} is no record: remove it to ask its question again."
                ) from None
            if name not in known:
                raise ValueError(
                    f"{str(path)!r} has an answer to {found(name)}, which the data set does not ask."
                )
            if not (isinstance(record["error"], str) if "error" in record else answered(record)):
                raise ValueError(
                    f"Line {number} of {str(path)!r} is no record: remove it to ask {name!r} again."
                )
            before = records.get(name)
            if before is None or ("error" in before and "error" not in record):
                records[name] = record
    return records


class Writer:
    """Appends records to one process's file of a run; each record is on disk when `append` returns."""

    def __init__(self, folder: Path, stem: str, process: int) -> None:
        path = folder / f"{stem}.{process}.jsonl"
        if path.is_file():
            whole = path.read_bytes()
            kept = whole.rfind(b"\n") + 1
            if kept < len(whole):  # a line that a kill cut short
                os.truncate(path, kept)
        self.file = path.open("ab")

    def append(self, records: Sequence[Record]) -> None:
        if records:
            self.file.write(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records))
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
