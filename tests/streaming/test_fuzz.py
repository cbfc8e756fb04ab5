"""Random session calls with good and bad input, checked against a session's promises."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import vtoken
from tests.streaming.common import frames_of, model_of, processor_of
from tests.streaming.test_faults import NO_PICTURES, NO_PIXELS, NO_TIMES, one_sentence
from tests.streaming.test_session import Q

FRAMES = frames_of(6)
KINDS = {
    "video": ("llava_onevision", {"max_tokens": 12}),
    "pruned": ("llava_onevision", {"strategy": "stc", "budget": 0.5, "max_tokens": 8}),
    "pairs": ("qwen2_5_vl", {"memory_options": {"max_steps": 2, "recent": 2, "sinks": 0}}),
    "rekv": ("llava_onevision", {"memory": "rekv", "memory_options": {"n_local": 9, "topk": 2}}),
}
SENTENCES = (TypeError, ValueError, RuntimeError)
times = st.one_of(
    st.none(),
    st.floats(-1, 20),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([*NO_TIMES, 10**400]),
)


class Sessions(RuleBasedStateMachine):
    """What is known of the stream: frames taken, the latest time, questions answered, and whether it is
    closed.
    """

    @initialize(kind=st.sampled_from(sorted(KINDS)))
    def begin(self, kind):
        name, options = KINDS[kind]
        self.name, self.unit = name, 2 if kind == "pairs" else 1
        self.session = vtoken.StreamSession(
            model_of(name), processor_of(name), fps=2.0, max_new_tokens=1, **options
        )
        self.times, self.asked, self.closed = [], 0, False

    def refused(self, call) -> None:
        before = self.session.stats
        try:
            call()
        except SENTENCES as error:
            one_sentence(error)
        else:
            raise AssertionError("bad input was taken")
        assert self.session.stats == before

    @rule(number=st.integers(0, 5), gap=st.one_of(st.none(), st.floats(0.01, 5)))
    def push(self, number, gap):
        last = self.times[-1] if self.times else None
        t = None if gap is None else (last or 0.0) + gap
        if self.closed:
            return self.refused(lambda: self.session.push(FRAMES[number], t))
        step = self.session.push(FRAMES[number], t)
        self.times.append(t if t is not None else 0.0 if last is None else last + 0.5)
        assert (step is None) == (len(self.times) % self.unit != 0)

    @rule(size=st.tuples(st.integers(28, 60), st.integers(28, 60)))
    @precondition(lambda self: not self.closed)
    def push_another_size(self, size):
        self.session.push(np.zeros((*size, 3), np.uint8))
        self.times.append(self.times[-1] + 0.5 if self.times else 0.0)

    @rule(bad=st.sampled_from(range(len(NO_PICTURES) + len(NO_PIXELS))), t=times)
    def push_no_picture(self, bad, t):
        self.refused(lambda: self.session.push([*NO_PICTURES, *NO_PIXELS][bad], t))

    @rule(t=st.sampled_from([*NO_TIMES, math.nan, math.inf, -math.inf, 10**400]))
    def push_at_no_time(self, t):
        self.refused(lambda: self.session.push(FRAMES[0], t))

    @rule(back=st.floats(0, 9))
    @precondition(lambda self: self.times)
    def push_in_the_past(self, back):
        self.refused(lambda: self.session.push(FRAMES[0], self.times[-1] - back))

    @rule(
        text=st.sampled_from([Q, "what ?", "", " ", None, 3, b"what ?", "<video>", "<|video_pad|>"]), t=times
    )
    def ask(self, text, t):
        asks = isinstance(text, str) and text.strip() and self.session.frames.token not in text
        finite = t is None or (isinstance(t, float) and math.isfinite(t))
        if not asks or not finite or self.closed or not self.times or (t is not None and t < self.times[0]):
            return self.refused(lambda: self.session.ask(text, t))
        try:
            answer = self.session.ask(text, t)
        except ValueError as error:  # frames up to t may have been forgotten
            assert t is not None and t < self.times[-1] and "holds no frame up to" in str(error)
            return
        self.asked += 1
        assert answer.frames_used and set(answer.frames_used) <= set(self.times)
        assert max(answer.frames_used) <= (self.times[-1] if t is None else t)

    @rule()
    def stream(self):
        if self.closed or not self.times:
            return self.refused(lambda: self.session.stream_answer(Q))
        assert isinstance("".join(self.session.stream_answer(Q)), str)
        self.asked += 1

    @rule()
    def reset(self):
        self.session.reset()
        self.times, self.asked = [], 0

    @rule()
    @precondition(lambda self: len(self.times) > 3)
    def close(self):
        self.session.close()
        self.times, self.asked, self.closed = [], 0, True

    @invariant()
    def counts(self):
        if hasattr(self, "session"):
            stats = self.session.stats
            assert stats["frames"] == len(self.times) and stats["last"] == (
                self.times[-1] if self.times else None
            )
            assert stats["questions"] == self.asked and stats["bytes"] <= stats["max_bytes"]
            assert stats["steps"] + stats["forgotten"] == len(self.times) // self.unit

    def teardown(self):
        if hasattr(self, "session"):
            self.session.close()
            assert vtoken.patching.patch_of(model_of(self.name)) is None


SessionsTest = Sessions.TestCase
SessionsTest.settings = settings(
    max_examples=20,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
