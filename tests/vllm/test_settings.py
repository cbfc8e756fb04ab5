"""Settings of an engine under which answers stay right, or which are refused in a sentence."""

from __future__ import annotations

import pytest

import vtoken

from .engines import asked, distance, engine
from .environment import vllm  # noqa: F401
from .prompts import answer, cases, request
from .random_models import load

pytestmark = pytest.mark.vllm


def patched(name, strategy, budget, options, shapes=2, videos=0):
    """Cases with what transformers says under a strategy."""
    model, processor = load(name)
    vtoken.patch(model, strategy, budget=budget, **options)
    return [answer(model, processor, case) for case in cases(processor, shapes, videos)]


@pytest.fixture
def other_process(monkeypatch):
    """Engines in a process of their own, as those of a server."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def check(expected, outs):
    assert len(expected) == len(outs)
    for case, out in zip(expected, outs):
        assert len(out.prompt_token_ids) == case.length
        assert out.outputs[0].text.strip() == case.text and distance(case, out) < 1e-4


def test_text_alone():
    """Without images there is no vision tower whose attention could be read."""
    expected = [c for c in patched("llava", "hired", 0.2, {}) if c.kind == "text"]
    with engine("llava", "hired", 0.2, {}, images=0, clips=0) as llm:
        check(expected, asked(llm, [request(c) for c in expected]))


@pytest.mark.parametrize("cache", [{"mm_processor_cache_gb": 0}, {"mm_processor_cache_type": "shm"}])
def test_caches_of_the_processor(cache, other_process):
    expected = patched("qwen2_5_vl", "divprune", 0.3, {}, 2, 1)
    with engine("qwen2_5_vl", "divprune", 0.3, {}, settings=cache) as llm:
        for _ in range(2):
            check(expected, asked(llm, [request(c) for c in expected]))


def test_speculation_by_ngrams(other_process):
    expected = patched("llava", "hired", 0.2, {})
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine("llava", "hired", 0.2, {}, settings={"speculative_config": guess}) as llm:
        check(expected, asked(llm, [request(c) for c in expected]))


def test_a_refused_prompt_leaves_no_trace(other_process):
    """A picture that was in a refused prompt only is sent again."""
    from vtoken.tiny import scenes

    (case, *_) = patched("llava", "hired", 0.1, {}, 1)
    pictures = [scenes.make_scene(900 + i, "test").image for i in range(16)] + case.images
    prompt = {
        "prompt": case.prompt.replace("<image>", "<image>" * 17),
        "multi_modal_data": {"image": pictures},
    }
    with engine("llava", "hired", 0.1, {}, step=256, images=17) as llm:
        with pytest.raises(ValueError, match=r"end at 2\d\d\d, the LLM knows 2048"):
            asked(llm, [prompt])
        check([case], asked(llm, [request(case)]))


def test_budget_in_the_wrong_place():
    (case, *_) = patched("llava", "hired", 0.2, {}, 1)
    wrong = request(case) | {"mm_processor_kwargs": {"images_kwargs": {"vtoken_budget": 0.5}}}
    with engine("llava", "hired", 0.2, {}) as llm:
        with pytest.raises(ValueError, match=r"vtoken_budget is one number .* found in images_kwargs"):
            asked(llm, [wrong])
        check([case], asked(llm, [request(case)]))
