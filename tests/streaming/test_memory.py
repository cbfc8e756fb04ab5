"""The bounded memory of frames: which steps it forgets, in which order."""

from __future__ import annotations

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from vtoken.streaming import RecentMemory, Step
from vtoken.streaming.memory import change_between

D = 4


def step(t: float, change: float = 1.0, tokens: int = 2, rows: int = 2) -> Step:
    kept = torch.arange(tokens)
    return Step(
        (t,),
        torch.randn(tokens, D, generator=torch.Generator().manual_seed(int(t))),
        kept,
        rows,
        kept,
        change=change,
    )


def times(memory: RecentMemory) -> list[float]:
    return [s.seconds[0] for s in memory.view()]


def test_least_change_is_forgotten_first_and_handed_on():
    memory = RecentMemory(10**6, max_tokens=2 * 6, sinks=1, recent=2)
    for t, change in enumerate([1.0, 0.5, 0.1, 0.3, 0.25, 1.0]):
        memory.add(step(t, change))
    assert times(memory) == [0, 1, 2, 3, 4, 5]
    memory.add(step(6))  # 2 changed least of 1, 2, 3, 4; its 0.1 goes to 3
    assert times(memory) == [0, 1, 3, 4, 5, 6] and memory.view()[2].change == pytest.approx(0.4)
    memory.add(step(7))
    assert times(memory) == [0, 1, 3, 5, 6, 7] and memory.view()[3].change == pytest.approx(1.25)
    memory.add(step(8, 0.0))
    assert times(memory) == [0, 1, 5, 6, 7, 8] and memory.forgotten == 3


def test_still_stretches_shrink_and_short_scenes_stay():
    memory = RecentMemory(10**6, max_tokens=2 * 12, recent=4)
    shown = {100: 0.9, 101: 0.0, 102: 0.8, 1500: 0.7, 1501: 0.9}
    for t in range(3000):
        memory.add(step(t, shown.get(t, 0.0)))
    assert {0, 100, 102, 1500, 1501, 2996, 2997, 2998, 2999} <= set(times(memory))


def test_equal_change_keeps_all_ages():
    memory = RecentMemory(10**6, max_tokens=2 * 20, recent=4)
    for t in range(1000):
        memory.add(step(t, 0.1))
    gaps = torch.tensor(times(memory)[:-4]).diff()
    assert len(memory.steps) == 20 and times(memory)[0] == 0 and float(gaps.max()) < 1000 / 4


@pytest.mark.parametrize("limits", [dict(max_bytes=700), dict(max_tokens=9), dict(max_rows=30)])
def test_limits_hold_at_every_moment(limits):
    memory = RecentMemory(**(dict(max_bytes=10**6, max_tokens=10**6) | limits), sinks=2, recent=3)
    chance = torch.Generator().manual_seed(1)
    for t in range(200):
        tokens = int(torch.randint(1, 5, (), generator=chance))
        memory.add(step(t, float(torch.rand((), generator=chance)), tokens, rows=7))
        steps = memory.view()
        assert memory.nbytes == sum(s.nbytes for s in steps) <= memory.max_bytes
        assert memory.visual_tokens == sum(len(s.kept) for s in steps) <= memory.max_tokens
        assert memory.rows == 7 * len(steps) and (memory.max_rows is None or memory.rows <= memory.max_rows)
        assert times(memory) == sorted(times(memory)) and times(memory)[-1] == t
    assert memory.forgotten == 200 - len(steps)


def test_history_is_pruned_when_it_leaves_the_window():
    memory = RecentMemory(10**6, 10**6, sinks=1, recent=2, history_tokens=2)
    for t in range(5):
        memory.add(step(t, tokens=4, rows=4))
    assert [len(s.kept) for s in memory.view()] == [4, 2, 2, 4, 4]
    old = step(1, tokens=4, rows=4)
    unit = torch.nn.functional.normalize(old.features, dim=-1)
    far = (unit @ unit.mean(0)).argsort()[:2].sort().values
    assert torch.equal(memory.view()[1].kept, far) and torch.equal(
        memory.view()[1].features, old.features[far]
    )
    assert memory.nbytes == sum(s.nbytes for s in memory.view())


def test_change():
    a = torch.eye(20)
    b = a.clone()
    b[3] = -b[3]
    assert change_between(a, a) == pytest.approx(0, abs=1e-6)
    assert change_between(a, b) == pytest.approx(1.0)  # two of twenty count: one turned around, one as before
    assert change_between(None, a) == change_between(a[:3], a) == 1.0


def test_view_ends_in_time():
    memory = RecentMemory(10**6, 10**6)
    for t in range(4):
        memory.add(step(t))
    assert [s.seconds[0] for s in memory.view(2.5)] == [0, 1, 2] and memory.view(-1.0) == []


def test_releases_that_cannot_are_refused(monkeypatch):
    model = FAMILIES["llava"].build()
    forward = model.model.forward

    def older(input_ids=None, pixel_values=None, **kwargs):
        return forward(input_ids, pixel_values, **kwargs)

    monkeypatch.setattr(model.model, "forward", older)
    with pytest.raises(ValueError, match=r"use transformers 5\.18 or newer"):
        vtoken.StreamSession(model, None)


def test_bad_limits():
    for limits in (dict(max_bytes=0), dict(max_tokens=0), dict(recent=0), dict(sinks=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(limits))} must be at least"):
            RecentMemory(**(dict(max_bytes=1, max_tokens=1) | limits))
