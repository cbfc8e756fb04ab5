"""Entry points of other packages, imported once, when a name is looked up."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

Adopt = Callable[[EntryPoint, Any], None]


class Plugins:
    """The entry points of one group.

    Args:
        group: such as "vtoken.strategies".
        adopt: called with each entry point and what it loads; raises an Exception for what is of no use.
    """

    def __init__(self, group: str, adopt: Adopt) -> None:
        self.group, self.adopt = group, adopt
        self.faults: dict[str, str] = {}  # by name of an entry point, why it cannot be used
        self.loaded, self.lock = False, threading.RLock()  # a plug-in may look a name up while it is imported

    def load(self) -> None:
        """Import them all, once. A package that fails is left out, with one warning that names it."""
        with self.lock:
            if self.loaded:
                return
            self.loaded = True
            faults: dict[str, list[str]] = {}
            for entry in sorted(entry_points(group=self.group), key=lambda e: (e.name, e.value)):
                try:
                    self.adopt(entry, entry.load())
                except (Exception, SystemExit) as error:
                    package = "unknown" if entry.dist is None else entry.dist.name
                    what = " ".join(f"{type(error).__name__}: {error}".split())
                    faults.setdefault(package, []).append(f"{entry.name} ({entry.value}): {what}")
                    self.faults[entry.name] = (
                        f"The package {package} adds {entry.name!r}, which cannot be used: {what}"
                    )
        for package, found in faults.items():
            warnings.warn(
                f"The package {package} adds to {self.group} what cannot be used, which is left out:"
                f" {'; '.join(found)}.",
                stacklevel=3,
            )


def same_package(cls: type, entry: EntryPoint) -> bool:
    """Whether a class comes from the package that an entry point names, from whichever of its modules."""
    return cls.__module__.partition(".")[0] == entry.module.partition(".")[0]
