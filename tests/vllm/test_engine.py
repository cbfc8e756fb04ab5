"""Engines under the conditions of service: a KV cache that is too small, a compiled LLM, two engines."""

from __future__ import annotations

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import vtoken

from .engines import asked, distance, engine, reads_clips
from .environment import vllm  # noqa: F401
from .prompts import answer, cases, request
from .random_models import load
from .test_server import completion, question_of, serving

pytestmark = pytest.mark.vllm

LONG = 100  # tokens of an answer
HIRED = [("llava", "hired", 0.2, {}), ("qwen2_5_vl", "hired", 0.3, {"score": "received"})]


def expectations(name, strategy, budget, options, tokens):
    """Cases of every kind with their answers, of `tokens` tokens whatever they are."""
    model, processor = load(name)
    vtoken.patch(model, strategy, budget=budget, **options)
    model.generation_config.eos_token_id = None
    some = cases(processor, 3, 2 if reads_clips(name, strategy) else 0)
    return [answer(model, processor, c, max_new_tokens=tokens) for c in some]


def deviation(case, out):
    """The largest difference of log-probabilities of an answer's tokens."""
    said = out.outputs[0]
    pairs = zip(case.sure, said.token_ids, said.logprobs, strict=True)
    return max(abs(sure - step[token].logprob) for sure, token, step in pairs)


def assert_equal(expected, outs):
    assert len(expected) >= 8
    assert [list(out.outputs[0].token_ids) for out in outs] == [case.tokens for case in expected]
    assert [out.outputs[0].text.strip() for out in outs] == [case.text for case in expected]
    assert [len(out.prompt_token_ids) for out in outs] == [case.length for case in expected]
    assert max(map(distance, expected, outs)) < 1e-4
    assert max(map(deviation, expected, outs)) < 1e-4


@pytest.mark.parametrize("prefixes", [True, False])
@pytest.mark.parametrize("name,strategy,budget", [("llava", "hired", 0.2), ("qwen2_5_vl", "divprune", 0.3)])
def test_preemption(name, strategy, budget, prefixes):
    """Requests that lose their part of the KV cache while they answer compute their prompts anew."""
    expected = expectations(name, strategy, budget, {}, LONG)
    # a request grows to 6 blocks of the cache's 13
    small = {"num_gpu_blocks_override": 14, "enable_prefix_caching": prefixes, "disable_log_stats": False}
    with engine(name, strategy, budget, {}, length=384, step=64, settings=small) as llm:
        outs = asked(llm, [request(c) for c in expected], LONG, ignore_eos=True)
        count = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert count > 8
    preempted = {case.kind for case, out in zip(expected, outs) if out.metrics.num_preemptions}
    assert preempted >= {case.kind for case in expected if case.images or case.clips}
    assert_equal(expected, outs)


@pytest.mark.parametrize("name,strategy,budget,options", HIRED)
def test_compiled(name, strategy, budget, options, tmp_path, monkeypatch):
    """vLLM's default, in which torch.compile makes one graph of the LLM for steps of every length."""
    from vllm.compilation.counter import compilation_counter

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # vLLM sets it, monkeypatch puts it back
    before, called = compilation_counter.clone(), []
    expected = expectations(name, strategy, budget, options, 20)
    with engine(name, strategy, budget, options, settings={"enforce_eager": False}) as llm:
        assert compilation_counter.num_models_seen == before.num_models_seen + 1
        assert compilation_counter.num_aot_compiles == before.num_aot_compiles + 1
        layer = llm.apply_model(lambda model: model.language_model.model.layers[0])[0]
        layer.register_forward_pre_hook(lambda *_: called.append(1))
        outs = asked(llm, [request(c) for c in expected], 20, ignore_eos=True)
    assert not called  # a graph leaves out the Python of a layer
    assert_equal(expected, outs)


def test_data_parallel(tmp_path):
    """Requests to one address are divided between two engines."""
    model, processor = load("llava")
    vtoken.patch(model, "hired", budget=0.2)
    some = [answer(model, processor, c) for c in cases(processor, videos=0) if c.kind == "image"]
    engines = [None, None, 0, 1] * 10  # the server divides by load, so the smaller part has no lower bound
    assert len(some) == len(engines)
    with serving(tmp_path / "log", "--data-parallel-size", "2") as address:

        def ask(case, engine):
            return completion(address, case, question_of(case), engine, logprobs=True)

        with ThreadPoolExecutor(8) as pool:
            outs = list(pool.map(ask, some, engines))
        with urllib.request.urlopen(address + "/metrics", timeout=60) as page:
            told = page.read().decode()
    for case, out in zip(some, outs, strict=True):
        said = out["choices"][0]
        assert said["message"]["content"].strip() == case.text
        assert out["usage"]["prompt_tokens"] == case.length
        assert abs(said["logprobs"]["content"][0]["logprob"] - case.sure[0]) < 1e-4
    served = re.findall(
        r'^vllm:request_success_total{engine="(.)",finished_reason="stop".* (.+)$', told, re.M
    )
    counts = {int(engine): float(count) for engine, count in served}
    assert set(counts) == {0, 1} and min(counts.values()) >= 10 and sum(counts.values()) == len(some)
