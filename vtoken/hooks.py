"""Hooks on modules and replaced methods: they follow a rebuilt model, and their removal leaves no trace."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

_LOCK = threading.RLock()


@dataclass
class Hook:
    """A forward hook of a module.

    Attributes:
        module: the module at present.
        function: the hook.
        before: whether it runs before the module's forward, else after it.
        kwargs: whether the function receives the forward's keyword arguments.
        first: whether it runs before the hooks that the module has already.
    """

    module: nn.Module
    function: Callable[..., Any]
    before: bool = False
    kwargs: bool = False
    first: bool = False

    def register(self) -> Any:
        """Put the hook on its module; returns the handle of torch."""
        module = self.module
        method = module.register_forward_pre_hook if self.before else module.register_forward_hook
        return method(self.function, with_kwargs=self.kwargs, prepend=self.first)


class Hooks:
    """Hooks that move to the present modules after parts of the model were replaced.

    Adapters and quantised layers replace modules, for instance.

    Args:
        find: lists the wanted hooks, on the present modules.
    """

    def __init__(self, find: Callable[[], list[Hook]]) -> None:
        self.find = find
        self.modules: list[nn.Module] = []
        self.handles: list[Any] = []
        self.refresh()

    def refresh(self) -> bool:
        """Look the modules up again; True if hooks were moved."""
        hooks = self.find()
        if self._there(hooks):
            return False
        with _LOCK:
            if self._there(hooks):
                return False
            self.remove()
            self.modules = [hook.module for hook in hooks]
            self.handles = [hook.register() for hook in hooks]
        return True

    def _there(self, hooks: list[Hook]) -> bool:
        same = len(hooks) == len(self.modules)
        return same and all(hook.module is module for hook, module in zip(hooks, self.modules, strict=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.modules, self.handles = [], []


def rebuilt(what: str) -> RuntimeError:
    """The error for a model with replaced parts that cannot be read; `what` says what was found."""
    return RuntimeError(
        f"{what}: the model was rebuilt after it was patched; call vtoken.unpatch(model) and"
        " vtoken.patch(model, ...) again."
    )


class Method:
    """An instance attribute in place of a method: `instead(original, ...)`.

    It has `__wrapped__`, so that `generate()` finds the method's signature; a deep copy of the model gets one
    bound to itself.
    """

    def __init__(
        self, instead: Callable[..., Any], original: Callable[..., Any], before: Any, owner: Any
    ) -> None:
        functools.update_wrapper(self, original)
        self.instead: Callable[..., Any] | None = instead
        self.original, self.before, self.owner = original, before, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], type(self.owner)):
            if args[0] is not self.owner:  # `copy` copies no function that is bound
                raise RuntimeError(
                    "A patched model was copied after its forward had been bound once more, as accelerate's"
                    " unwrap_model does: call vtoken.unpatch(model) before you copy it."
                )
            args = args[1:]  # bound once more, as accelerate's unwrap_model(keep_fp32_wrapper=False) does
        if self.instead is None:
            return self.original(*args, **kwargs)
        return self.instead(self.original, *args, **kwargs)

    def __getstate__(self) -> tuple[Any, ...]:
        original: Any = self.original
        if not isinstance(original, MethodType):
            return self.instead, original, None, self.before, self.owner
        # by its name only: an owner that is being unpickled might answer with this object
        return self.instead, original.__name__, original.__self__, self.before, self.owner

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        instead, original, bound, before, owner = state
        if isinstance(original, str):
            original = MethodType(getattr(type(bound), original), bound)
        self.__init__(instead, original, before, owner)  # type: ignore[misc]

    def remove(self, owner: Any, name: str) -> None:
        """Restore the previous attribute, also if others have wrapped this one since."""
        top = owner.__dict__.get(name)
        if top is self:
            if self.before is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = self.before
            return
        self.instead = None  # for anyone who still holds it
        while isinstance(top, Method):
            if top.original is self:
                top.original = top.__dict__["__wrapped__"] = self.original
                top.before = self.before
            top = top.original


class Wrapped:
    """The methods replaced on instances; they can be restored in any order."""

    def __init__(self) -> None:
        self.places: list[tuple[Any, str, Method]] = []

    def wrap(self, owner: Any, name: str, instead: Callable[..., Any], original: Any = None) -> None:
        """Replace the method `name` of `owner` by `instead(original, ...)`."""
        original = getattr(owner, name) if original is None else original
        method = Method(instead, original, owner.__dict__.get(name), owner)
        owner.__dict__[name] = method
        self.places.append((owner, name, method))

    def remove(self) -> None:
        for owner, name, method in self.places:
            method.remove(owner, name)
        self.places = []
