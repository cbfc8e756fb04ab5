"""Which patch of a model a call uses, and when the hooks of a patch that was taken off may go.

Several patches can have hooks on one model at the same time: the one of `vtoken.patch`, one for every open
`vtoken.applied` block of every thread, and those that were taken off while another thread still generates with them.
A call uses the same patch from its beginning to its end.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .streams import unwrapped

if TYPE_CHECKING:
    from .patching import Patch

PATCH = "_vtoken_patch"  # the attribute of a model that holds its `Patches`
LOCK = threading.RLock()  # for everything below; held for microseconds
FORWARD = nn.Module._call_impl.__code__


@dataclass(eq=False)
class Scope:
    """An open `applied` or `disabled` block, or a running call.

    Attributes:
        patches: those of the model.
        patch: what calls inside use; None in a `disabled` block, and in an `applied` block after `unpatch`.
        kind: "applied", "disabled" or "call".
        disabled: whether calls inside read all visual tokens.
        outer: the `applied` blocks in which it was opened.
        thread: in which it was opened.
        open: False once it has been left, in whatever thread.
    """

    patches: Patches
    patch: Patch | None
    kind: str
    disabled: bool = False
    outer: tuple[Scope, ...] = ()
    thread: threading.Thread = field(default_factory=threading.current_thread)
    open: bool = True


# of this thread or asynchronous task, innermost last; a scope that is left early is taken out of the middle
_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("vtoken_scopes", default=())


class Patches:
    """All patches of one model.

    Args:
        base: the model's `base_model`, which every call passes through.

    Attributes:
        own: the patch of `vtoken.patch`.
        scopes: the open blocks of all threads, in the order in which they were opened.
        leaving: patches that were taken off and may still be used by a running call.
        running: by patch the number of its calls of `generate` and `get_*_features`.
        forwards: by thread the patch of the forward that it is, or was, inside; an interrupted one tells no hook of its end.
        older: by thread the frame of a `generate` that began before its model had a patch, as an id.
        simple: the only patch, if nothing else is going on.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self.owners: list[Any] = []
        self.own: Patch | None = None
        self.scopes: list[Scope] = []
        self.leaving: list[Patch] = []
        self.running: dict[Patch, int] = {}
        self.forwards: dict[int, Patch] = {}
        self.held = 0  # by threads that are about to add something
        self.older: dict[int, int] = {}
        self.simple: Patch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a deep copy or a pickle, which has the patch in use as its own and no open block."""
        with LOCK:
            try:
                own = self.current()
            except RuntimeError:
                own = self.own
            others = [p for p in (self.own, *(b.patch for b in self.blocks), *self.leaving) if p not in (None, own)]
            return {
                "base": self.base,
                "owners": self.owners,
                "own": own,
                "scopes": [],
                "leaving": others,
                "running": {},
                "forwards": {},
                "held": 0,
                "older": {},
                "simple": None if others else own,
            }

    @property
    def adapter(self) -> Any:
        """Of the patch in use."""
        current = self.current()
        return None if current is None else current.adapter

    @property
    def blocks(self) -> list[Scope]:
        """The open `applied` blocks."""
        return [s for s in self.scopes if s.kind == "applied"]

    # -- which one ----------------------------------------------------------------------------------------------
    def _here(self) -> list[Scope]:
        """The open scopes of this thread or task, innermost first."""
        return [s for s in reversed(_scopes.get()) if s.patches is self and s.open]

    def current(self) -> Patch | None:
        """The patch that a call uses if it begins here and now.

        The innermost block or running call of this thread decides; without one the open block of other threads, and without
        any of these the patch of `vtoken.patch`. Raises RuntimeError if several other threads have a block open.
        """
        for scope in self._here():
            if scope.kind != "disabled":
                return scope.patch
        blocks = self.blocks
        innermost = [b for b in blocks if not any(b in other.outer for other in blocks)]
        if len(innermost) > 1:
            raise RuntimeError(
                f"{len(innermost)} other threads are inside `with vtoken.applied(...)` of this model, and this thread is not: "
                "open a vtoken.applied block in the thread that calls the model."
            )
        return innermost[0].patch if innermost else self.own

    def disabled(self) -> bool:
        """Whether a call that begins here and now reads all visual tokens: the innermost block decides."""
        return next((scope.disabled for scope in self._here()), False)

    # -- blocks -------------------------------------------------------------------------------------------------
    @contextmanager
    def scope(self, kind: str, patch: Patch | None, disabled: bool = False) -> Iterator[Scope]:
        """An open block or a running call of this thread or task; it may be left in any order and in any thread."""
        scope = Scope(self, patch, kind, disabled)
        with LOCK:
            scope.outer = tuple(s for s in self._here() if s.kind == "applied")
            _scopes.set((*_scopes.get(), scope))
            if kind != "call":
                self.scopes.append(scope)
                self._began(patch)
        try:
            yield scope
        finally:
            with LOCK:
                scope.open = False
                _scopes.set(tuple(s for s in _scopes.get() if s.open))
                if kind != "call":
                    self.scopes.remove(scope)
                    self._retire(scope.patch)

    def _began(self, patch: Patch | None) -> None:
        """A patch is used from now on, but not by a `generate` that is running without one."""
        code = None if patch is None else _generate_code(type(patch.adapter.model))
        if code is not None and patch is not None:
            for thread, frame in sys._current_frames().items():
                found = _frame_of(frame, code, patch.adapter.model)
                if found is not None:
                    self.older[thread] = id(found)
        self._settle()

    def put(self, patch: Patch) -> None:
        """Use a patch until `take_off`, inside an `applied` block until its end. LOCK is held."""
        block = next((s for s in self._here() if s.kind == "applied"), None)
        if block is None:
            self.own = patch
        else:
            block.patch = patch
        self._began(patch)

    def take_off(self, patch: Patch | None = None) -> None:
        """Take off one patch, or the one in use here; the calls that use it finish with it.

        Raises RuntimeError if another thread is inside an `applied` block, and this one is not.
        """
        with LOCK:
            mine = next((s for s in self._here() if s.kind == "applied"), None)
            if patch is not None:
                every: list[Any] = [self, *self.blocks]
                holders = [x for x in every if _held(x) is patch]
            elif mine is not None:
                holders = [mine]
            elif any(b.thread.is_alive() for b in self.blocks):
                raise RuntimeError(
                    "Another thread is inside `with vtoken.applied(...)` of this model: leave that block first, or take the "
                    "patch off in that thread."
                )
            else:
                holders = [self, *self.blocks]
            gone = {_held(x) for x in holders} - {None}
            for holder in holders:
                setattr(holder, "own" if holder is self else "patch", None)
            for each in gone:
                self._retire(each)
            self._settle()

    def _retire(self, patch: Patch | None) -> None:
        if patch is not None:
            self.leaving.append(patch)
        self._settle()

    def _settle(self) -> None:
        """Remove the hooks of patches that no call uses any more; LOCK is held."""
        if self.leaving:
            used = {p for thread, p in self.forwards.items() if _in_forward(thread, self.base)} | set(self.running)
            free = [p for p in self.leaving if p not in used]
            self.leaving = [p for p in self.leaving if p in used]
            for patch in free:
                patch.remove()
        threads = sys._current_frames() if self.older else {}
        self.older = {thread: frame for thread, frame in self.older.items() if thread in threads}
        alone = not self.blocks and not self.leaving and not self.older
        self.simple = self.own if alone else None
        if self.own is None and not (self.scopes or self.leaving or self.held):  # leave no trace
            for owner in self.owners:
                if owner.__dict__.get(PATCH) is self:
                    del owner.__dict__[PATCH]
            self.owners = []


def _held(holder: Patches | Scope) -> Patch | None:
    return holder.own if isinstance(holder, Patches) else holder.patch


class Gate:
    """What the hooks of one patch ask: whether a call is theirs.

    Args:
        patches: those of the model.
        patch: whose hooks they are.
    """

    def __init__(self, patches: Patches, patch: Patch) -> None:
        self.patches, self.patch = patches, patch

    def serves(self) -> bool:
        """Whether what is called here and now uses this patch."""
        if torch.compiler.is_compiling() and self.patches.simple is self.patch:
            return True
        return self._serves()

    @torch.compiler.disable
    def _serves(self) -> bool:
        with LOCK:
            return self.patches.current() is self.patch and not self._older()

    def _older(self) -> bool:
        """Whether this is part of a `generate` that began without a patch."""
        patches, thread = self.patches, threading.get_ident()
        if thread not in patches.older:
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if id(frame) == patches.older[thread]:
                return all(s.kind == "disabled" for s in patches._here())
            frame = frame.f_back
        del patches.older[thread]
        patches._settle()
        return False

    def forward_begins(self) -> bool:
        """Whether a forward of the base model uses this patch; its hooks stay until `forward_ended`."""
        if torch.compiler.is_compiling():
            return self.serves()
        with LOCK:
            served = self._serves()
            if served:
                self.patches.forwards[threading.get_ident()] = self.patch
            return served

    def forward_ended(self) -> None:
        """The forward is at its end."""
        if not torch.compiler.is_compiling():
            with LOCK:
                self.patches.forwards.pop(threading.get_ident(), None)
                if self.patches.leaving:
                    self.patches._settle()

    @contextmanager
    def call(self) -> Iterator[bool]:
        """A call that uses this patch to its end; yields False and does nothing if the call is another patch's."""
        patches, patch = self.patches, self.patch
        with LOCK:
            served = self._serves()
            if served:
                patches.running[patch] = patches.running.get(patch, 0) + 1
        if not served:
            yield False
            return
        try:
            with patches.scope("call", patch, patches.disabled()):
                yield True
        finally:
            with LOCK:
                patches.running[patch] -= 1
                if not patches.running[patch]:
                    del patches.running[patch]
                if patches.leaving:
                    patches._settle()

    def disabled(self) -> bool:
        """Whether calls of this thread or task read all visual tokens now."""
        return self.patches.disabled()


# -- frames of running calls ------------------------------------------------------------------------------------
def _generate_code(cls: Any) -> CodeType | None:
    function = getattr(cls, "generate", None)
    return None if function is None else getattr(inspect.unwrap(function), "__code__", None)


def _frame_of(frame: FrameType | None, code: CodeType, owner: Any) -> FrameType | None:
    """The innermost frame at or below `frame` of a method with this code of this object."""
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is owner:
            return frame
        frame = frame.f_back
    return None


def _in_forward(thread: int, base: Any) -> bool:
    """Whether a thread is inside a forward of this module, read from its stack."""
    return _frame_of(sys._current_frames().get(thread), FORWARD, base) is not None


# -- models -----------------------------------------------------------------------------------------------------
def patches_of(model: Any) -> Patches | None:
    """What is on a model, its base model or a wrapper of it; None for a model without patches and blocks."""
    model = unwrapped(model)
    for owner in (model, getattr(model, "base_model", None)):
        found = getattr(owner, "__dict__", {}).get(PATCH)
        if found is not None:
            return found
    return None


@contextmanager
def patches_for(model: Any) -> Iterator[Patches]:
    """As `patches_of`, made where there are none; they leave no trace if nothing is on the model at the end."""
    with LOCK:
        patches = patches_of(model) or Patches(model.base_model)
        patches.held += 1
        for owner in (model, model.base_model):
            if owner.__dict__.get(PATCH) is not patches:
                owner.__dict__[PATCH] = patches
                patches.owners.append(owner)
    try:
        yield patches
    finally:
        with LOCK:
            patches.held -= 1
            patches._settle()
