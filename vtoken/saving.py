"""Save the strategy of a patched model, with its weights if it has some."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .config import WEIGHTS_FILE, VTokenConfig
from .patching import patch_of
from .strategies.trained import trained_part
from .trained_weights import load_into, write_weights


def save_strategy(model: Any, save_directory: str | os.PathLike[str], **kwargs: Any) -> str | None:
    """Write the strategy of a patched model: `vtoken_config.json`, and its weights if it has some.

    `vtoken.patch(model, VTokenConfig.from_pretrained(folder))` puts them on an unpatched model again.

    Args:
        model: a patched model.
        save_directory: the folder, made if needed; its other files stay as they are.
        kwargs: those of `VTokenConfig.save_pretrained`, such as `push_to_hub=True` and `repo_id`.

    Returns:
        The URL of the commit if it was pushed, None otherwise.

    Raises:
        ValueError: if the model is not patched, or its strategy cannot be written as a config.
    """
    patch = patch_of(model)
    if patch is None:
        raise ValueError("This model is not patched: call vtoken.patch(model, ...) first.")
    config, folder = VTokenConfig.of(patch.strategy), Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    part = trained_part(patch.strategy)
    if part is not None:
        write_weights(patch.adapter, part, folder / WEIGHTS_FILE)
    return config.save_pretrained(folder, **kwargs)


def load_weights(model: Any, folder: str | os.PathLike[str]) -> None:
    """Load the weights that `save_strategy` wrote into the strategy that is on a model.

    Raises:
        ValueError: if the model has no strategy with weights, or those of the folder do not fit it.
    """
    patch = patch_of(model)
    part = None if patch is None else trained_part(patch.strategy)
    if patch is None or part is None:
        raise ValueError("This model has no strategy with weights: call vtoken.patch(model, ...) first.")
    load_into(patch.adapter, part, Path(folder) / WEIGHTS_FILE)
