"""A strategy's module on a model: a submodule whose weights the model's own `state_dict` leaves out."""

from __future__ import annotations

from typing import Any

from torch import nn

ATTRIBUTE = "vtoken_strategy"


class AddedModule:
    """A module under the attribute `vtoken_strategy` of a model, whose other parameters are frozen.

    Args:
        model: the model.
        module: with parameters only.

    Raises:
        ValueError: if the model has such a module.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        if hasattr(model, ATTRIBUTE):
            raise ValueError(
                f"This {type(model).__name__} has the weights of another strategy, which a patch put there:"
                " call vtoken.unpatch(model) first."
            )
        self.model, self.module = model, module
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.trainable:
            parameter.requires_grad_(False)
        model.add_module(ATTRIBUTE, module)
        self.handles = [
            model.register_state_dict_post_hook(_left_out),
            model.register_load_state_dict_post_hook(_not_missed),
        ]

    def refresh(self) -> None:
        """Nothing on the model can have moved it."""

    def remove(self) -> None:
        """Take the module off, and let those parameters be trained that were before."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if getattr(self.model, ATTRIBUTE, None) is self.module:
            delattr(self.model, ATTRIBUTE)
        for parameter in self.trainable:
            parameter.requires_grad_(True)


def _left_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [n for n in state if n.startswith(f"{prefix}{ATTRIBUTE}.")]:
        del state[name]


def _not_missed(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if f"{ATTRIBUTE}." not in k]
