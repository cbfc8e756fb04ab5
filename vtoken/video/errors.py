"""`VideoError`: every error of a video source, in one sentence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from .. import checks

F = TypeVar("F", bound=Callable[..., Any])


class VideoError(ValueError):
    """A source that cannot be opened or read, or a frame that it does not have."""


class Unreadable(VideoError):
    """A source that no second try will open: its protocol, format or codec is unknown."""


def checked(function: F) -> F:
    """Decorator: `vtoken.checks.checked` with a VideoError."""
    return checks.checked(function, VideoError)


def load(module: str, package: str, brought_by: str = "'vtoken[video]'") -> Any:
    """Import an optional package, of the `video` extra unless pip takes it by another name.

    Raises:
        VideoError: it is missing, or is there and does not load.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a binary package that does not load raises OSError, RuntimeError and others
        cause = "is not installed" if isinstance(error, ImportError) else f"does not load ({brief(error)})"
        raise VideoError(f"{package} {cause}; pip install {brought_by}") from error


def brief(error: BaseException) -> str:
    """First line of an error's text, or its type where it has none."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]
