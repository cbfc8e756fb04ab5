"""The streaming example asks what its model can answer."""

from __future__ import annotations

import re

import pytest

from .test_examples import load


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_the_answers_of_the_streaming_example_are_right(seed, capsys):
    load("streaming_qa").main(["--seed", str(seed)])
    said = capsys.readouterr().out
    right, total = map(int, re.search(r"(\d+) of (\d+) answers are right", said).groups())
    asked = re.findall(r"^ *[\d.]+ s  (.*\?)  (.*)  \(right: (.*)\)  \[", said, re.M)
    assert len(asked) == total >= 3 and right == sum(answer == truth for _, answer, truth in asked)
    assert right == total and not any("none" in truth for *_, truth in asked)


def test_the_streaming_example_takes_a_source_of_ones_own(capsys):
    load("streaming_qa").main(
        ["synthetic://5", "--question", "which digit is shown now?", "--every", "2", "--until", "4"]
    )
    said = capsys.readouterr().out
    assert said.count("which digit is shown now?") == 2 and "right" not in said
