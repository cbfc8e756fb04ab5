"""Small trained vision-language models that ship with the package, and their data.

::

    from vtoken import tiny
    model, processor = tiny.load("llava")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def names() -> list[str]:
    """The models whose weights ship with the package, sorted; each has a recipe of that name."""
    return sorted(folder.parent.name for folder in HERE.glob("*/config.json"))


def path(name: str = "llava") -> Path:
    """Folder of a shipped model, for any ``from_pretrained``.

    Raises:
        ValueError: no model of that name ships with the package.
    """
    if name not in names():
        raise ValueError(f"unknown tiny model {name!r}: the shipped models are {', '.join(names())}")
    return HERE / name


def load(name: str = "llava", **kwargs: Any) -> tuple[Any, Any]:
    """A shipped model in eval mode and its processor, without network access.

    Args:
        name: one of `names()`.
        **kwargs: go to ``AutoModelForImageTextToText.from_pretrained`` (``dtype``, ``attn_implementation``,
            ...).

    Returns:
        ``(model, processor)``, float32 unless ``dtype`` says otherwise.
    """
    folder = path(name)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    kwargs = {"dtype": "float32", **kwargs}
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, **kwargs)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
