"""Two processes that hold half of the heads each choose the tokens that one process chooses."""

from __future__ import annotations

import gc

import pytest

import vtoken
from vtoken import tiny
from vtoken.integrations.vllm import overrides

from .environment import vllm
from .prompts import NEW, answer, cases, request

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    "name,strategy,budget,options",
    [("llava", "visionzip", 0.3, {}), ("qwen2_5_vl", "hired", 0.3, {"score": "received"})],
)
def test_tensor_parallel(name, strategy, budget, options):
    model, processor = tiny.load(name)
    vtoken.patch(model, strategy, budget=budget, **options)
    expected = [answer(model, processor, c) for c in cases(processor, 3, 2 if "qwen" in name else 0)]
    llm = vllm.LLM(
        str(tiny.path(name)),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        tensor_parallel_size=2,
        limit_mm_per_prompt={"image": 2, **({"video": 2} if "qwen" in name else {})},
        **overrides(str(tiny.path(name)), strategy, budget, **options),
    )
    try:
        settings = vllm.SamplingParams(temperature=0, max_tokens=NEW, logprobs=20)
        outs = llm.generate([request(c) for c in expected], settings, use_tqdm=False)
        for case, out in zip(expected, outs):
            assert out.outputs[0].text.strip() == case.text
            assert len(out.prompt_token_ids) == case.length
            first = out.outputs[0].logprobs[0]
            # another set of kept tokens moves them by far more
            off = (
                abs(p.logprob - float(case.logprobs[t])) for t, p in first.items() if case.logprobs[t] > -12
            )
            assert max(off) < 1e-4
    finally:
        llm.__dict__.clear()
        gc.collect()
