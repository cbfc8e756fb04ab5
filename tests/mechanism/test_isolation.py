"""`unpatch` removes every trace, and no patched model affects another."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from tests.oracle import clone
from vtoken.adapters.registry import adapter_class

from .common import (
    BOTH,
    EFFECT,
    INSIDE,
    PATCHABLE,
    SOME,
    assert_close,
    assert_moved,
    assert_same,
    clean,
    expected,
    run,
    subject,
)
from .fixed import Fixed, patched


def logits(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [torch.stack(run(model, inputs).logits).flatten(), model(**clone(inputs)).logits.flatten()]
        )


def traces(model) -> dict:
    """Every hook and instance attribute of every module."""
    out = {}
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if not k.startswith("_") or k.startswith("_v")}
        hooks = {k: list(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}
        out[name] = (sorted(attributes), hooks, type(module))
    return out


GRIDS = [name for name in PATCHABLE if adapter_class(FAMILIES[name].config().model_type).has_grid]


@pytest.mark.parametrize("name", PATCHABLE)
def test_unpatch_restores_everything(name):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].batch("ragged")
    before, traced = logits(model, inputs), traces(model)
    assert vtoken.patch(model, Fixed(layers=(2,) if name in INSIDE else ())) is model
    assert not torch.equal(before, logits(model, inputs))
    assert vtoken.unpatch(model) is model
    assert torch.equal(before, logits(model, inputs))
    assert traces(model) == traced
    vtoken.unpatch(model)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [(n, "pool" if n in GRIDS else "uniform") for n in PATCHABLE] + [(n, "random") for n in SOME],
)
def test_the_whole_budget_is_the_unpatched_model(name, strategy):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    want = logits(model, inputs)
    with vtoken.applied(model, strategy, budget=1.0):
        assert torch.equal(logits(model, inputs), want)


def test_an_int_budget_above_the_image_keeps_all_and_warns_once():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    want = logits(model, inputs)
    with (
        vtoken.applied(model, "random", budget=1000),
        pytest.warns(UserWarning, match="budget of 1000") as seen,
    ):
        got = logits(model, inputs)
        run(model, inputs)
    assert torch.equal(got, want)
    assert len([w for w in seen if "budget" in str(w.message)]) == 1


def test_two_models_patched_differently():
    inputs = FAMILIES["llava"].batch("ragged")
    a, b = FAMILIES["llava"].build(), FAMILIES["llava"].build(seed=1)
    dense = torch.stack(run(a, inputs).logits)
    with patched(a, seed=1) as one, patched(b, seed=2, layers=(1,)):
        first = run(a, inputs)
        other = run(b, inputs)
        one.clear()
        assert torch.equal(torch.stack(run(a, inputs).logits), torch.stack(first.logits))
        vtoken.unpatch(a)
        assert torch.equal(torch.stack(run(b, inputs).logits), torch.stack(other.logits))
        assert torch.equal(torch.stack(run(a, inputs).logits), dense)
    assert_same(first, inputs, expected("llava", inputs, one))


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "two models"])
def test_threads(shared):
    """Several threads at once, on one patched model or on two: each gets what it gets alone."""
    models = [FAMILIES["llava"].build() for _ in range(1 if shared else 2)]
    kinds = ["one", "ragged", "several_images", "text_only_row"]
    for i, model in enumerate(models):
        vtoken.patch(model, Fixed(seed=i, layers=(2,) if i else ()))
    jobs = [(models[i % len(models)], FAMILIES["llava"].batch(kind)) for i, kind in enumerate(kinds)]
    alone = [torch.stack(run(*job).logits) for job in jobs]
    for job, kind in zip(jobs, kinds):
        assert_moved(run(*job), "llava", FAMILIES["llava"].batch(kind))
    together: list = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        barrier.wait()
        together[i] = [torch.stack(run(*jobs[i]).logits) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for got, want in zip(together, alone):
        assert got is not None and all(torch.equal(g, want) for g in got)


def test_disabled_only_in_this_thread():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    dense = torch.stack(run(model, inputs).logits)
    got = {}
    with vtoken.applied(model, Fixed()):
        pruned = torch.stack(run(model, inputs).logits)
        with vtoken.disabled(model):
            thread = threading.Thread(target=lambda: got.update(other=torch.stack(run(model, inputs).logits)))
            thread.start()
            thread.join()
            got["this"] = torch.stack(run(model, inputs).logits)
        got["after"] = torch.stack(run(model, inputs).logits)
    assert torch.equal(got["this"], dense)
    assert torch.equal(got["other"], pruned) and torch.equal(got["after"], pruned)


def test_applied_restores_what_was_there():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    vtoken.patch(model, "random", budget=0.5)
    try:
        outside = logits(model, inputs)
        with pytest.raises(ZeroDivisionError), vtoken.applied(model, "uniform", budget=0.25):
            assert not torch.equal(logits(model, inputs), outside)
            raise ZeroDivisionError
        assert torch.equal(logits(model, inputs), outside)
        with pytest.raises(ValueError), vtoken.applied(model, "random", budget=7.5):
            pass
        assert torch.equal(logits(model, inputs), outside)
    finally:
        vtoken.unpatch(model)


@pytest.mark.parametrize("name", SOME)
def test_deep_copies_are_independent(name):
    inputs = FAMILIES[name].batch("ragged")
    model = vtoken.patch(FAMILIES[name].build(), "random", budget=0.5)
    want, dense = logits(model, inputs), logits(clean(name), inputs)
    assert (want - dense).abs().max() > EFFECT
    other = copy.deepcopy(model)
    assert_close(logits(other, inputs), want)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_close(logits(other, inputs), want)
    vtoken.unpatch(model)
    assert_close(logits(other, inputs), want)
    assert_close(logits(vtoken.unpatch(other), inputs), dense)


@pytest.mark.parametrize("where", ["projector", "prefill"])
@pytest.mark.parametrize("name", SOME)
def test_an_exception_in_a_strategy(name, where):
    model, inputs = subject(name), FAMILIES[name].batch("ragged")
    strategy = Fixed(**BOTH)
    method = "select" if where == "projector" else "select_in_prefill"
    works, broken = getattr(strategy, method), [True]

    def fail(tokens):
        if broken[0]:
            raise ZeroDivisionError
        return works(tokens)

    setattr(strategy, method, fail)
    with patched(model, strategy) as spy:
        for call in (lambda: run(model, inputs), lambda: model(**clone(inputs))):
            with pytest.raises(ZeroDivisionError):
                call()
        broken[0] = False
        spy.clear()
        out = run(model, inputs)
        assert_same(out, inputs, expected(name, inputs, spy))
        text = FAMILIES[name].prompt([[]])
        text = {k: text[k] for k in ("input_ids", "attention_mask")}
        assert_close(logits(model, text), logits(clean(name), text))


@pytest.mark.parametrize("answer", ["out of range", "unsorted", "not integer", "into without weight"])
def test_an_illegal_answer_is_an_error(answer):
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    keep = {
        "out of range": torch.tensor([3, 16]),
        "unsorted": torch.tensor([3, 1]),
        "not integer": torch.rand(3),
    }
    strategy = Fixed()
    selection = vtoken.Selection(keep.get(answer, torch.arange(3)))
    if answer == "into without weight":
        selection.into = torch.full((16,), -1)
    strategy.select = lambda tokens: selection
    with patched(model, strategy), pytest.raises(ValueError, match="Selection"):
        run(model, inputs)


@pytest.mark.parametrize("name", SOME)
def test_saved_models_are_unpatched_models(name, tmp_path):
    inputs, model = FAMILIES[name].batch("one"), FAMILIES[name].build()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with patched(model):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
    for state in (model.state_dict(), loaded.state_dict()):
        assert list(state) == list(weights)
        assert all(torch.equal(state[k], v) for k, v in weights.items())
    loaded.generation_config = model.generation_config
    assert_close(logits(loaded, inputs), logits(clean(name), inputs))


def test_keeping_nothing():
    """A strategy may drop every visual token of an image; the text goes on alone."""
    model, inputs = subject("llava"), FAMILIES["llava"].batch("ragged")
    strategy = Fixed()
    strategy.select = lambda tokens: vtoken.Selection(torch.empty(0, dtype=torch.long))
    with patched(model, strategy) as spy:
        out = run(model, inputs)
    assert_same(out, inputs, expected("llava", inputs, spy))


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_forward_that_someone_else_wraps(first):
    """Autocast and device maps set `forward` on the instance, before the patch or after it: each takes off
    its own.
    """
    model = FAMILIES["llava"].build()
    inputs, calls = FAMILIES["llava"].batch("one"), []

    def wrap() -> None:
        inner = model.forward

        @functools.wraps(inner)
        def theirs(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        model.forward = theirs

    with torch.no_grad():
        want = model(**clone(inputs)).logits
        if first == "theirs":
            wrap()
        vtoken.patch(model, "random", budget=0.5)
        if first == "ours":
            wrap()
        assert not torch.equal(model(**clone(inputs)).logits, want)
        vtoken.unpatch(model)
        assert torch.equal(model(**clone(inputs)).logits, want)
    assert len(calls) == 2
