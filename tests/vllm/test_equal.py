"""vLLM answers as transformers does: the same kept tokens, texts and probabilities, for every kind of prompt."""

from __future__ import annotations

import math
from collections import Counter

import pytest

import vtoken
from vtoken.integrations.vllm import MODELS, PREFIX
from vtoken.integrations.vllm.reduction import Reduction

from .engines import VIDEO, answers, asked, distance, engine, reads_clips
from .environment import vllm
from .prompts import answer, cases, request
from .random_models import load

pytestmark = pytest.mark.vllm

SERVED = [
    ("llava_next", "vtc_cls", 0.2, {}),
    ("llava_next", "divprune", 0.2, {}),
    ("llava_onevision", "stc_pruner", 0.3, {}),
    ("llava_onevision", "visionzip", 0.3, {}),
    ("llava", "hired", 0.2, {}),
    ("llava", "vtc_cls", 0.25, {"positions": "renumber"}),
    ("llava", "visionzip", 0.3, {}),
    ("llava", "divprune", 40, {}),
    ("qwen2_5_vl", "divprune", 0.3, {}),
    ("qwen2_5_vl", "vidcom2", 0.25, {"exact": True}),
    ("qwen2_5_vl", "visionzip", 0.3, {}),
    ("qwen2_5_vl", "hired", 0.3, {"score": "received"}),
    ("internvl", "hired", 0.2, {}),
    ("internvl", "vtc_cls", 0.25, {"positions": "renumber"}),
    ("internvl", "visionzip", 0.3, {}),
    ("internvl", "divprune", 10, {}),
    ("qwen2_vl", "divprune", 0.3, {}),
    ("qwen2_vl", "hired", 0.3, {"score": "received"}),
    ("qwen3_vl", "stc_pruner", 0.3, {"score": "dual_anchor"}),
    ("qwen3_vl", "divprune", 0.3, {}),
    ("qwen3_vl", "hired", 9, {"score": "received"}),
    ("qwen3_vl", "visionzip", 0.3, {}),
]


def spy(monkeypatch):
    """A list that gains the kept tokens of every image and video that is encoded."""
    kept, choose = [], Reduction.choose_one

    def noted(self, tokens, announced):
        features, keep = choose(self, tokens, announced)
        kept.append(tuple(range(len(tokens)) if keep is None else keep.tolist()))
        return features, keep

    monkeypatch.setattr(Reduction, "choose_one", noted)
    return kept


@pytest.mark.parametrize("name,strategy,budget,options", SERVED)
def test_as_transformers(name, strategy, budget, options, monkeypatch, sighted):
    model, processor = load(name)
    vtoken.patch(model, strategy, budget=budget, **options)
    some = cases(processor, videos=4 if reads_clips(name, strategy) else 0)
    if strategy == "vidcom2":  # of videos only
        some = [c for c in cases(processor, videos=20) if not c.images]
    expected = [answer(model, processor, c) for c in some]
    assert sum(case.kind in ("image", "clip", "two clips") for case in expected) >= 40
    kept = spy(monkeypatch)
    with engine(name, strategy, budget, options) as llm:
        kept.clear()
        for turn in range(2):  # the second hits the prefix cache
            outs = asked(llm, [request(case) for case in expected])
            wrong = Counter(c.kind for c, o in zip(expected, outs) if o.outputs[0].text.strip() != c.text)
            assert not wrong, (turn, wrong)
            assert max(map(distance, expected, outs)) < 1e-4
            lengths = [len(o.prompt_token_ids) for o in outs]
            assert turn == 0 or sum(o.num_cached_tokens or 0 for o in outs) > 0
    assert set(kept) == {tuple(k) for case in expected for k in case.kept}
    assert lengths == [case.length for case in expected]
    sighted(name, "vllm")


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_nothing_asked_or_everything_kept(name):
    model, processor = load(name)
    some = [answer(model, processor, c, False) for c in cases(processor, 4, 2 if name in VIDEO else 0)]
    architecture = PREFIX + MODELS[model.config.model_type]
    idle = answers(some, name, hf_overrides={"architectures": [architecture]})
    whole = answers(some, name, "uniform", 1.0, {})
    for case, a, b in zip(some, idle, whole):
        assert a.prompt_token_ids == b.prompt_token_ids
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert a.outputs[0].text.strip() == case.text and distance(case, a) < 1e-4


def test_frames_of_unknown_size_are_refused():
    _, processor = load("qwen3_vl")
    clip, picture = cases(processor, 1, 1)[-3], cases(processor, 1, 0)[0]
    assert clip.kind == "image and clip"
    with engine("qwen3_vl", "divprune", 0.2, {}, clips=2) as llm:
        with pytest.raises(ValueError, match=r"divprune cannot tell how many tokens .* part of this video"):
            asked(llm, [request(clip)])
        assert asked(llm, [request(picture)])[0].outputs[0].text
        whole = asked(llm, [request(clip, 1.0)])[0]
    assert len(whole.prompt_token_ids) == answer(*load("qwen3_vl"), clip, False).length


@pytest.mark.parametrize("name,strategy,tokens", [("llava", "hired", 144), ("internvl", "divprune", 80)])
def test_budget_of_a_request(name, strategy, tokens):
    _, processor = load(name)
    case = cases(processor, 1, 0)[0]
    with engine(name, strategy, 0.2, {}, step=256) as llm:
        lengths = [len(asked(llm, [request(case, b)])[0].prompt_token_ids) for b in (None, 0.1, 0.5, 10, 1.0)]
        assert lengths[0] < lengths[2] < lengths[4] and lengths[3] == lengths[4] - tokens + 10
        with pytest.raises(ValueError, match="must lie in"):
            asked(llm, [request(case, 1.5)])
        assert len(asked(llm, [request(case)])[0].prompt_token_ids) == lengths[0]


def test_positions_beyond_those_that_the_llm_knows():
    """The tiny LLaVA has 2,048 positions; an image takes 144 of them, whatever is kept."""
    _, processor = load("llava")
    scene = cases(processor, 1, 0)[0].images[0]
    pictures = [scene.rotate(3 * i) for i in range(16)]
    content = [{"type": "image"}] * 16 + [{"type": "text", "text": "how many objects are there?"}]

    def prompt(count):
        text = processor.apply_chat_template(
            [{"role": "user", "content": content[16 - count :]}], add_generation_prompt=True
        )
        return {"prompt": text, "multi_modal_data": {"image": pictures[:count]}}

    with engine("llava", "hired", 0.1, {}, step=256, images=16) as llm:
        settings = vllm.SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=1)
        out = llm.generate(prompt(14), settings, use_tqdm=False)[0].outputs[0]
        assert len(out.token_ids) == 60  # the last ones at positions from 2,048 on
        assert all(math.isfinite(p.logprob) for step in out.logprobs for p in step.values())
        for _ in range(2):  # the second time from vLLM's cache
            with pytest.raises(ValueError, match=r"end at 23\d\d, the LLM knows 2048"):
                llm.generate(prompt(16), settings, use_tqdm=False)
        assert llm.generate(prompt(1), settings, use_tqdm=False)[0].outputs[0].token_ids


def test_a_small_budget_does_not_admit_a_larger_picture():
    _, processor = load("llava")
    case = cases(processor, 1, 0)[0]
    with engine("llava", "hired", 1.0, {}, step=1024, length=150) as llm:
        assert asked(llm, [request(case, 0.1)], 1)
    words = "144 tokens at the server's own budget, more than the 100"
    with (
        engine("llava", "hired", 1.0, {}, step=1024, length=100) as llm,
        pytest.raises(ValueError, match=words),
    ):
        asked(llm, [request(case, 0.1)], 1)
