"""Prompts through real processors: inputs and answers as by hand, measurements as reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vtoken
from training.tiny.recipes import qwen2_5_vl
from vtoken import tiny
from vtoken.eval.benchmarks.task import Clip, Prompt
from vtoken.eval.running.asker import Asker, FirstToken, load
from vtoken.tiny.scenes import held_out, make_scene


@pytest.fixture(scope="module")
def asker():
    return load(None)


@pytest.fixture(scope="module")
def qwen():
    model, processor = qwen2_5_vl.build(width=64, tower_width=32, tower_layers=3, llm_layers=2, heads=2)
    return Asker(model.eval(), processor)


def clip(n: int = 4) -> Clip:
    return Clip([make_scene(i, "test").image for i in range(n)], [3 * i for i in range(n)], 6.0, 4 * n)


def test_answers_are_those_of_the_model_by_hand(asker):
    pairs = held_out(5, seed=9)
    prompts = [Prompt(question.text, image=scene.image) for scene, question in pairs]
    with asker.applied("hired", 0.2):
        replies = asker(prompts, 8)
        report = vtoken.report(asker.model)
        single = [asker([prompt], 8)[0] for prompt in prompts]
        by_hand = []
        for scene, question in pairs:
            text = f"user: <image>\n{question.text} assistant:"
            inputs = asker.processor(images=scene.image, text=text, return_tensors="pt")
            out = asker.model.generate(**inputs, max_new_tokens=8, do_sample=False)
            by_hand.append(
                asker.processor.decode(
                    out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                ).strip()
            )
    assert [r.text for r in replies] == [r.text for r in single] == by_hand
    assert {r.tokens for r in replies + single} == {28.0} and {r.tokens_in for r in replies + single} == {
        144.0
    }
    assert sum(r.flops for r in replies) == pytest.approx(report.flops)
    assert sum(r.flops_dense for r in replies) == pytest.approx(report.flops_dense)
    for reply in replies:
        assert 0 < reply.ttft <= 5 * reply.seconds
    with pytest.raises(ValueError, match="not patched"):
        vtoken.report(asker.model)


def test_the_first_token_is_timed_not_the_last(asker):
    first = FirstToken()
    assert not first(torch.zeros(3, 2, dtype=torch.long), None).any() and first.seconds is not None
    was = first.seconds
    assert first(torch.zeros(3, 3, dtype=torch.long), None).shape == (3,) and first.seconds == was
    scene, question = next(pair for pair in held_out(5) if pair[1].kind == "where")
    with asker.applied(None):
        reply = asker([Prompt(question.text, image=scene.image)], 8)[0]
    assert len(reply.text.split()) == 2 and 0 < reply.ttft < reply.seconds


def test_all_tokens_is_the_unpatched_model(asker):
    prompt = Prompt("how many objects are there?", image=make_scene(3, "test").image)
    inputs = asker.inputs([prompt])
    out = asker.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    with asker.applied(None):
        reply = asker([prompt], 8)[0]
    assert reply.text == asker.processor.decode(out, skip_special_tokens=True).strip() and reply.tokens == 144


def test_a_family_of_images_gets_frames_as_several_images(asker):
    one, two = clip(3), clip(2)
    inputs = asker.inputs([Prompt("what is it?", clip=one), Prompt("where is the red one?", clip=two)])
    marks = "<image>\n"
    texts = [f"user: {3 * marks}what is it? assistant:", f"user: {2 * marks}where is the red one? assistant:"]
    by_hand = asker.processor(images=one.frames + two.frames, text=texts, padding=True, return_tensors="pt")
    assert inputs.keys() == by_hand.keys() and all(torch.equal(inputs[k], by_hand[k]) for k in inputs)
    assert inputs["attention_mask"][1, 0] == 0 and inputs["attention_mask"][:, -1].all()


def test_same_tokens_from_twice_the_frames(asker):
    with asker.applied(None):
        few = asker([Prompt("what is it?", clip=clip(2))], 2)[0]
    with asker.applied("uniform", 0.5):
        many = asker([Prompt("what is it?", clip=clip(4))], 2)[0]
    assert few.tokens == many.tokens == 288 and many.tokens_in == 576


def test_a_family_of_videos_gets_one_video(qwen):
    some, other = clip(4), clip(6)
    inputs = qwen.inputs(
        [Prompt("which digit came first?", clip=some), Prompt("was there a circle?", clip=other)]
    )
    assert inputs["video_grid_thw"].tolist() == [[2, 12, 12], [3, 12, 12]] and "pixel_values" not in inputs
    # 4 frames, 3 apart, of 6 per second: 4 of the file's 16 make 1.5 per second, a pair lasts 2 / 1.5 s
    assert list(inputs["second_per_grid_ts"]) == pytest.approx([2 / 1.5, 2 / 1.5])
    assert (inputs["input_ids"] == qwen.model.config.video_token_id).sum(1).tolist() == [72, 108]
    frames = np.stack([np.asarray(frame) for frame in some.frames])
    alone = qwen.processor.video_processor(videos=[frames], do_sample_frames=False, return_tensors="pt")
    n = len(alone["pixel_values_videos"])
    assert torch.equal(inputs["pixel_values_videos"][:n], alone["pixel_values_videos"])
    with qwen.applied("uniform", 0.5):
        replies = qwen([Prompt("which digit came first?", clip=some)], 2)
    assert (replies[0].tokens_in, replies[0].tokens) == (72, 36)


def test_pixels_get_the_type_of_the_model(qwen):
    prompt = [Prompt("which digit came first?", clip=clip(2))]
    qwen.model.to(torch.bfloat16)
    try:
        inputs = qwen.inputs(prompt)
    finally:
        qwen.model.to(torch.float32)
    assert inputs["pixel_values_videos"].dtype is torch.bfloat16
    assert list(inputs["second_per_grid_ts"]) == pytest.approx([4 / 3])  # not rounded to eight bits


def test_a_refusal_is_a_sentence(asker):
    prompt = Prompt("what is it?", image=make_scene(0, "test").image)
    assert asker.refusal("hired", 0.2, prompt) == ""
    assert "budget" in asker.refusal("sparsevlm", 0.1, prompt)
    with pytest.raises(ValueError, match="not patched"):
        vtoken.report(asker.model)


def test_without_a_chat_template_the_prompt_is_plain(asker):
    template = asker.processor.chat_template
    asker.processor.chat_template = None
    try:
        assert asker.chat("what?", "image", 2) == "USER: <image>\n<image>\nwhat? ASSISTANT:"
    finally:
        asker.processor.chat_template = template


def test_models_by_name(asker):
    assert (
        type(load("llava").model) is type(asker.model) and str(tiny.path("llava")) == asker.model.name_or_path
    )
    with pytest.raises(ValueError, match="Cannot load the model 'no/such'"):
        load("no/such")
