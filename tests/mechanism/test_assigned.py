"""Options assigned to a patched model's strategy, and features encoded under another strategy."""

from __future__ import annotations

import inspect

import pytest
import torch

import vtoken
from tests.models import FAMILIES
from vtoken.strategies import Composite, create

from .common import clean, subject


def answer(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def made(name: str, **options):
    if "+" in name:
        return Composite(options.pop("budget"), [create(part) for part in name.split("+")], **options)
    return create(name, **options)


MOVES_HOOKS = [
    ("llava", "fastv", dict(budget=0.3, layer=2), dict(layer=1)),
    ("qwen2_5_vl", "fastv", dict(budget=0.3, layer=2), dict(layer=3)),
    ("llava", "fastv", dict(budget=1.0, layer=2), dict(budget=0.3)),
    ("qwen3_vl", "fastv", dict(budget=0.3, layer=2), dict(budget=1.0)),
    ("llava", "hired", dict(budget=0.3), dict(score="received")),
    ("llava", "mustdrop", dict(budget=0.5), dict(merging=False)),
    ("llava", "visionzip", dict(budget=0.3), dict(budget=1.0)),
    ("llava", "random", dict(budget=0.3), dict(positions="renumber")),
    ("llava", "visionzip", dict(budget=1.0), dict(budget=0.3)),
    ("llava", "sparsevlm", dict(budget=0.5, layers=(1, 2)), dict(layers=(1, 3))),
]


@pytest.mark.parametrize(("name", "strategy", "options", "assigned"), MOVES_HOOKS)
def test_an_option_that_moves_hooks_is_a_sentence(name, strategy, options, assigned):
    inputs, strategy = FAMILIES[name].batch("ragged"), made(strategy, **options)
    with vtoken.applied(subject(name), strategy) as model:
        was = {option: getattr(strategy, option) for option in assigned}
        answer(model, inputs)
        for option, value in assigned.items():
            setattr(strategy, option, value)
        with pytest.raises(
            RuntimeError, match=r"given options after it was patched.*vtoken.unpatch\(model\)"
        ):
            answer(model, inputs)
        with vtoken.disabled(model):
            assert torch.equal(answer(model, inputs), answer(clean(name), inputs))
        for option, value in was.items():
            setattr(strategy, option, value)
        now = answer(model, inputs)
    with vtoken.applied(subject(name), strategy) as model:
        assert torch.equal(answer(model, inputs), now)


@pytest.mark.parametrize(
    ("name", "strategy", "options", "assigned"),
    [
        ("llava", "random", dict(budget=0.3), dict(budget=0.6)),
        ("llava", "random", dict(budget=1.0), dict(budget=0.6)),
        ("qwen2_5_vl", "fastv", dict(budget=0.3, layer=2), dict(budget=0.6)),
        ("llava", "random", dict(budget=0.3), dict(budget=1.0)),
        ("llava", "visionzip+fastv", dict(budget=0.3), dict(budget=0.7)),
    ],
)
def test_other_options_are_followed(name, strategy, options, assigned):
    inputs, strategy = FAMILIES[name].batch("ragged"), made(strategy, **options)
    with vtoken.applied(subject(name), strategy) as model:
        before = answer(model, inputs)
        for option, value in assigned.items():
            setattr(strategy, option, value)
        got, words = answer(model, inputs), vtoken.report(model).strategy
    with vtoken.applied(subject(name), strategy) as model:
        assert torch.equal(answer(model, inputs), got) and vtoken.report(model).strategy == words
    assert not torch.equal(got, before)
    if strategy.is_identity:
        real = inputs["attention_mask"].bool()
        assert torch.allclose(got[real], answer(clean(name), inputs)[real], atol=1e-5)


def features_of(model, inputs: dict):
    names = inspect.signature(model.base_model.get_image_features).parameters
    return model.base_model.get_image_features(
        **{k: v for k, v in inputs.items() if k in names}, return_dict=True
    )


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize(
    ("first", "then", "fits"),
    [
        ("mustdrop", "random", False),
        ("mustdrop", "fastv", False),
        ("random", "mustdrop", False),
        ("random", "hired", False),
        ("fastv", "visionzip", False),
        ("fastv", "random", True),
        ("hired", "random", True),
    ],
)
def test_features_of_another_strategy_are_read_right_or_refused(name, first, then, fits):
    inputs = FAMILIES[name].batch("ragged")
    if "mm_encoder_outputs" not in inspect.signature(subject(name).forward).parameters:
        pytest.skip("this release takes no features")
    if not {first, then} <= set(vtoken.list_strategies(model=subject(name))):
        pytest.skip("not for this tower")
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with vtoken.applied(subject(name), first, budget=0.5) as model:
        output = features_of(model, inputs)
    with vtoken.applied(subject(name), then, budget=0.5) as model:
        if not fits:
            with pytest.raises(
                ValueError, match=r"encoded under another strategy.*call get_image_features again"
            ):
                model(**text, mm_encoder_outputs={"image": output})
            output = features_of(model, inputs)
        want = answer(model, inputs)
        assert torch.equal(answer(model, text | dict(mm_encoder_outputs={"image": output})), want)
