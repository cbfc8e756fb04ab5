"""Small trained vision-language models that ship with the package, their data and their training recipes.

::

    from vtoken import tiny
    model, processor = tiny.load("llava")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("llava",)


def path(name: str = "llava") -> Path:
    """Folder of a shipped model, for any ``from_pretrained``.

    Raises:
        ValueError: no model of that name ships with the package.
    """
    if name not in NAMES:
        raise ValueError(f"unknown tiny model {name!r}: the shipped models are {', '.join(NAMES)}")
    return Path(__file__).parent / name


def load(name: str = "llava", **kwargs: Any) -> tuple[Any, Any]:
    """A shipped model in eval mode and its processor, without network access.

    Args:
        name: one of ``NAMES``.
        **kwargs: go to ``AutoModelForImageTextToText.from_pretrained`` (``dtype``, ``attn_implementation``, ...).

    Returns:
        ``(model, processor)``, float32 unless ``dtype`` says otherwise.
    """
    folder = path(name)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, **kwargs)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
