"""Admission of calls: whether a call is one patch's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .active import LOCK, Patch, Patches
from .call_frames import generate_frame


class Gate:
    """Tells the hooks of one patch whether a call belongs to it.

    Args:
        patches: all patches of the model.
        patch: the patch of the hooks.
    """

    def __init__(self, patches: Patches, patch: Patch) -> None:
        self.patches, self.patch = patches, patch

    def serves(self) -> bool:
        """Whether a call made here and now uses this patch."""
        if torch.compiler.is_compiling() and self.patches.simple is self.patch:
            return True
        return self._serves()

    @torch.compiler.disable
    def _serves(self) -> bool:
        with LOCK:
            return self.patches.current() is self.patch and not self._older()

    def _older(self) -> bool:
        """Whether this is part of a `generate` that began without a patch."""
        older, thread = self.patches.older, threading.get_ident()
        if thread not in older:
            return False
        frame = generate_frame(self.patch.adapter.model)
        if frame is None or older[thread] not in (None, id(frame)):
            del older[thread]
            return False
        older[thread] = id(frame)
        return all(s.kind == "disabled" for s in self.patches._here())

    def forward_begins(self) -> bool:
        """Whether a forward of the base model uses this patch; its hooks stay until `forward_ended`."""
        if torch.compiler.is_compiling():
            return self.serves()
        with LOCK:
            served = self._serves()
            if served:
                threading.current_thread()  # makes a thread of foreign code known to `living_threads`
                self.patches.forwards[threading.get_ident()] = self.patch
            elif self.patches.leaving:
                self.patches._settle()
            return served

    def forward_ended(self) -> None:
        """Note the end of the forward."""
        if not torch.compiler.is_compiling():
            with LOCK:
                self.patches.forwards.pop(threading.get_ident(), None)
                if self.patches.leaving:
                    self.patches._settle()

    @contextmanager
    def call(self) -> Iterator[bool]:
        """Use this patch to the end of a call; yields False and does nothing for a call of another patch."""
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

    def check(self) -> None:
        """Raise RuntimeError if the patch no longer fits the options of its strategy."""
        self.patch.check()

    def disabled(self) -> bool:
        """Whether calls of this thread or task read all visual tokens now."""
        return self.patches.disabled()
