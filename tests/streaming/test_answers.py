"""The demo's model answers what the demo proposes to ask, long after the stream began."""

from __future__ import annotations

import numpy as np
import pytest

from vtoken import tiny
from vtoken.cli.stream import EXAMPLES, TINY, TINY_STEPS, make_session
from vtoken.tiny.clips import Stream


@pytest.mark.parametrize("strategy", ["none", "stc_pruner"])
def test_the_questions_that_the_demo_proposes_get_right_answers_from_a_long_stream(strategy):
    right = []
    with make_session(*tiny.load(TINY), strategy, 0.5, max_steps=TINY_STEPS) as session:
        live = Stream(7)
        for index in range(100):
            frame = live.frame(index)
            session.push(frame.image, frame.seconds)
            if index >= 40 and index % 6 == 3:
                since = session.stats["first"]
                for text in EXAMPLES:
                    answer = session.ask(text, do_sample=False, max_new_tokens=6).text
                    right.append(answer == live.answer_to(text, frame.seconds, since))
    assert len(right) == 10 * len(EXAMPLES) and np.mean(right) >= 0.9
