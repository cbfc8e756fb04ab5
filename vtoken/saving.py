"""Save the strategy of a patched model, with its weights if it has some."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .config import CONFIG_FILE, WEIGHTS_FILE, VTokenConfig
from .patching import patch_of
from .strategies.trained import TrainedStrategy, trained_part
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
        RuntimeError: if an option was assigned after the weights were made for another.
    """
    patch = patch_of(model)
    if patch is None:
        raise ValueError("This model is not patched: call vtoken.patch(model, ...) first.")
    part = trained_part(patch.strategy)
    if part is not None:
        patch.check()
    config, folder = VTokenConfig.of(patch.strategy), Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    if part is not None:
        config.weights = folder / WEIGHTS_FILE
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
    if (Path(folder) / CONFIG_FILE).exists():
        configs = VTokenConfig.from_pretrained(folder), VTokenConfig.of(part)
        made, now = (_made_for(config, part) for config in configs)
        if changed := sorted(k for k in made.keys() | now.keys() if made.get(k) != now.get(k)):
            told = [f"{d[changed[0]]!r}" if changed[0] in d else "its default" for d in (made, now)]
            raise ValueError(
                f"The {part.info.name} weights in {str(folder)!r} were made for other options, the first is"
                f" {changed[0]}: {told[0]} there and {told[1]} on the model."
            )
    load_into(patch.adapter, part, Path(folder) / WEIGHTS_FILE)


def _made_for(config: VTokenConfig, part: TrainedStrategy) -> dict[str, Any]:
    """The options in a config on which the weights of a strategy depend."""
    options = config.options if isinstance(config.strategy, str) else config.options.get(part.info.name, {})
    return {k: v for k, v in options.items() if k not in part.free}
