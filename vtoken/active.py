"""Choice of the patch that a call uses, and removal of the hooks of patches that were taken off.

Several patches can have hooks on one model at the same time: the one of `vtoken.patch`, one for every open
`vtoken.applied` block of every thread, and those that were taken off while another thread still generates
with them. A call uses the same patch from its beginning to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from .call_frames import generate_frame, in_forward, living_threads
from .streams import unwrapped


class Patch(Protocol):
    """The part of `vtoken.model_patching.Patch` that this module uses."""

    adapter: Any

    def remove(self) -> None:
        """Take all hooks off the model."""

    def check(self) -> None:
        """Raise RuntimeError if the strategy was given options that need other hooks."""


PATCH = "_vtoken_patch"  # the attribute of a model that holds its `Patches`
LOCK = threading.RLock()  # for everything in this module; held for microseconds


@dataclass(eq=False)
class Scope:
    """An open `applied` or `disabled` block, or a running call.

    Attributes:
        patches: all patches of the model.
        patch: the patch for calls inside; None in a `disabled` block, or in an `applied` one after `unpatch`.
        kind: "applied", "disabled" or "call".
        disabled: whether calls inside read all visual tokens.
        outer: the `applied` blocks that were open around it.
        thread: the thread that opened it.
        open: False once it has been left, in any thread.
    """

    patches: Patches
    patch: Patch | None
    kind: str
    disabled: bool = False
    outer: tuple[Scope, ...] = ()
    thread: threading.Thread = field(default_factory=threading.current_thread)
    open: bool = True


# of this thread or asynchronous task, innermost last; leaving a scope early takes it out of the middle
_scopes: ContextVar[tuple[Scope, ...]] = ContextVar("vtoken_scopes", default=())


class Patches:
    """All patches of one model.

    Args:
        base: the model's `base_model`, which every call passes through.

    Attributes:
        own: the patch of `vtoken.patch`.
        scopes: the open blocks of all threads, in the order in which they were opened.
        leaving: patches that were taken off and may still be used by a running call.
        running: by patch, the number of its running calls of `generate` and `get_*_features`.
        forwards: by thread, the patch of its running forward; an interrupted forward stays here, since its
            end calls no hook.
        older: threads that may be inside a `generate` that began before there was a patch, with the frame of
            that call once it is known.
        simple: the only patch, if there is no block and no other patch.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self.owners: list[Any] = []
        self.own: Patch | None = None
        self.scopes: list[Scope] = []
        self.leaving: list[Patch] = []
        self.running: dict[Patch, int] = {}
        self.forwards: dict[int, Patch] = {}
        self.held = 0  # number of threads that are about to add something
        self.older: dict[int, int | None] = {}
        self.simple: Patch | None = None

    def __getstate__(self) -> dict[str, Any]:
        """State for a deep copy or a pickle: its own patch is the one in use, and no block is open."""
        with LOCK:
            try:
                own = self.current()
            except RuntimeError:
                own = self.own
            others = [
                p for p in (self.own, *(b.patch for b in self.blocks), *self.leaving) if p not in (None, own)
            ]
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
        """The adapter of the patch in use."""
        current = self.current()
        return None if current is None else current.adapter

    @property
    def blocks(self) -> list[Scope]:
        """The open `applied` blocks."""
        return [s for s in self.scopes if s.kind == "applied"]

    def has(self, patch: Patch) -> bool:
        """Whether a patch is on the model, even if an `applied` block suspends it."""
        holders: list[Any] = [self, *self.blocks]
        return any(_held(holder) is patch for holder in holders)

    # -- choice of the patch ---------------------------------------------------------------------------------
    def _here(self) -> list[Scope]:
        """The open scopes of this thread or task, innermost first."""
        return [s for s in reversed(_scopes.get()) if s.patches is self and s.open]

    def current(self, calls: bool = True) -> Patch | None:
        """The patch of a call that begins here and now; `calls=False` ignores running calls around it.

        The innermost block or running call of this thread decides; without one, the open block of another
        thread; without any of these, the patch of `vtoken.patch`.

        Raises:
            RuntimeError: if several other threads have a block open.
        """
        for scope in self._here():
            if scope.kind == "applied" or (calls and scope.kind == "call"):
                return scope.patch
        blocks = self.blocks
        innermost = [b for b in blocks if not any(b in other.outer for other in blocks)]
        if len(innermost) > 1 and not self.disabled():
            raise RuntimeError(
                f"{len(innermost)} other threads are inside `with vtoken.applied(...)` of this model, and"
                " this thread is not: open a vtoken.applied block in the thread that calls the model."
            )
        return innermost[0].patch if len(innermost) == 1 else self.own

    def disabled(self) -> bool:
        """Whether a call that begins here and now reads all visual tokens: the innermost block decides."""
        return next((scope.disabled for scope in self._here()), False)

    # -- blocks ----------------------------------------------------------------------------------------------
    @contextmanager
    def scope(self, kind: str, patch: Patch | None, disabled: bool = False) -> Iterator[Scope]:
        """Open a block or a running call in this thread or task; any order and any thread may leave it."""
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
        """Start the use of a patch, except in a `generate` that is running without one."""
        if patch is not None:
            own = threading.get_ident()
            self.older = dict.fromkeys(living_threads())
            frame = generate_frame(patch.adapter.model)
            self.older.pop(own, None)
            if frame is not None:
                self.older[own] = id(frame)
        self._settle()

    def put(self, patch: Patch) -> None:
        """Use a patch until `take_off`, or until the end of an `applied` block. LOCK is held."""
        block = next((s for s in self._here() if s.kind == "applied"), None)
        if block is None:
            self.own = patch
        else:
            block.patch = patch
        self._began(patch)

    def take_off(self, patch: Patch | None = None) -> None:
        """Take off one patch, or the one in use here; running calls finish with it.

        Raises:
            RuntimeError: if another thread is inside an `applied` block, and this one is not.
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
                    "Another thread is inside `with vtoken.applied(...)` of this model: leave that block"
                    " first, or take the patch off in that thread."
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
        """Remove the hooks of patches that no call uses any more. LOCK is held."""
        if self.leaving:
            alive = living_threads()
            inside = {thread: p for thread, p in self.forwards.items() if thread in alive}
            if not in_forward(self.base):  # an interrupted forward of this thread
                inside.pop(threading.get_ident(), None)
            self.forwards = inside
            used = {*inside.values(), *self.running}
            free = [p for p in self.leaving if p not in used]
            self.leaving = [p for p in self.leaving if p in used]
            for patch in free:
                patch.remove()
        alone = not self.blocks and not self.leaving
        self.simple = self.own if alone else None
        if self.own is None and not (self.scopes or self.leaving or self.held):  # leave no trace
            for owner in self.owners:
                if owner.__dict__.get(PATCH) is self:
                    del owner.__dict__[PATCH]
            self.owners = []


def _held(holder: Patches | Scope) -> Patch | None:
    return holder.own if isinstance(holder, Patches) else holder.patch


# -- models --------------------------------------------------------------------------------------------------
def patches_of(model: Any) -> Patches | None:
    """The patches of a model, its base model or a wrapper of it; None without patches and blocks."""
    model = unwrapped(model)
    for owner in (model, getattr(model, "base_model", None)):
        found = getattr(owner, "__dict__", {}).get(PATCH)
        if found is not None:
            return found
    return None


@contextmanager
def patches_for(model: Any, base: Any = None) -> Iterator[Patches]:
    """`patches_of`, made if there are none; they leave no trace if nothing is on the model at the end.

    Args:
        model: the model.
        base: the module that every call passes through; the `base_model` of a transformers model.
    """
    base = model.base_model if base is None else base
    with LOCK:
        patches = patches_of(model) or patches_of(base) or Patches(base)
        patches.held += 1
        for owner in (model, base):
            if owner.__dict__.get(PATCH) is not patches:
                owner.__dict__[PATCH] = patches
                patches.owners.append(owner)
    try:
        yield patches
    finally:
        with LOCK:
            patches.held -= 1
            patches._settle()
