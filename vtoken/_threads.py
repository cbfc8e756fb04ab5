"""Thread-local state that is empty in copies and pickles of a model."""

from __future__ import annotations

import threading
from typing import Any


class PerThread(threading.local):
    """A `threading.local` whose deep copies and pickles start empty."""

    def __deepcopy__(self, memo: Any) -> PerThread:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()
