"""A long stream takes no more memory and no more work per frame than a short one."""

from __future__ import annotations

import pytest

from tests.streaming.soak import OPTIONS, Mark, run


def check_flat(marks: list[Mark]) -> list[Mark]:
    """What is counted is the same from the second mark on, by which time the memory is full."""
    warm = marks[1:]
    assert len({m.flops for m in warm}) == 1 and warm[0].flops > 0
    assert len({m.answer_tokens for m in warm}) == 1
    assert max(m.memory for m in warm) <= warm[0].memory * 1.01
    assert max(m.tensor_bytes for m in warm) <= warm[0].tensor_bytes * 1.01
    assert max(m.tensors for m in warm) <= warm[0].tensors * 1.01
    return warm


@pytest.mark.parametrize("memory", OPTIONS)
def test_a_long_stream(memory):
    check_flat(list(run(800 if memory == "recent" else 240, marks=4, memory=memory, **OPTIONS[memory])))


@pytest.mark.soak
@pytest.mark.parametrize("memory", OPTIONS)
def test_a_very_long_stream(memory):
    warm = check_flat(list(run(100_000, memory=memory, **OPTIONS[memory])))
    assert max(m.resident for m in warm) < warm[0].resident * 1.01
    early, late = warm[:3], warm[-3:]
    assert sorted(m.milliseconds for m in late)[1] < 2 * sorted(m.milliseconds for m in early)[1]
