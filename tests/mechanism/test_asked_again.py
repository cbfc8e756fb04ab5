"""Same features, same tokens, however often asked; a stream advances when frames are encoded."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken import Selection, StreamState, VisualTokens, strategies
from vtoken.mechanism.forward_context import ENCODED

from .common import run, subject
from .fixed import Fixed, Spy, patched

STREAMING = [
    ("stc", {}),
    ("stc", dict(channels="fixed")),
    ("stc_pruner", {}),
    ("stc_pruner", dict(window=3)),
    ("stc_pruner", dict(score="dual_anchor", alpha=0.9)),
]


@dataclass
class Counting(Fixed):
    """One of someone's own: which tokens stay depends on how many frames went before, noted in whatever way."""

    def select(self, tokens: VisualTokens) -> Selection:
        tokens.memory.setdefault("sums", []).append(tokens.features.sum().double())
        tokens.memory["total"] = tokens.memory.get("total", torch.zeros(())).add_(1)
        return self._draw(len(tokens), int(tokens.memory["total"]) * 101 + len(tokens.memory["sums"]))


Counting.info = Fixed.info


def made(case):
    return Counting() if case == "own" else strategies.create(case[0], budget=0.3, **case[1])


def features(model, inputs: dict, modality: str = "image"):
    method = getattr(model.base_model, f"get_{modality}_features")
    names = inspect.signature(method).parameters
    return method(**{k: v for k, v in clone(inputs).items() if k in names}, return_dict=True)


def text_of(model, inputs: dict) -> dict:
    names = inspect.signature(model.base_model.get_image_features).parameters
    return {
        k: v
        for k, v in clone(inputs).items()
        if k not in names and not k.startswith(("pixel", "image", "video"))
    }


def kept(spy: Spy) -> list[list[int]]:
    return [answer.keep.tolist() for _, answer in spy.items]


@pytest.mark.parametrize("streaming", [False, True], ids=["alone", "in a stream"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision/video", "llava_next"])
@pytest.mark.parametrize("case", [*STREAMING, "own"], ids=str)
@torch.no_grad()
def test_features_encoded_once_and_asked_three_times(case, name, streaming):
    family, model = FAMILIES[name], subject(name)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release takes no features")
    modality = "video" if "/" in name else "image"
    first, inputs = family.prompt([[1]]), family.batch("one")
    state = StreamState()
    with patched(model, made(case)) as spy:

        def encode(inputs: dict):
            if not streaming:
                return features(model, inputs, modality)
            with vtoken.stream(model, state):
                return features(model, inputs, modality)

        encode(first)
        output = encode(inputs)
        before = copy.deepcopy(state.memory)
        answers, logits = [], []
        for _ in range(3):
            spy.clear()
            logits.append(model(**text_of(model, inputs), mm_encoder_outputs={modality: output}).logits)
            answers.append(kept(spy))
        spy.clear()
        model.generate(
            **text_of(model, inputs), mm_encoder_outputs={modality: output}, max_new_tokens=3, do_sample=False
        )
        answers.append(kept(spy))
        assert all(a == answers[0] for a in answers)
        assert all(torch.equal(a, logits[0]) for a in logits)
        assert repr(state.memory) == repr(before) and bool(before) == streaming
        if streaming:  # the next frame does see this one, once
            twin = copy.deepcopy(state)
            encode(first)
            model(**text_of(model, inputs), mm_encoder_outputs={modality: output})
            with vtoken.stream(model, twin):
                features(model, first, modality)
            assert repr(state.memory) == repr(twin.memory) != repr(before)


@pytest.mark.parametrize("case", [*STREAMING[1:], "own"], ids=str)
@torch.no_grad()
def test_history_is_what_was_pushed_in_its_order(case):
    """Frames pushed first and asked about last to first: the answers are those of asking each when it came."""
    family, model = FAMILIES["llava"], subject("llava")
    frames = [family.prompt([[i]]) for i in (0, 1, 2)]

    def ask(output) -> list[int]:
        (item,) = getattr(output, ENCODED).items
        return vtoken.patching.patch_of(model)._select(item).keep.tolist()

    with patched(model, made(case)), vtoken.stream(model, StreamState()):
        at_once = [ask(features(model, frame)) for frame in frames]
    with patched(model, made(case)):
        with vtoken.stream(model, StreamState()):
            outputs = [features(model, frame) for frame in frames]
        assert [ask(output) for output in reversed(outputs)][::-1] == at_once
        alone = [ask(features(model, frame)) for frame in frames]
    assert alone[0] == at_once[0] and alone[1:] != at_once[1:]


@torch.no_grad()
def test_a_refused_frame_leaves_no_history():
    model, family = subject("llava"), FAMILIES["llava"]
    strategy, state = made("own"), StreamState()
    with patched(model, strategy), vtoken.stream(model, state):
        features(model, family.prompt([[0]]))
        before, inner = repr(state.memory), strategy.select

        def fail(tokens: VisualTokens) -> Selection:
            inner(tokens)
            raise KeyError("of the strategy")

        strategy.select = fail
        with pytest.raises(KeyError):
            features(model, family.prompt([[1]]))
        assert repr(state.memory) == before
        strategy.select = inner


@torch.no_grad()
def test_a_strategy_that_reads_the_question_is_not_asked_before_there_is_one():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    with (
        patched(model, strategies.create("cdpruner", budget=0.3)) as spy,
        vtoken.stream(model, StreamState()),
    ):
        features(model, inputs)
        assert not spy.items
        model(**clone(inputs))
        assert len(spy.items) == 1


@pytest.mark.parametrize("way", [dict(), dict(num_beams=2)], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    ("case", "name"), [("own", "llava"), ("own", "qwen2_5_vl/video"), (STREAMING[0], "llava"), (STREAMING[2], "qwen2_5_vl")],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_generate_pushes_its_frames_once(case, name, way):
    """With `use_cache=False` too, where every step reads the prompt again and older releases encode its
    pictures again.
    """
    family, model = FAMILIES[name], subject(name)
    if way and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release gives every beam a copy of the frame")
    inputs = [family.batch("one"), family.prompt([[1]])]
    seen = []
    for cache in (True, False):
        state = StreamState()
        with patched(model, made(case)) as spy, vtoken.stream(model, state):
            texts = [
                run(model, one, 3, use_cache=cache, **way).sequences.tolist() for one in (*inputs, inputs[0])
            ]
        seen.append((texts, repr(state.memory), kept(spy)))
    assert seen[0][0] == seen[1][0] and seen[0][1] == seen[1][1]
    assert seen[0][2] == seen[1][2]


@torch.no_grad()
def test_the_tower_reads_the_frames_of_a_generate_once():
    name = "qwen2_5_vl/video"
    inputs, model, state = FAMILIES[name].batch("one"), subject(name), StreamState()
    counted = []
    for cache in (True, False):
        with vtoken.applied(model, "stc_cacher"), vtoken.stream(model, state):
            state.reset()
            run(model, inputs, 4, use_cache=cache)
            counted.append((state.frames, state.tokens))
    assert counted[0] == counted[1] and counted[0][0] > 0
