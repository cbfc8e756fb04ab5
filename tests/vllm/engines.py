"""Engines of the tiny models inside this process, and their answers."""

from __future__ import annotations

import gc
from contextlib import contextmanager

from vtoken.integrations.vllm import overrides

from .environment import vllm
from .prompts import NEW, request
from .random_models import path

VIDEO = ("qwen2_5_vl", "llava_onevision", "internvl", "qwen2_vl", "qwen3_vl")


def reads_clips(name, strategy="uniform"):
    """Whether a model is served with clips; frames of Qwen3-VL have to know how many of their tokens stay."""
    return name in VIDEO and (name, strategy) != ("qwen3_vl", "divprune")


@contextmanager
def engine(name, *wanted, step=24, images=2, clips=None, length=1024, settings=None, **options):
    """An engine of a tiny model, whose blocks and steps are so small that chunks and prefix hits end inside images.

    Args:
        wanted: strategy, budget and options of the overrides, none for a model that is served as it is.
        settings: further arguments of `vllm.LLM`; they replace those that are written here.
        options: in place of overrides where nothing is wanted.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    clips = 2 * reads_clips(name, *wanted[:1]) if clips is None else clips
    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": length,
        "max_num_seqs": 8,
        "block_size": 32,
        "max_num_batched_tokens": step,
        "limit_mm_per_prompt": {"image": images, "video": clips},
    }
    options = overrides(str(path(name)), *wanted[:2], **wanted[2]) if wanted else options
    made = vllm.LLM(str(path(name)), **given | options | (settings or {}))
    try:
        yield made
    finally:
        made.__dict__.clear()  # a failed test's traceback holds it
        gc.collect()
        cleanup_dist_env_and_memory()


def asked(llm, prompts, tokens=NEW, **options):
    settings = vllm.SamplingParams(temperature=0, max_tokens=tokens, logprobs=20, **options)
    return llm.generate(prompts, settings, use_tqdm=False)


def answers(some, name, *wanted, **options):
    """Of an engine that is gone afterwards: a reference that outlives it would take the next one's groups down."""
    with engine(name, *wanted, **options) as llm:
        return asked(llm, [request(c) for c in some])


def distance(case, out):
    """The largest difference of log-probabilities of the first token, among those that are not negligible."""
    first = out.outputs[0].logprobs[0]
    return max(abs(p.logprob - float(case.logprobs[t])) for t, p in first.items() if case.logprobs[t] > -12)
