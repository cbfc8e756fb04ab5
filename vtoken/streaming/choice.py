"""Make the memory and the patch of a session from its arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..active import LOCK, patches_of
from ..adapters.base import Adapter
from ..model_patching import Patch
from ..patching import patch, patch_of, unpatch
from ..requested import make_strategy
from ..strategies import Strategy
from .layers import Layers
from .memory import RecentMemory
from .prompts import Prompts
from .rekv import ReKVMemory

RECENT_BYTES, REKV_BYTES = 256 * 2**20, 4 * 2**30
N_LOCAL = 15000  # tokens of ReKV's window, as published
SPARE = 256  # positions reserved for the question and the answer
OPTIONS = {
    "recent": ("sinks", "recent", "history_tokens", "max_steps"),
    "rekv": ("n_local", "topk", "chunk", "metric", "disk"),
}


def make_memory(
    name: str,
    adapter: Adapter,
    prompts: Prompts,
    renumber: bool,
    max_bytes: int | None,
    max_tokens: int | None,
    options: dict[str, Any],
    newest: int | None = None,
) -> RecentMemory | ReKVMemory:
    """Make a memory by its name; bounds of None get defaults.

    Raises ValueError for an unknown name or a memory that cannot serve the model.

    Args:
        renumber: whether prompts count only the kept tokens, not all tokens of the unpruned model.
        newest: number of the latest frames that are kept alone, None for no such bound.
    """
    if name not in OPTIONS:
        raise ValueError(f"Unknown memory {name!r}: use {' or '.join(OPTIONS)}.")
    unknown = ", ".join(sorted(set(options) - set(OPTIONS[name])))
    if unknown:
        raise ValueError(f"memory={name!r} has no option {unknown}: it has {', '.join(OPTIONS[name])}.")
    if newest is not None:
        options = options | _window(name, newest, prompts.frames.unit, options)
    positions = int(getattr(adapter.decoder.config, "max_position_embeddings", 4096))
    if name == "rekv":
        if max_tokens is not None:
            raise ValueError(
                "memory='rekv' counts blocks: pass memory_options={'topk': ...} instead of max_tokens."
            )
        options = {"n_local": min(N_LOCAL, positions)} | options
        return ReKVMemory(Layers(adapter), prompts, REKV_BYTES if max_bytes is None else max_bytes, **options)
    room = positions - min(SPARE, positions // 2)
    counts_rows = not renumber and not hasattr(adapter.base, "get_rope_index")
    return RecentMemory(
        RECENT_BYTES if max_bytes is None else max_bytes,
        room if max_tokens is None else max_tokens,
        max_rows=room if counts_rows else None,
        **options,
    )


def _window(name: str, newest: int, unit: int, options: dict[str, Any]) -> dict[str, int]:
    """Options of the memory that keeps the newest frames alone, `unit` of them in a step."""
    if name != "recent":
        raise ValueError(f"frames={newest} keeps the newest frames alone, which memory={name!r} does not do.")
    if both := sorted({"sinks", "recent", "max_steps", "history_tokens"} & set(options)):
        raise ValueError(f"frames={newest} leaves no choice of {', '.join(both)}: leave out one of them.")
    if newest < unit or newest % unit:
        raise ValueError(
            f"frames must be a multiple of {unit}, which the tower joins into one step, found {newest}."
        )
    return {"sinks": 0, "recent": newest // unit, "max_steps": newest // unit}


class SharedPatch:
    """The patch of a model while sessions use it: an existing one, or one made by the first session.

    Args:
        adapter: the model's adapter.
        strategy, budget, options: as for `vtoken.patch`; None leaves the model as it is.

    Attributes:
        patch: None if the model has none.

    Raises:
        TypeError, ValueError: as for `vtoken.patch`; for another strategy than the model's, or one that
            cannot serve a stream.
    """

    def __init__(
        self, adapter: Adapter, strategy: Any, budget: float | int | None, options: dict[str, Any]
    ) -> None:
        self.adapter = adapter
        with LOCK:  # two threads may open sessions at the same time
            self._find(strategy, budget, options)

    def _find(self, strategy: Any, budget: float | int | None, options: dict[str, Any]) -> None:
        adapter = self.adapter
        self.patch: Patch | None = patch_of(adapter.model)
        if strategy is None:
            if budget is not None or options:
                raise ValueError(
                    f"{', '.join(['budget'] * (budget is not None) + list(options))} needs a strategy."
                )
            self._check(self.patch)
        else:
            made = make_strategy(strategy, budget, options)
            if self.patch is not None and not _alike(self.patch.strategy, made):
                raise ValueError(
                    f"This model is patched with {self.patch.strategy.describe()} already, which its other"
                    " sessions may use: use the same strategy, or another model."
                )
            self._check(self.patch)
            if self.patch is None:
                patch(adapter.model, made)
                self.patch = patch_of(adapter.model)
                try:
                    self._check(self.patch)
                except ValueError:
                    unpatch(adapter.model)
                    raise
                self.patch.sessions = 0
        if self.patch is not None and self.patch.sessions is not None:
            self.patch.sessions += 1

    @property
    def renumbers(self) -> bool:
        return self.patch is not None and self.patch.strategy.positions == "renumber"

    def release(self) -> None:
        """Take off a patch that sessions put on the model, if this is the last session."""
        if self.patch is None or self.patch.sessions is None:
            return
        with LOCK:
            self.patch.sessions -= 1
            patches = patches_of(self.adapter.model)
            if not self.patch.sessions and patches is not None:
                patches.take_off(self.patch)

    def is_there(self) -> bool:
        """Whether the model still has the patch, even if a `vtoken.applied` block suspends it."""
        patches = patches_of(self.adapter.model)
        if patches is None:
            return self.patch is None
        return patches.current() is None if self.patch is None else patches.has(self.patch)

    def used(self) -> AbstractContextManager[Any]:
        """A block whose calls use this patch, regardless of open `vtoken.applied` blocks."""
        patches = patches_of(self.adapter.model)
        if self.patch is None or patches is None:
            return nullcontext()
        return patches.scope("call", self.patch)

    def _check(self, current: Patch | None) -> None:
        if current is None or current.strategy.is_identity:
            return
        strategy = current.strategy
        if current.design.wants_text:
            raise ValueError(
                f"{strategy.info.name} reads the question when it chooses, and a stream is pruned before"
                " there is one: use a strategy that does not read the text, such as farcover with"
                " relevance=0.0."
            )
        if strategy.acts_on_cache:
            raise ValueError(
                f"{strategy.info.name} acts on the KV cache of a conversation, and a StreamSession begins one"
                ' for every question: use memory="rekv", which keeps the keys and values of the stream, and a'
                " strategy of the stages encoder and projector."
            )
        if strategy.acts_inside or strategy.acts_in_attention:
            raise ValueError(
                f"{strategy.info.name} drops inside the LLM, which a StreamSession does not do: use a"
                " strategy of the stages encoder and projector."
            )


def _alike(one: Strategy, other: Strategy) -> bool:
    """Whether two strategies are configured alike; the text tells 1 token from the share 1.0."""
    return one == other and one.describe() == other.describe()
