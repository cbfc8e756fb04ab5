"""Small trained vision-language models and encoders that ship with the package, and their data.

::

    from vtoken import tiny
    model, processor = tiny.load("llava")
    model, preprocess, tokenizer = tiny.load_encoder("clip")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def names() -> list[str]:
    """The models whose weights ship with the package, sorted; each has a recipe of that name."""
    return sorted(file.parent.name for file in HERE.glob("*/processor_config.json"))


def encoder_names() -> list[str]:
    """The plain encoders that ship with the package, sorted: ``clip`` (open_clip) and ``vit`` (timm)."""
    return sorted({file.parent.name for file in HERE.glob("*/config.json")} - set(names()))


def path(name: str = "llava") -> Path:
    """Folder of a shipped model, for any ``from_pretrained``.

    Raises:
        ValueError: no model of that name ships with the package.
    """
    if name not in names():
        raise ValueError(f"unknown tiny model {name!r}: the shipped models are {', '.join(names())}")
    return HERE / name


def trained(name: str) -> dict[str, Path]:
    """By name of a strategy with weights, the folder with those that ship for a model, for `VTokenConfig`."""
    return {file.parent.name: file.parent for file in sorted(path(name).glob("*/vtoken_config.json"))}


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


def load_encoder(name: str) -> tuple[Any, Any, Any]:
    """A shipped encoder in eval mode, float32, and how its inputs are made; without network access.

    Args:
        name: one of `encoder_names()`.

    Returns:
        ``(model, preprocess, tokenizer)``. ``preprocess`` makes ``(3, 96, 96)`` float32 of a PIL image;
        ``tokenizer`` makes ``(n, context)`` int64 of a list of texts, and is None for ``vit``.

    Raises:
        ValueError: no encoder of that name ships with the package.
        ImportError: the encoder's library is not installed.
    """
    if name not in encoder_names():
        raise ValueError(
            f"unknown tiny encoder {name!r}: the shipped encoders are {', '.join(encoder_names())}"
        )
    from . import encoders

    return encoders.load(HERE / name)
