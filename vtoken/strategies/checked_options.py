"""Objects whose options are checked when they are made and at every later assignment."""

from __future__ import annotations

import copy
from abc import ABCMeta
from typing import Any, ClassVar

from ..checks import fit_field, has_field
from .budgets import check_budget


class _Marking(ABCMeta):
    """Marks an object once it is made: an assignment from then on is checked as an argument is."""

    def __call__(cls, /, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.__dict__["_made"] = True
        return made


class CheckedOptions(metaclass=_Marking):
    """Base of dataclasses whose fields take what their annotations say; `budget` is a budget."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        """Override to check ranges, after `super().__post_init__()`; types have been checked."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not has_field(type(self), name):
            super().__setattr__(name, value)
            return
        value = (
            check_budget(value)
            if name == "budget" and value is not None
            else fit_field(type(self), name, value)
        )
        if not self.__dict__.get("_made"):
            super().__setattr__(name, value)
            return
        trial = copy.copy(self)
        trial.__dict__["_made"] = False
        setattr(trial, name, value)
        if self.__dataclass_fields__[name].init:
            trial.__post_init__()
        super().__setattr__(name, getattr(trial, name))
        self.__dict__.update(trial.__dict__, _made=True)
