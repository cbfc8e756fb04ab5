"""Check for the packages of an extra."""

from __future__ import annotations

import importlib


def require(*packages: str, extra: str) -> None:
    """Raise ImportError with the extra's name, before any work, if a package cannot be imported."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            said = " ".join(str(error).split())
            found = "is not installed" if missing else f"does not load ({said})"
            raise ImportError(
                f"This needs {name}, which {found}: pip install 'vtoken[{extra}]'.", name=name
            ) from None
