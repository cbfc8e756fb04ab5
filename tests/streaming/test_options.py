"""Options of sessions, memories and readers: right type, or one sentence before anything is opened."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import vtoken
from tests.streaming.common import frames_of, model_of
from tests.streaming.test_session import session_of
from vtoken.streaming.memory import RecentMemory
from vtoken.video import LiveReader, SyntheticReader, VideoError, open_video, sample_fps, uniform_indices

NAME = "llava"


def refused(make, kind=ValueError):
    with pytest.raises(kind) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text and ". " not in text and len(text) < 300, text
    return text


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("memory", None), ("memory", 3), ("max_bytes", "1"), ("max_bytes", 1e6), ("max_bytes", math.nan),
        ("max_bytes", 0), ("max_tokens", True), ("max_tokens", 2.5), ("memory_options", [1]), ("prompt", 3),
        ("system", b"x"), ("fps", "2"), ("fps", math.nan), ("fps", math.inf), ("fps", -1.0), ("fps", 0),
        ("fps", True), ("processor_options", "size"), ("max_new_tokens", 1.5), ("max_new_tokens", 0),
        ("max_new_tokens", "8"),
    ],
)  # fmt: skip
def test_options_of_a_session(option, wrong):
    text = refused(lambda: session_of(NAME, "uniform", 0.5, **{option: wrong}))
    assert option in text
    assert vtoken.patching.patch_of(model_of(NAME)) is None


@pytest.mark.parametrize(
    ("memory", "option", "wrong"),
    [
        ("recent", "sinks", "1"), ("recent", "sinks", None), ("recent", "recent", 2.0), ("recent", "recent", True),
        ("recent", "history_tokens", "0.5"), ("recent", "history_tokens", 1.5), ("recent", "history_tokens", 0),
        ("recent", "history_tokens", math.nan), ("rekv", "n_local", "15000"), ("rekv", "n_local", math.inf),
        ("rekv", "topk", 2.0), ("rekv", "topk", None), ("rekv", "chunk", False), ("rekv", "metric", ["dot"]),
        ("rekv", "metric", "l2"),
    ],
)  # fmt: skip
def test_options_of_a_memory(memory, option, wrong):
    text = refused(lambda: session_of("llava_onevision", memory=memory, memory_options={option: wrong}))
    assert option in text or "budget" in text


def test_numbers_of_numpy_and_torch_are_numbers():
    with session_of(
        NAME, fps=np.int64(2), max_bytes=torch.tensor(10**7), max_new_tokens=np.uint8(3)
    ) as session:
        session.push(frames_of(1)[0])
        assert (session.prompts.fps, session.memory.max_bytes, session.max_new_tokens) == (2.0, 10**7, 3)
    memory = RecentMemory(max_bytes=np.int32(9), max_tokens=1, history_tokens=np.int64(1))
    assert memory.history_tokens == 1 and type(memory.history_tokens) is int


@pytest.mark.parametrize(
    "wrong",
    [dict(fps="2"), dict(fps=math.nan), dict(queue=2.5), dict(queue=True), dict(drop="no"), dict(drop=0), dict(timeout=None),
     dict(retries=-1), dict(retries=1.5), dict(speed="1"), dict(growing="false"), dict(max_bytes="1"), dict(format=3),
     dict(options=["a"]), dict(options={"a": 1})],
)  # fmt: skip
def test_options_of_a_live_reader(wrong):
    assert next(iter(wrong)) in refused(lambda: LiveReader(frames_of(2), **wrong), VideoError)


def test_options_of_readers_and_samplers():
    for wrong in (
        dict(backend=None),
        dict(timeout="1"),
        dict(timeout=-1),
        dict(timeout=math.nan),
        dict(options=3),
    ):
        refused(lambda wrong=wrong: open_video("synthetic://0", **wrong), VideoError)
    for wrong in (dict(seed="0"), dict(fps=math.nan), dict(frames=2.5), dict(seed=-1)):
        refused(lambda wrong=wrong: SyntheticReader(**wrong), VideoError)
    for arguments in ((10, 2.5), ("10", 2), (10, 2, "start"), (10, True)):
        refused(lambda arguments=arguments: uniform_indices(*arguments), VideoError)
    refused(lambda: sample_fps(SyntheticReader(frames=4), "1"), VideoError)
    refused(lambda: sample_fps(SyntheticReader(frames=4), 1, start=math.nan), VideoError)
    assert uniform_indices(np.int64(10), np.int64(2)) == [0, 9]


def test_missing_and_unknown_arguments_stay_pythons_own():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'source'"):
        open_video()
    with pytest.raises(TypeError, match="unexpected keyword argument 'speeds'"):
        LiveReader(frames_of(1), speeds=2)
