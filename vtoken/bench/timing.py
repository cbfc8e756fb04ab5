"""Times of the stages of one call of a workload, and the bytes it holds."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..mechanism.stored_cache import stored_bytes
from ..mechanism.transformers_names import cache_in
from ..recorder import Stopwatch
from ..stage_times import Phases, Times, now, phases
from .shapes import Workload


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread in a `with` block; other processes hardly change its processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prefill(work: Workload) -> Times:
    """Seconds of reading the prompt, per phase."""
    with torch.inference_mode(), phases(work.model, work.clock) as watch:
        work.model(**work.inputs, use_cache=True, logits_to_keep=1)
        return watch.seconds()


def floor(work: Workload, tokens: int) -> float:
    """Seconds of the LLM alone for a prompt of so many tokens: a lower bound for every reduction."""
    decoder = work.model.get_decoder()
    embeds = torch.randn(1, tokens, decoder.config.hidden_size, device=work.model.device).to(work.model.dtype)
    with torch.inference_mode():
        watch = Phases(work.model.device, work.clock)
        decoder(inputs_embeds=embeds, use_cache=True)
        return watch.seconds()["total"]


def decode(work: Workload, steps: int, call: Callable[[], Any] | None = None) -> Times:
    """Seconds of `generate`, or of `call`: "total", and "decode" for the steps after the first token."""
    ends: list[Any] = []
    device = work.model.device
    hook = work.model.get_decoder().register_forward_hook
    handle = hook(lambda *_: ends.append(now(device, work.clock)) if not ends else None)
    try:
        watch, start = Stopwatch(), now(device, work.clock)
        config = dict(do_sample=False, min_new_tokens=steps + 1, max_new_tokens=steps + 1)
        with torch.inference_mode():
            work.model.generate(**work.inputs, **config) if call is None else call()
        end = now(device, work.clock)
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
    """Bytes of the keys and values in a dynamic or packed cache."""
    held = stored_bytes(cache)
    return (
        held if held is not None else sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return {"median": middle, "q1": low, "q3": high}
