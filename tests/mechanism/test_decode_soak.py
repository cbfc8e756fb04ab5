"""A long answer takes no more memory and no more work per token than a short one."""

from __future__ import annotations

import pytest

from .decode_soak import Mark, run


def check_flat(marks: list[Mark]) -> list[Mark]:
    """What is counted is the same from the second mark on, by which time the window is full."""
    warm = marks[1:]
    assert len({m.cache for m in warm}) == 1
    assert max(m.tensor_bytes for m in warm) <= warm[0].tensor_bytes * 1.001
    assert max(m.tensors for m in warm) <= warm[0].tensors * 1.01
    assert all(0 < m.largest < 100 for m in warm)
    return warm


def test_a_long_answer():
    check_flat(list(run(400, marks=4, recent=24)))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_very_long_answer(name):
    warm = check_flat(list(run(100_000, name=name, recent=256)))
    assert max(m.position for m in warm) < 3 * 4096
    assert max(m.resident for m in warm) < warm[0].resident * 1.01
    early, late = warm[:3], warm[-3:]
    assert sorted(m.milliseconds for m in late)[1] < 1.5 * sorted(m.milliseconds for m in early)[1]
