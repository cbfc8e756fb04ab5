"""The clock of the benchmark: phases, live bytes, and speed-ups of pairs."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict

import pytest
import torch

import vtoken
from vtoken.bench import cells, timing
from vtoken.bench.shapes import build
from vtoken.stage_times import PHASES, phases
from vtoken.strategies import FastV, HiRED


class Ticks:
    """A clock that only moves when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.Stopwatch, "mark", staticmethod(lambda device: self.now))

    def after(self, seconds):
        def hook(*_):
            self.now += seconds

        return hook


@pytest.fixture(scope="module")
def work():
    return build("llava-1.5-7b", "tiny")


def traces(model):
    """Everything that a hook or a wrapped method would change."""
    hooks = [(OrderedDict(m._forward_hooks), OrderedDict(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, dict(model.base_model.__dict__), dict(model.__dict__)


def test_every_moment_belongs_to_one_phase(work, monkeypatch):
    ticks = Ticks(monkeypatch)
    model = work.model
    layers = model.get_decoder().layers
    tower = next(m for n, m in model.named_modules() if n.endswith("multi_modal_projector"))
    handles = [layer.register_forward_hook(ticks.after(3)) for layer in layers]
    handles += [
        tower.register_forward_hook(ticks.after(5)),
        model.lm_head.register_forward_hook(ticks.after(7)),
    ]
    for cls, name, seconds in ((HiRED, "select", 11), (FastV, "select_in_prefill", 13)):
        monkeypatch.setattr(cls, name, slowly(getattr(cls, name), ticks, seconds))
    try:
        dense = timing.prefill(work)
        with vtoken.applied(model, "hired", budget=0.5):
            short = timing.prefill(work)
        with vtoken.applied(model, "fastv", budget=0.6):
            inside = timing.prefill(work)
    finally:
        for handle in handles:
            handle.remove()
    llm = 3.0 * len(layers)
    assert dense == {"tower": 5, "choose": 0, "llm": llm, "rest": 7, "total": 12 + llm}
    assert short == {"tower": 5, "choose": 11, "llm": llm, "rest": 7, "total": 23 + llm}
    assert inside == {"tower": 5, "choose": 13, "llm": llm, "rest": 7, "total": 25 + llm}


def slowly(method, ticks, seconds):
    def call(self, *args):
        ticks.now += seconds
        return method(self, *args)

    return call


@pytest.mark.parametrize("strategy", [None, "hired", "mustdrop"])
def test_watching_changes_nothing(work, strategy):
    model = work.model
    if strategy:
        vtoken.patch(model, strategy, budget=0.5)
    try:
        with torch.inference_mode():
            # transformers puts hooks of its own on a model that is called first
            want = model(**work.inputs).logits
            before = traces(model)
            with phases(model):
                got = model(**work.inputs).logits
                assert traces(model) != before
        assert traces(model) == before and torch.equal(got, want)
    finally:
        vtoken.unpatch(model)


def test_a_model_that_others_wrapped_is_timed_and_left_as_it_was(work):
    base = work.model.base_model
    theirs = base.get_image_features = functools.partial(base.get_image_features)
    try:
        work.model(**work.inputs)
        before = traces(work.model)
        with phases(work.model) as watch:
            work.model(**work.inputs)
            assert watch.seconds()["tower"] > 0
        assert traces(work.model) == before and base.get_image_features is theirs
    finally:
        del base.get_image_features


@pytest.mark.parametrize("inside", [False, True])
def test_a_second_clock_is_refused_and_nothing_is_left(work, inside):
    """Two clocks that end in the order in which they began would put each other's hooks back."""
    model = vtoken.patch(work.model, HiRED(0.5))
    try:
        model(**work.inputs)
        before, said = traces(model), []

        def again():
            try:
                with phases(model):
                    model(**work.inputs)
            except RuntimeError as error:
                said.append(str(error))

        with phases(model):
            thread = threading.Thread(target=again)
            thread.run() if inside else thread.start()
            if not inside:
                thread.join()
        assert len(said) == 1 and "already timed" in said[0] and "one call at a time" in said[0]
        assert traces(model) == before
        with phases(model):
            vtoken.unpatch(model)
        assert "vtoken" not in str(traces(model)[0])
        assert not any(name.startswith("get_") for name in model.base_model.__dict__)
    finally:
        vtoken.unpatch(model)


def test_decode_is_what_comes_after_the_first_token(work, monkeypatch):
    ticks = Ticks(monkeypatch)
    handle = work.model.get_decoder().layers[0].register_forward_hook(ticks.after(1))
    try:
        assert timing.decode(work, 4) == {"decode": 4, "total": 5}
    finally:
        handle.remove()


def test_live_bytes_are_those_of_tensors_alive():
    kept = torch.ones(1000)
    with timing.LiveBytes() as count:
        a = torch.zeros(100)  # 400
        b = a + 1  # 800
        del a  # 400
        b.add_(1).view(10, 10).t()  # in place, and views
        assert count.live == 400 and count.peak == 800
        c = torch.stack([b, b, b])  # 1600
        del b, c
        kept.mul_(2)
    assert count.live == 0 and count.peak == 1600


def test_peak_and_cache_bytes_fall_with_the_tokens(work):
    peaks, caches = [], []
    for budget in (1.0, 0.2):
        with vtoken.applied(work.model, "uniform", budget=budget):
            for values, value in zip((peaks, caches), timing.peak_bytes(work)):
                values.append(value)
            assert caches[-1] == vtoken.report(work.model).kv_bytes
    assert peaks[1] < peaks[0] and peaks[0] > caches[0] > caches[1]


def test_spread():
    assert timing.spread([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0}
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}


def test_a_cell_computes_ratios_of_neighbours_and_promises_by_the_split(work):
    cell = cells.Cell(work, "uniform", 0.5)
    cell.facts = {"flops": [400.0, 100.0], "kv_bytes": [8, 2], "peak_bytes": [8, 4], "tokens": [36, 18]}

    def times(tower, choose, llm, rest):
        return dict(zip((*PHASES, "total"), (tower, choose, llm, rest, tower + choose + llm + rest)))

    cell.dense = [times(1, 0, 8, 1), times(1, 0, 8, 1), times(2, 0, 16, 2)]
    cell.short = [times(1, 1, 3, 1), times(1, 1, 4, 0), times(2, 2, 2, 2)]
    cell.floors = [2.0, 2.0, 2.0]
    cell.decoding = [(times(0, 0, 0, 6) | {"decode": 4.0}, times(0, 0, 0, 3) | {"decode": 1.0})]
    out = cell.result()
    assert out["promised"] == {"llm": 4.0, "prefill": pytest.approx(10 / (2 + 8 / 4))}
    assert out["measured"]["llm"] == {"median": 2.0, "q1": pytest.approx(1.8), "q3": 3.0}
    assert out["measured"]["prefill"]["median"] == pytest.approx(10 / 6)
    assert out["kept"]["llm"] == 0.5 and out["kept"]["attainable"] == 0.5
    assert out["attainable"]["median"] == 4.0 and out["overhead"]["median"] == pytest.approx(0.1)
    assert out["decode"]["median"] == 4.0 and out["end_to_end"]["median"] == 2.0


def test_equal_caches_share_decode_steps_and_not_the_prefill(work):
    quick, slow = cells.Cell(work, "uniform", 0.5), cells.Cell(work, "random", 0.5)
    quick.short, slow.short = [{"total": 2.0}], [{"total": 7.0}]
    quick.decoding = [({"decode": 4.0, "total": 12.0}, {"decode": 3.0, "total": 5.0})]
    slow.decode_like(quick)
    assert slow.decoding == [({"decode": 4.0, "total": 12.0}, {"decode": 3.0, "total": 10.0})]


def test_measure_covers_every_cell_and_says_what_it_left_out(work):
    found = cells.measure(
        work, ["uniform", "fastv", "visionzip+fastv", "vidcom2"], [0.5, 1.0], repeats=1, steps=2
    )
    known = {(c["strategy"], c["budget"]): c for c in found}
    assert len(known) == 8 and "vidcom2 is defined for" in known["vidcom2", 0.5]["refused"]
    half, one = known["uniform", 0.5], known["uniform", 1.0]
    assert half["tokens"] == [36, 18.0] and one["kv_bytes"][0] == one["kv_bytes"][1] > half["kv_bytes"][1]
    assert one["promised"] == {"llm": 1.0, "prefill": pytest.approx(1.0)}
    assert (
        half["attainable"]
        and "attainable" not in known["fastv", 0.5]
        and known["visionzip+fastv", 0.5]["decode"]
    )
    # equally many bytes in the cache: one measurement
    assert known["fastv", 1.0]["decode_ms"] == one["decode_ms"]
    assert vtoken.patching.patch_of(work.model) is None
    late = cells.measure(work, ["uniform"], [0.5], limit=0.0)
    assert late == [{"strategy": "uniform", "budget": 0.5, "refused": "the time limit came first"}]
