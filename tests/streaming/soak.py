"""An endless stream: memory and work per frame must not grow.

python -m tests.streaming.soak --frames 1000000
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

import vtoken
from tests.models.common import IMG, LM, VID, randomize
from tests.streaming.common import processor_of

SCENE = 50  # frames
WINDOW = 16  # frames over which work is counted, a multiple of every interval


@dataclass
class Mark:
    """A look at the stream behind `frames` frames; work and time are those of the `WINDOW` frames before.

    Attributes:
        resident: the process's resident bytes.
        tensors, tensor_bytes: torch tensors alive, and their storages.
        flops: of the window.
        milliseconds: median time per frame.
        memory: bytes that the session says it holds.
        answer_tokens: length of a question's prompt.
    """

    frames: int
    resident: int
    tensors: int
    tensor_bytes: int
    flops: int
    milliseconds: float
    memory: int
    answer_tokens: int


def cheap_model() -> Any:
    """A LLaVA-OneVision whose tower costs next to nothing."""
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = tf.SiglipVisionConfig(**small, image_size=28, patch_size=7, vision_use_head=False)
    text = tf.Qwen2Config(**LM | small | dict(num_key_value_heads=1))
    tokens = dict(image_token_id=IMG, video_token_id=VID)
    config = tf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **tokens,
    )
    return randomize(tf.LlavaOnevisionForConditionalGeneration._from_config(config))


def picture(index: int) -> np.ndarray:
    """The frame with this number: scenes of `SCENE` frames, each with a patch that moves."""
    rng = np.random.default_rng(index // SCENE)
    image = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    at = index % SCENE % 21
    image[at : at + 7, at : at + 7] = index % 256
    return image


# a bound on the bytes that a short stream fills
OPTIONS = {
    "recent": dict(max_bytes=20_000),
    "rekv": dict(max_bytes=30_000, memory_options=dict(n_local=16, topk=4)),
}


def resident_bytes() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def tensors_alive() -> tuple[int, int]:
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return len(alive), sum(stores.values())


def run(
    frames: int, marks: int = 10, memory: str = "recent", strategy: str = "stc", **options: Any
) -> Iterator[Mark]:
    """Feed a stream, look at it `marks` times at equal distances, and ask a question each time."""
    times: list[float] = []
    every = frames // marks
    with vtoken.StreamSession(
        cheap_model(),
        processor_of("llava_onevision"),
        strategy,
        budget=0.5,
        memory=memory,
        fps=2.0,
        **options,
    ) as session:
        for index in range(every * marks):
            frame = picture(index)
            if (index + WINDOW) % every == 0:
                counter = FlopCounterMode(display=False)
                counter.__enter__()
            start = time.perf_counter()
            session.push(frame)
            times = [*times[1 - WINDOW :], time.perf_counter() - start]
            if (index + 1) % every == 0:
                counter.__exit__(None, None, None)
                tokens = session.ask("what is here ?", max_new_tokens=2).tokens
                alive = tensors_alive()
                flops, middle = counter.get_total_flops(), 1000 * statistics.median(times)
                held = session.stats["bytes"]
                yield Mark(index + 1, resident_bytes(), *alive, flops, middle, held, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--memory", choices=("recent", "rekv"), default="recent")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for mark in run(arguments.frames, memory=arguments.memory, **OPTIONS[arguments.memory]):
        print(json.dumps(asdict(mark)), flush=True)


if __name__ == "__main__":
    main()
