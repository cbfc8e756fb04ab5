"""Weights of strategies that are trained: made for a model, written to a file, read again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapters.base import Adapter
from .llm_shape import LanguageModelShape
from .strategies.trained import ModelShape, TrainedStrategy

ORIGIN = "vtoken"  # the entry of the file's metadata that tells the model


def shape_of(adapter: Adapter) -> ModelShape:
    """The facts about a model on which the shapes of such weights depend."""
    tower = next(iter(adapter.towers.values()), None)
    llm = LanguageModelShape.of(adapter.decoder.config)
    return ModelShape(None, 0, llm) if tower is None else ModelShape(tower.info, tower.width, llm)


def make_module(adapter: Adapter, strategy: TrainedStrategy) -> nn.Module:
    """The module of a strategy for a model, on the device of its vision tower and in the model's dtype.

    Raises:
        ValueError: if the weights that the strategy came with do not fit the model.
    """
    devices = (_device(tower.module) for tower in adapter.towers.values())
    device = next((d for d in devices if d is not None), "cpu")
    shape, source = shape_of(adapter), strategy.source
    with torch.inference_mode(False):  # weights made inside it could not be trained
        if source is None:
            with torch.device(device):
                return strategy.build(shape).to(adapter.model.dtype)
        module = _hollow(strategy, shape)
        _check(module, source, strategy.info.name, adapter)
        module.load_state_dict(_read(source, strategy.info.name), assign=True)
        return module.to(device=device, dtype=adapter.model.dtype)


def _hollow(strategy: TrainedStrategy, shape: ModelShape) -> nn.Module:
    """The module without memory for its weights: shapes in a file are compared before any is allocated."""
    with torch.device("meta"):
        return strategy.build(shape)


def _device(module: nn.Module) -> torch.device | str | int | None:
    """The device on which a module runs, also where accelerate keeps its weights elsewhere; None for none."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            hook = getattr(part, "_hf_hook", None)
            return getattr(hook, "execution_device", None) if parameter.is_meta else parameter.device
    return None


def _read(source: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file. Raises ValueError for those that are no finite floating-point numbers."""
    state = load_file(source)
    for key, value in state.items():
        if not value.is_floating_point() or not bool(value.float().isfinite().all()):
            kind = "values that are not finite" if value.is_floating_point() else f"{value.dtype} numbers"
            raise ValueError(f"The {name} weights in {str(source)!r} cannot be used: {key} has {kind}.")
    return state


def load_into(adapter: Adapter, strategy: TrainedStrategy, source: Path) -> None:
    """Load a file's weights into the module of a strategy that is on a model.

    Raises:
        ValueError: if they do not fit.
    """
    _check(strategy.module, source, strategy.info.name, adapter)
    strategy.module.load_state_dict(_read(source, strategy.info.name))


def _check(module: nn.Module, source: Path, name: str, adapter: Adapter) -> None:
    """Raise ValueError, in one sentence, unless a file holds exactly the weights of a module."""
    if not source.exists():
        raise ValueError(
            f"The folder {str(source.parent)!r} has no {source.name} with the weights of {name}: write it"
            " with vtoken.save_strategy, or name the strategy and its options to begin with new weights."
        )
    try:
        with safe_open(source, "pt") as file:
            have = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            origin = (file.metadata() or {}).get(ORIGIN, "")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(source)!r} cannot be read as a safetensors file: {error}.") from None
    theirs, own, shape = _made_for(origin), str(adapter.config.model_type), shape_of(adapter)
    if theirs not in ("", own):
        raise ValueError(
            f"The {name} weights in {str(source)!r} were trained for {theirs}, and this model is {own}: train"
            " weights for it, or take a model of that type."
        )
    want = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    wrong = [key for key in sorted(want.keys() | have.keys()) if want.get(key) != have.get(key)]
    if wrong:
        key, found = wrong[0], have.get(wrong[0], "none")
        raise ValueError(
            f"The {name} weights in {str(source)!r} do not fit this model, whose vision"
            f" tower has {shape.tower_width} channels and whose LLM has {shape.width}: {len(wrong)} differ,"
            f" the first is {key} of shape {found} where {want.get(key, 'none')} is needed."
        )


def _made_for(origin: str) -> str:
    """The model type in a file's metadata; empty if there is none."""
    try:
        return str(json.loads(origin)["model_type"])[:40]
    except (ValueError, TypeError, KeyError):
        return ""


def write_weights(adapter: Adapter, strategy: TrainedStrategy, path: Path) -> None:
    """Write the weights of a strategy that is on a model to a safetensors file.

    Raises:
        ValueError: for weights that could not be loaded again, as other libraries have replaced layers.
    """
    want = _hollow(strategy, shape_of(adapter)).state_dict().keys()
    if odd := sorted(want ^ strategy.module.state_dict().keys()):
        raise ValueError(
            f"The layers of {strategy.info.name} were replaced after it was patched, as the weight {odd[0]}"
            " tells: merge adapters of peft into them first, or make them with"
            " exclude_modules='.*vtoken_strategy.*'."
        )
    told = {"model_type": adapter.config.model_type, "strategy": strategy.info.name}
    told |= {k: v for k, v in asdict(shape_of(adapter)).items() if k != "tower"}
    state = {key: value.detach().contiguous() for key, value in strategy.module.state_dict().items()}
    save_file(state, path, {"format": "pt", ORIGIN: json.dumps(told)})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # safetensors makes files that nobody else can read
