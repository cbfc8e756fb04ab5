"""`Budget`: what the number that a user gives allows; 1 and 1.0 stay two things."""

from __future__ import annotations

import json

import pytest

from vtoken.strategies.budgets import Budget
from vtoken.tokens import Segment

CROPS = [Segment("thumbnail", (4, 4)), Segment("crop", (4, 4), tokens=4), Segment("crop", (4, 4), tokens=0)]
FRAMES = [Segment("frame", (4, 4))] * 3


def test_one_token_is_not_all_of_them():
    one, whole = Budget(1), Budget(1.0)
    assert one != whole and len({one, whole, Budget(1)}) == 2
    assert (one.unit, whole.unit, one.is_all, whole.is_all) == ("tokens", "share", False, True)
    assert one.tokens(FRAMES) == [1, 1, 1] and whole.tokens(FRAMES) == [16, 16, 16]


@pytest.mark.parametrize("value", [1, 1.0, 7, 0.25])
def test_a_unit_brings_back_what_json_forgets(value):
    budget = Budget(value)
    for written in (value, int(value) if float(value).is_integer() else value):
        again = Budget.of(json.loads(json.dumps(written)), budget.unit)
        assert again == budget and type(again.value) is type(value)


def test_arithmetic():
    assert Budget(0.3).tokens(CROPS) == [4, 1, 0] and Budget(6).tokens(CROPS) == [3, 3, 0]
    assert (
        Budget(0.3).total(FRAMES, 48) == 14
        and Budget(5).total(FRAMES, 48) == 15
        and Budget(5).total(CROPS, 3) == 3
    )
    assert (
        Budget(0.3).allowed(10) == 3
        and Budget(4).allowed(10, units=3) == 12
        and Budget(4).allowed(10, units=0) == 4
    )
    assert Budget(0.01).part(20) == 1 and Budget(30).part(20) == 20 and Budget(0.5).part(0) == 0
    assert (
        Budget(5).share_of(20) == 0.25 and Budget(50).share_of(20) == 1.0 and Budget(0.3).share_of(20) == 0.3
    )


@pytest.mark.parametrize("wrong", [0, 0.0, -1, 1.5, True, "0.2", None])
def test_what_is_no_budget(wrong):
    with pytest.raises(ValueError, match=r"budget must .*found .*: use a share"):
        Budget(wrong)


@pytest.mark.parametrize(("value", "unit"), [(0.5, "tokens"), (128, "share"), (1, "percent")])
def test_a_number_that_is_none_in_its_unit(value, unit):
    with pytest.raises(ValueError, match="budget"):
        Budget.of(value, unit)
