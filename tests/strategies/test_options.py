"""Values of options: right type or one sentence, at construction, at `patch` and at assignment."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtoken
from tests.mechanism.common import run, subject
from tests.mechanism.test_isolation import traces
from tests.models import FAMILIES
from vtoken.checks import fit, number
from vtoken.strategies import (
    STC,
    VTCCLS,
    Composite,
    FastV,
    PyramidDrop,
    Random,
    STCCacher,
    create,
    list_names,
    registry,
    strategy_info,
)
from vtoken.strategies.base import Strategy

FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=60)
OPTIONS = [(name, f.name) for name in list_names() for f in fields(strategy_info(name).cls) if f.init]
BOOLEANS = [
    (n, o)
    for n, o in OPTIONS
    if isinstance(default := strategy_info(n).defaults[o], bool) and default is not None
]


class Count(IntEnum):
    ONE = 1


class Awkward:
    def __repr__(self):
        raise RuntimeError("no repr")


def refused(make):
    """The sentence with which something is refused."""
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?")) and ". " not in text.rstrip("."), text
    assert len(text) < 400
    return text


# -- what the user writes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "option"), BOOLEANS)
@pytest.mark.parametrize("word", ["false", "False", 0, 1, 0.0, None, "", [], np.int64(0), torch.tensor(0)])
def test_no_word_and_no_number_is_a_boolean(name, option, word):
    if word is None and strategy_info(name).defaults[option] is None:
        return
    assert refused(lambda: create(name, **{option: word})).startswith(
        f"{option} must be True or False, found "
    )


SENTENCES = [
    ("random", dict(seed=None), "seed must be a whole number, found None."),
    ("random", dict(seed="3"), "seed must be a whole number, found '3'."),
    ("random", dict(seed=2.0), "seed must be a whole number, found 2.0."),
    ("random", dict(seed=True), "seed must be a whole number, found True."),
    ("random", dict(seed=10**400), "seed must be a whole number, found one of 1329 bits."),
    ("fastv", dict(layer=math.nan), "layer must be a whole number, found nan."),
    ("fastv", dict(query="first"), "query must be one of last, mean, found 'first'."),
    ("fastv", dict(query=["last"]), "query must be one of last, mean, found ['last']."),
    ("sparsevlm", dict(target=100), "target must be None or one of 192, 128, 96, 64, found 100."),
    ("sparsevlm", dict(target=True), "target must be None or one of 192, 128, 96, 64, found True."),
    ("sparsevlm", dict(layers="123"), "layers must be None or a list of whole numbers, found '123'."),
    ("sparsevlm", dict(layers=[1, 2.5]), "layers must be None or a list of whole numbers, found [1, 2.5]."),
    ("sparsevlm", dict(layers={1, 2}), "layers must be None or a list of whole numbers, found {1, 2}."),
    ("sparsevlm", dict(recycle="no"), "recycle must be None or True or False, found 'no'."),
    (
        "pyramiddrop",
        dict(ratio=math.inf),
        "ratio must be None or a finite number or a list of finite numbers, ",
    ),
    ("cdpruner", dict(theta=math.nan), "theta must be None or a finite number, found nan."),
    ("globalcom2", dict(tau=math.nan), "tau must be a finite number, found nan."),
    ("globalcom2", dict(tau=10**400), "tau must be a finite number, found one of 1329 bits."),
    ("token_corr", dict(kappa=np.float32("nan")), "kappa must be a finite number, found "),
    ("mustdrop", dict(merge_threshold=math.nan), "merge_threshold must be a number, found nan."),
    ("hired", dict(alpha=torch.tensor([0.5])), "alpha must be a finite number, found tensor([0.5000])."),
    ("hired", dict(alpha=Awkward()), "alpha must be a finite number, found an object of type Awkward."),
    ("random", dict(positions=None), "positions must be one of original, renumber, found None."),
    ("random", dict(budget=None), "budget must be a finite number, found None."),
    ("token_corr", dict(budget="half"), "The budget must be a number, found 'half': "),
    ("random", dict(budget=Fraction(1, 10**400)), "A fractional budget must lie in (0, 1], found "),
    ("random", dict(budget=10**400), "A whole-number budget has at most 63 bits, found one of 1329 bits: "),
]


@pytest.mark.parametrize(
    ("name", "options", "sentence"), SENTENCES, ids=[f"{n} {next(iter(o))}" for n, o, _ in SENTENCES]
)
def test_what_the_sentence_says(name, options, sentence):
    assert refused(lambda: create(name, **options)).startswith(sentence)


def test_refused_by_patch_without_a_trace():
    model = subject("llava")
    before = traces(model)
    for options in (dict(keep_newline="false"), dict(layers=math.nan), dict(start_layer=1.0)):
        refused(lambda options=options: vtoken.patch(model, "vtc_cls", 0.5, **options))
    refused(lambda: vtoken.patch(model, ["vtc_cls", "fastv"], 0.5, fastv={"layer": "2"}))
    refused(lambda: vtoken.patch(model, vtoken.VTokenConfig("vtc_cls", options={"keep_newline": "false"})))
    assert traces(model) == before


# -- what is accepted ----------------------------------------------------------------------------------------
def test_equal_values_of_other_types_become_pythons():
    made = create(
        "hired", budget=np.float64(0.25), alpha=1, keep_newline=np.bool_(True), score=np.str_("received")
    )
    assert (made.budget, made.alpha, made.keep_newline, made.score) == (0.25, 1.0, True, "received")
    assert [type(v) for v in (made.budget, made.alpha, made.keep_newline, made.score)] == [
        float,
        float,
        bool,
        str,
    ]
    assert type(create("random", seed=torch.tensor(7)).seed) is int
    for layers in ([1, 3], (1, 3), range(1, 4, 2), np.array([1, 3]), torch.tensor([1, 3])):
        made = create("pyramiddrop", layers=layers)
        assert made.layers == (1, 3) and all(type(i) is int for i in made.layers)


@pytest.mark.parametrize("one", [1, np.int64(1), np.uint8(1), torch.tensor(1), Count.ONE])
def test_a_count_of_one_never_becomes_a_share(one):
    for made in (
        create("random", budget=one),
        create("token_corr", budget=one),
        create("stc", recompute=one),
    ):
        value = made.recompute if isinstance(made, STC) else made.budget
        assert type(value) is int and value == 1 and not made.is_identity


@pytest.mark.parametrize("whole", [1.0, np.float32(1), torch.tensor(1.0), Fraction(1, 1)])
def test_a_share_of_one_never_becomes_a_count(whole):
    made = create("random", budget=whole)
    assert type(made.budget) is float and made.is_identity


# -- after it is made ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("strategy", "option", "wrong"),
    [
        (Random(0.3), "budget", "0.2"),
        (Random(0.3), "budget", 1.5),
        (Random(0.3), "budget", math.nan),
        (Random(0.3), "budget", None),
        (Random(0.3), "seed", None),
        (VTCCLS(0.3), "keep_newline", "false"),
        (VTCCLS(0.3), "layers", 0),
        (PyramidDrop(), "layers", (8, 4)),
        (PyramidDrop(), "ratio", -1.0),
        (STC(), "recompute", 0),
        (Composite(0.3, [Random(), FastV()]), "split", 2),
        (Composite(0.3, [Random(), FastV()]), "budget", "0.2"),
        (Composite(0.3, [Random(), FastV()]), "parts", [Random()]),
    ],
)
def test_an_assignment_is_checked_and_changes_nothing_where_it_is_wrong(strategy, option, wrong):
    strategy = copy.deepcopy(strategy)
    before = copy.deepcopy(strategy.__dict__)
    refused(lambda: setattr(strategy, option, wrong))
    assert {k: v for k, v in strategy.__dict__.items() if k != "info"} == {
        k: v for k, v in before.items() if k != "info"
    }


def test_an_assignment_is_the_same_as_making_it_so():
    stc = STC()
    stc.recompute = np.float64(0.5)
    assert (
        stc == STC(recompute=0.5)
        and stc._cacher == STC(recompute=0.5)._cacher
        and type(stc.recompute) is float
    )
    both, made = Composite(0.3, [Random(), FastV()]), Composite(0.81, [Random(), FastV()])
    both.budget = 0.81
    assert both.first.budget == made.first.budget == pytest.approx(0.9) and both.then.budget == 0.81
    pyramid = PyramidDrop(0.4)
    pyramid.layers = [2, 4]
    pyramid.budget = 0.3
    assert pyramid.layers == (2, 4) and pyramid == PyramidDrop(0.3, layers=(2, 4))


def test_copies_are_checked_as_well():
    for made in (copy.copy(Random()), copy.deepcopy(Random()), pickle.loads(pickle.dumps(Random()))):
        refused(lambda made=made: setattr(made, "budget", 3.5))
        made.budget = 3
        assert made == Random(3)


def test_a_combination_leaves_its_parts_as_they_are():
    parts = [Random(0.5), PyramidDrop(0.3), STCCacher(0.4, interval=3)]
    before = [copy.deepcopy(p.__dict__) for p in parts]
    for budget in (None, 0.2, 7):
        both = Composite(budget, parts)
        both.prefill_layers(32), both.check_depth(32), both.counts([vtoken.Segment("image", (4, 4))])
    assert [p.__dict__ for p in parts] == before


# -- a user's own --------------------------------------------------------------------------------------------
class Colour(str, Enum):
    RED = "red"


@vtoken.register("own_options", summary="For tests.", stages=("projector",), baseline=True)
@dataclass
class Own(Strategy):
    flag: bool = False
    kind: Literal["red", "blue"] = "red"
    sloppy: int = None  # type: ignore[assignment]
    limit: float = math.inf
    pair: tuple[int, float] = (1, 2.0)
    names: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    where: Path | str = "."
    dtype: torch.dtype | None = None
    unknown: NotThere = 3  # type: ignore[name-defined]  # noqa: F821
    calls: int = field(default=0, init=False)

    def select(self, tokens):
        return vtoken.Selection.everything(len(tokens), tokens.cells.device)


del registry._registry["own_options"]  # or the tests of all strategies would take it up


@pytest.mark.parametrize(
    "wrong",
    [
        dict(flag="no"),
        dict(kind="green"),
        dict(sloppy="x"),
        dict(sloppy=1.5),
        dict(limit=-math.inf),
        dict(limit=math.nan),
        dict(pair=(1,)),
        dict(pair=(1.5, 2)),
        dict(names="abc"),
        dict(names=[1]),
        dict(table=[("a", 1)]),
        dict(table={"a": "b"}),
        dict(budget="0.5"),
    ],
)
def test_a_users_own_dataclass_is_checked_alike(wrong):
    assert next(iter(wrong)) in refused(lambda: Own(**wrong))
    option, value = next(iter(wrong.items()))
    refused(lambda: setattr(Own(), option, value))


def test_annotations_that_nobody_knows_pass():
    anything = object()
    made = Own(where=anything, dtype=anything, unknown=anything, sloppy=None, limit=math.inf)
    assert made.where is made.dtype is made.unknown is anything and made.sloppy is None
    made = Own(kind=Colour.RED, names=("a",), pair=[np.int8(3), 4], table={"a": np.int64(1)})
    assert made.kind == "red" and type(made.kind) is str
    assert (made.names, made.pair, made.table) == (["a"], (3, 4.0), {"a": 1}) and type(made.pair[1]) is float
    made.calls += 1
    made.flag = True
    assert made.calls == 1
    refused(lambda: setattr(made, "calls", "often"))


def test_a_strategy_that_is_not_registered_and_forgets_super():
    @dataclass
    class Quiet(Random):
        share: float = 0.5

        def __post_init__(self):
            pass

    refused(lambda: Quiet(share="0.5"))
    refused(lambda: Quiet(budget=7.5))
    assert Quiet(share=1).share == 1.0


# -- any value for any option --------------------------------------------------------------------------------
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.fractions()
    | st.decimals()
    | st.complex_numbers()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(
        ["false", "True", "0.2", "nan", "1", "last", "cls", "original", "sum", "2.0", "spatial"]
    )
    | st.sampled_from(
        [np.int64(3), np.float32(0.5), np.bool_(False), np.float64("nan"), np.array([1, 2]), np.str_("cls")]
    )
    | st.sampled_from(
        [torch.tensor(2), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(True), torch.tensor(1j)]
    )
    | st.sampled_from(
        [torch.empty((), device="meta"), torch.float32, object(), Awkward(), Count.ONE, print, int]
    )
)
values = (
    scalars
    | st.lists(scalars, max_size=3)
    | st.tuples(scalars)
    | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
)


def means_the_same(kept: Any, given: Any) -> bool:
    given = number(given)
    if isinstance(kept, bool) or isinstance(given, bool) or kept is None or given is None:
        return kept is given
    if isinstance(kept, tuple):
        given = given.tolist() if hasattr(given, "tolist") else given
        return len(kept) == len(given) and all(map(means_the_same, kept, given))
    return isinstance(kept, str) == isinstance(given, str) and (kept == given or float(given) == kept)


@FUZZ
@given(values)
def test_every_option_is_refused_in_one_sentence_or_means_what_was_given(value):
    for name, option in OPTIONS:
        try:
            made = create(name, **{option: value})
        except (ValueError, TypeError) as error:
            text = str(error)
            assert "\n" not in text and text.endswith("."), (name, option, text)
            continue
        kept = getattr(made, option)
        assert means_the_same(kept, value), (name, option, kept)
        hint = strategy_info(name).defaults[option]
        assert not isinstance(hint, bool) or isinstance(kept, bool)
        made.is_identity, made.prefill_layers(32), made.needs(None)


@FUZZ
@given(
    values,
    st.sampled_from(
        [int, float, str, bool, float | int, Literal["a", 1], tuple[int, ...], list[float], dict[str, int]]
    ),
)
def test_fit_gives_the_hints_type_and_is_stable(value, hint):
    try:
        once = fit("x", value, hint)
    except ValueError as error:
        assert str(error).startswith("x must be ")
        return
    again = fit("x", once, hint)
    assert again == once and type(again) is type(once)
    if hint in (int, float, bool):
        assert type(once) is hint
    elif hint == Literal["a", 1]:
        assert once in get_args(hint)


# -- budgets of one ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["random", "fastv", "random+fastv"])
def test_one_token_of_many_says_once_that_it_is_not_all(strategy):
    model, inputs = subject("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch("ragged")
    most = max(int(row.sum()) for row in FAMILIES["qwen2_5_vl"].visual(inputs))
    assert most > 16
    with (
        vtoken.applied(model, strategy, budget=1),
        pytest.warns(UserWarning, match="write budget=1.0") as caught,
    ):
        run(model, inputs, 1)
        run(model, inputs, 1)
    assert len([w for w in caught if "budget=1" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("strategy", "budget"), [("random", 2), ("random", 1.0), ("random+fastv", 1.0), ("stc_cacher", 1)]
)
def test_other_budgets_do_not(strategy, budget):
    model, inputs = subject("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch("ragged")
    with vtoken.applied(model, strategy, budget=budget), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, inputs, 1)
    assert not [w for w in caught if "budget=1" in str(w.message)]


# -- a+b -----------------------------------------------------------------------------------------------------
def test_names_joined_by_plus_are_a_combination():
    model, inputs = subject("llava"), FAMILIES["llava"].batch("one")
    outs = []
    for strategy in ("random+fastv", "random + fastv", ["random+fastv"], ["random", "fastv"]):
        options = {"fastv": {"layer": 1}}
        for way in (
            (strategy, 0.2, options),
            (vtoken.VTokenConfig(strategy, 0.2, options=options), None, {}),
        ):
            with vtoken.applied(model, *way[:2], **way[2]):
                outs.append(torch.stack(run(model, inputs, 1).logits))
                assert "fastv(budget=0.2, layer=1), sharing budget=0.2" in str(vtoken.report(model))
    assert all(torch.equal(outs[0], other) for other in outs[1:])
    three = vtoken.requested.make_strategy("stc_cacher+random+fastv", 0.25, {})
    assert three.info.name == "stc_cacher+random+fastv"


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("random+", {}, 'joined as in "visionzip+fastv"'),
        ("+", {}, "joined as in"),
        ("random+fastvv", {}, "did you mean fastv"),
        ("random+random", {}, "can be there once"),
        ("hired+random", {}, "both act between"),
        ("random+fastv", dict(layer=1), "one mapping per strategy, found layer"),
        ("random+fastv", dict(fastv=3), "mapping such as fastv="),
        (["fastv"], dict(fastv=3), "mapping such as fastv="),
        (["random", "random+fastv"], {}, "can be there once"),
    ],
)
def test_what_cannot_be_joined(strategy, options, words):
    assert words in refused(lambda: vtoken.patch(subject("llava"), strategy, 0.5, **options))
