"""Times of the stages of one call, and the bytes it holds.

A call is split without gaps: every moment belongs to the vision tower, to vtoken (all its hooks: scoring,
selection, gathering), to the LLM, or to the rest. On a GPU the bounds are CUDA events on the
model's stream.
"""

from __future__ import annotations

import functools
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..mechanism.transformers_names import cache_in
from ..recorder import Stopwatch
from .shapes import Workload

PHASES = ("tower", "choose", "llm", "rest")
Times = dict[str, float]


def now(work: Workload) -> Any:
    """A point in time on the workload's clock."""
    return time.process_time() if work.clock == "cpu" else Stopwatch.mark(work.model.device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread in a `with` block; other processes hardly change its processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Phases:
    """The current phase of a call; `seconds()` adds up the time of each."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.marks: list[tuple[str, Any]] = [("rest", now(work))]

    def switch(self, phase: str) -> str:
        """Begin a phase and return the one before."""
        before = self.marks[-1][0]
        self.marks.append((phase, now(self.work)))
        return before

    def during(self, phase: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.switch(phase)
            try:
                return fn(*args, **kwargs)
            finally:
                self.switch(before)

        return call

    def seconds(self) -> Times:
        """Per phase, and "total"; ends the measurement and waits for the device."""
        self.switch("end")
        watch = Stopwatch()
        for (phase, start), (_, end) in zip(self.marks, self.marks[1:]):
            watch.add(phase, start, end)
        watch.add("total", self.marks[0][1], self.marks[-1][1])
        return dict.fromkeys(PHASES, 0.0) | watch.seconds()


def _ours(hook: Any) -> bool:
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith("vtoken.")


@contextmanager
def phases(work: Workload) -> Iterator[Phases]:
    """Time the phases of a model's calls inside the block, patched or not; the model is left as it was."""
    watch, undo = Phases(work), []
    base, decoder = work.model.base_model, work.model.get_decoder()
    for module in work.model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in [*hooks.items()]:
                if _ours(hook):
                    hooks[key] = watch.during("choose", hook)
                    undo.append(functools.partial(hooks.__setitem__, key, hook))
    for name in ("get_image_features", "get_video_features"):
        if hasattr(base, name):
            was, current = base.__dict__.get(name), getattr(base, name)
            timed = watch.during("tower", current if was is None else was.original)
            if was is not None:  # vtoken's own part around the model's method
                part = functools.partial(watch.during("choose", was.instead), timed)
                timed = functools.update_wrapper(part, current)
            base.__dict__[name] = timed
            undo.append(functools.partial(_restore, base, name, was))
    before: list[str] = []
    first = decoder.register_forward_pre_hook(lambda *_: before.append(watch.switch("llm")), prepend=True)
    last = decoder.register_forward_hook(lambda *_: watch.switch(before.pop()) and None)
    undo += [first.remove, last.remove]
    try:
        yield watch
    finally:
        for step in undo:
            step()


def _restore(owner: Any, name: str, was: Any) -> None:
    if was is None:
        owner.__dict__.pop(name, None)
    else:
        owner.__dict__[name] = was


def prefill(work: Workload) -> Times:
    """Seconds of reading the prompt, per phase."""
    with torch.inference_mode(), phases(work) as watch:
        work.model(**work.inputs, use_cache=True, logits_to_keep=1)
        return watch.seconds()


def floor(work: Workload, tokens: int) -> float:
    """Seconds of the LLM alone for a prompt of so many tokens: a lower bound for every reduction."""
    decoder = work.model.get_decoder()
    embeds = torch.randn(1, tokens, decoder.config.hidden_size, device=work.model.device).to(work.model.dtype)
    with torch.inference_mode():
        watch = Phases(work)
        decoder(inputs_embeds=embeds, use_cache=True)
        return watch.seconds()["total"]


def decode(work: Workload, steps: int, call: Callable[[], Any] | None = None) -> Times:
    """Seconds of `generate`, or of `call`: "total", and "decode" for the steps after the first token."""
    ends: list[Any] = []
    hook = work.model.get_decoder().register_forward_hook
    handle = hook(lambda *_: ends.append(now(work)) if not ends else None)
    try:
        watch, start = Stopwatch(), now(work)
        config = dict(do_sample=False, min_new_tokens=steps + 1, max_new_tokens=steps + 1)
        with torch.inference_mode():
            work.model.generate(**work.inputs, **config) if call is None else call()
        end = now(work)
    finally:
        handle.remove()
    watch.add("decode", ends[0], end)
    watch.add("total", start, end)
    return watch.seconds()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors made inside the block; `peak` is the maximum.

    For devices without statistics of their allocator. What an operator takes for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.numel():
                storage, address = leaf.untyped_storage(), _storage_of(leaf)
                if address not in known and address not in self.seen:
                    self.seen.add(address)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, address, storage.nbytes())
        return out

    def _freed(self, address: int, nbytes: int) -> None:
        self.seen.discard(address)
        self.live -= nbytes


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(work: Workload) -> tuple[int, int]:
    """Peak bytes of reading the prompt beyond the model and its inputs, and the bytes of its KV cache."""
    device = work.model.device
    arguments = work.inputs | {"use_cache": True, "logits_to_keep": 1}
    if device.type != "cuda":
        with torch.inference_mode(), LiveBytes() as bytes_:
            out = work.model(**arguments)
        return bytes_.peak, cache_bytes(cache_in(out))
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        out = work.model(**arguments)
    return torch.cuda.max_memory_allocated(device) - before, cache_bytes(cache_in(out))


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a dynamic cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return {"median": middle, "q1": low, "q3": high}
