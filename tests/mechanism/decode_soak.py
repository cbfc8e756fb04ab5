"""An answer without end: memory and work per token must not grow.

python -m tests.mechanism.decode_soak --tokens 100000
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import vtoken
from tests.models import FAMILIES
from tests.oracle import CACHE, clone, pick
from tests.streaming.soak import resident_bytes, tensors_alive

TIMED = 200  # tokens whose times are looked at


@dataclass
class Mark:
    """A look at the answer after `tokens`.

    Attributes:
        resident: the process's resident bytes.
        tensors, tensor_bytes: torch tensors alive, and their storages.
        cache: bytes of the KV cache by the report.
        milliseconds: median time per token, of the last `TIMED`.
        largest: logit, so that a value that is no number shows.
        position: largest position id that the LLM was given.
    """

    tokens: int
    resident: int
    tensors: int
    tensor_bytes: int
    cache: int
    milliseconds: float
    largest: float
    position: int


def run(tokens: int, marks: int = 10, name: str = "qwen2_5_vl", **options: Any) -> Iterator[Mark]:
    """Go on with a prompt's answer, token by token, and look at it `marks` times at equal distances."""
    family, every, times = FAMILIES[name], tokens // marks, [0.0]
    model = family.build()
    inputs = family.batch("one")
    with vtoken.applied(model, "sink_window", **options), torch.no_grad():
        out = model(**clone(inputs), use_cache=True)
        cache = out[CACHE]
        for index in range(every * marks):
            start = time.perf_counter()
            said = pick(out.logits[:, -1:])
            out = model(input_ids=said, use_cache=True, **{CACHE: cache})
            times = [*times[1 - TIMED :], time.perf_counter() - start]
            if (index + 1) % every == 0:
                alive, largest = tensors_alive(), float(out.logits.abs().max())
                held, place = vtoken.report(model).kv_bytes, int(cache.layers[0].ledger.places.max())
                median = 1000 * statistics.median(times)
                yield Mark(index + 1, resident_bytes(), *alive, held, median, largest, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--name", default="qwen2_5_vl")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for mark in run(given.tokens, name=given.name, recent=given.recent):
        print(json.dumps(asdict(mark)), flush=True)


if __name__ == "__main__":
    main()
