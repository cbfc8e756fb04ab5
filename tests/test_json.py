"""JSON files of any bytes (config, answer logs, boards, reports): read right or refused in one sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.test_report import cell as bench_cell
from tests.bench.test_report import whole
from tests.test_config import json_values
from vtoken._json import DEEPEST, parse, read
from vtoken.bench import report
from vtoken.config import CONFIG_FILE, VTokenConfig
from vtoken.eval.board.board import Board
from vtoken.eval.harness.patched import patch_arguments
from vtoken.eval.running.answer_log import check_settings
from vtoken.eval.running.answer_log import read as read_records

FUZZ = settings(derandomize=True, deadline=None, database=None, max_examples=40)
ANSWER = {
    "item": "a",
    "answer": "yes",
    **dict.fromkeys(("tokens", "tokens_in", "flops", "flops_dense", "ttft", "seconds"), 1.0),
}
CELL = {
    "strategy": "hired",
    "budget": 0.2,
    "baseline": False,
    "tokens": 1.0,
    "tokens_in": 2,
    "flops": 0.5,
    "right": 1,
}
CELL |= {"asked": 2, "kinds": {"colour": [1, 2]}, "seconds": 0.1}
BOARD = {"title": "t", "settings": {}, "cells": [CELL]}

BROKEN = {
    "nested 100,000 levels": b"[" * 100_000 + b"]" * 100_000,
    "objects in objects": b'{"strategy":' * 100_000,
    "an option in 101 levels": b'{"strategy": "hired", "options": {"a": ' + b"[" * 101 + b"]" * 101 + b"}}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a word": b'"hired"',
    "nothing": b"",
    "cut short": b'{"strategy": "hired", "bud',
    "two values": b'{"strategy": "hired"} {}',
    "NaN": b'{"strategy": "hired", "budget": NaN}',
    "infinity in an option": b'{"strategy": "hired", "options": {"a": -Infinity}}',
    "a number above all": b'{"strategy": "hired", "options": {"a": 1e999}}',
    "5,000 digits": b'{"strategy": "hired", "budget": ' + b"9" * 5000 + b"}",
    "the same key twice": b'{"strategy": "hired", "budget": 0.1, "budget": 0.9}',
    "the same option twice": b'{"strategy": "hired", "options": {"alpha": 0.1, "alpha": 0.9}}',
    "no UTF-8": b'{"strategy": "hired\xff"}',
    "UTF-16": '{"strategy": "hired"}'.encode("utf-16"),
    "zeros": bytes(64),
}
SHAPES = {
    "strategy is a number": {"strategy": 3},
    "strategy is null": {"strategy": None},
    "strategy is an object": {"strategy": {"name": "hired"}},
    "a list of numbers": {"strategy": [1, 2]},
    "budget is a word": {"strategy": "hired", "budget": "0.2"},
    "budget is a boolean": {"strategy": "hired", "budget": True},
    "budget is a list": {"strategy": "hired", "budget": [0.2]},
    "positions unknown": {"strategy": "hired", "positions": "shuffled"},
    "positions is a number": {"strategy": "hired", "positions": 1},
    "options is a list": {"strategy": "hired", "options": [1]},
    "options is null": {"strategy": "hired", "options": None},
    "version is a word": {"strategy": "hired", "version": "1"},
    "version is a bool": {"strategy": "hired", "version": True},
    "version 0": {"strategy": "hired", "version": 0},
    "budget among the options": {"strategy": "hired", "budget": 0.2, "options": {"budget": 0.9}},
    "unit unknown": {"strategy": "hired", "budget": 1, "budget_unit": "percent"},
    "half a token": {"strategy": "hired", "budget": 0.5, "budget_unit": "tokens"},
    "128 wholes": {"strategy": "hired", "budget": 128, "budget_unit": "share"},
}


def refused(make):
    with pytest.raises(ValueError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500, text
    return text


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_that_is_none(case, tmp_path):
    (tmp_path / CONFIG_FILE).write_bytes(BROKEN[case])
    refused(lambda: VTokenConfig.from_pretrained(tmp_path))
    refused(lambda: VTokenConfig.from_pretrained(tmp_path / CONFIG_FILE))


@pytest.mark.parametrize("case", SHAPES)
def test_a_config_of_another_shape(case, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(SHAPES[case]))
    refused(lambda: VTokenConfig.from_pretrained(tmp_path))


def test_a_config_too_large_and_a_folder_of_its_name(tmp_path):
    (tmp_path / CONFIG_FILE).write_bytes(b'{"strategy": "hired", "options": {"a": "' + b"x" * 2**20 + b'"}}')
    assert "1048576 bytes" in refused(lambda: VTokenConfig.from_pretrained(tmp_path))
    (tmp_path / "sub" / CONFIG_FILE).mkdir(parents=True)
    assert "folder" in refused(lambda: VTokenConfig.from_pretrained(tmp_path / "sub"))


def test_many_unknown_keys_are_one_short_warning(tmp_path):
    written = {"strategy": "hired"} | {f"key {i}\n": i for i in range(10_000)}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="unknown config key") as caught:
        VTokenConfig.from_pretrained(tmp_path)
    assert len(caught) == 1 and len(str(caught[0].message)) < 500 and "\n" not in str(caught[0].message)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / CONFIG_FILE).write_text('{"strategy": "hired"}', encoding="utf-8-sig")
    assert VTokenConfig.from_pretrained(tmp_path) == VTokenConfig("hired")


def test_depth_does_not_depend_on_the_stack():
    deep = json.dumps({"a": json.loads("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))})
    assert parse(deep)

    def lower(levels):
        return parse(deep) if levels == 0 else lower(levels - 1)

    assert lower(200) == parse(deep)
    with pytest.raises(ValueError, match="100 levels"):
        parse(f"[{deep}]")


def test_options_too_deep_in_memory():
    inner: list = []
    for _ in range(5000):
        inner = [inner]
    assert "100 levels" in refused(lambda: VTokenConfig("hired", options={"a": inner}))
    loop: dict = {}
    loop["a"] = loop
    assert "100 levels" in refused(lambda: VTokenConfig("hired", options=loop))


# -- a share of 1.0 and one token ----------------------------------------------------------------------------
def through_one_kind_of_number(text):
    """As JavaScript and others write it again: 1.0 is 1."""
    return json.dumps(
        json.loads(text, parse_float=lambda x: int(float(x)) if float(x).is_integer() else float(x))
    )


@pytest.mark.parametrize("budget", [1.0, 1, 128, 0.25])
def test_a_budget_survives_programs_that_know_one_kind_of_number(budget, tmp_path):
    VTokenConfig("hired", budget).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(through_one_kind_of_number(path.read_text()))
    loaded = VTokenConfig.from_pretrained(tmp_path)
    assert loaded == VTokenConfig("hired", budget) and type(loaded.budget) is type(budget)
    path.write_text(path.read_text().replace(f'"budget": {loaded.budget}', f'"budget": {float(budget)}'))
    assert type(VTokenConfig.from_pretrained(tmp_path).budget) is type(budget)


@pytest.mark.parametrize("budget", [1.0, 1, 128, 0.25])
def test_a_budget_survives_yaml(budget):
    yaml = pytest.importorskip("yaml")
    config = VTokenConfig("hired", budget, options={"alpha": 0.4})
    for text in (yaml.safe_dump(config.to_dict()), json.dumps(config.to_dict(), indent=2)):
        loaded = VTokenConfig.from_dict(yaml.safe_load(text))
        assert loaded == config and type(loaded.budget) is type(budget)


def test_files_without_a_unit_keep_their_meaning():
    assert type(VTokenConfig.from_dict({"strategy": "hired", "budget": 1}).budget) is int
    assert type(VTokenConfig.from_dict({"strategy": "hired", "budget": 1.0}).budget) is float


def test_an_assigned_value_is_not_saved(tmp_path):
    config = VTokenConfig("hired")
    config.budget = "0.2"  # type: ignore[assignment]
    refused(lambda: config.save_pretrained(tmp_path))
    assert not (tmp_path / CONFIG_FILE).exists()


# -- the files of evaluations and of the benchmark -----------------------------------------------------------
@pytest.mark.parametrize("case", BROKEN)
def test_boards_and_reports_that_are_none(case, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(BROKEN[case])
    assert "a.json" in refused(lambda: Board.load(path))
    assert "a.json" in refused(lambda: report.load(path))
    (tmp_path / "settings.json").write_bytes(BROKEN[case])
    if not BROKEN[case].startswith(b'{"strategy": "hired", "options": {"a": [') and isinstance(
        BROKEN[case], bytes
    ):
        assert refused(lambda: check_settings(tmp_path, {"model": "x"}, True))


@pytest.mark.parametrize(
    ("key", "value"),
    [("strategy", 3), ("budget", "0.2"), ("budget", 0), ("tokens", None), ("asked", 0), ("right", 3), ("kinds", []),
     ("kinds", {"a": [1]}), ("kinds", {"a": [1, 2.5]}), ("baseline", "no"), ("flops", "nan"), ("right", True)],
)  # fmt: skip
def test_a_cell_of_another_shape(key, value, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(BOARD))
    assert Board.load(path).cells[0].kinds == {"colour": (1, 2)}
    for cells in ([CELL | {key: value}], [{k: v for k, v in CELL.items() if k != key}]):
        path.write_text(json.dumps(BOARD | {"cells": cells}))
        assert "is no board" in refused(lambda: Board.load(path))


@pytest.mark.parametrize(
    "board", [BOARD | {"cells": {}}, BOARD | {"cells": [3]}, BOARD | {"title": None}, {"cells": [CELL]}]
)
def test_a_board_of_another_shape(board, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(board))
    assert "is no board" in refused(lambda: Board.load(tmp_path / "a.json"))


@pytest.mark.parametrize(
    "other",
    [
        {"machine": {}},
        {"machine": [], "shapes": {}},
        {"shapes": []},
        {"shapes": {"s": 3}},
        {"shapes": {"s": {"scale": "cpu"}}},
        {"shapes": {"s": {"scale": "cpu", "cells": [{"strategy": "hired", "budget": 0.2}]}}},
        {"shapes": {"s": {"scale": "cpu", "cells": [bench_cell(measured={"llm": 2.0, "prefill": 2.0})]}}},
        {"shapes": {"s": {"scale": "cpu", "cells": [bench_cell(budget=None)]}}},
    ],
)
def test_a_report_of_another_shape(other, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(whole(bench_cell()) | other))
    assert "is no report" in refused(lambda: report.load(tmp_path / "a.json"))


LINES = [*BROKEN.values(), b'{"item": 3}', b'{"item": ["a"], "answer": "yes"}', b'{"item": "a"}']
LINES += [
    json.dumps(ANSWER | wrong).encode()
    for wrong in (dict(answer=3), dict(ttft=None), dict(flops="1"), dict(error=3))
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_of_an_answer_log_that_is_no_record(line, tmp_path):
    path = tmp_path / "run.0.jsonl"
    path.write_bytes(json.dumps(ANSWER).encode() + b"\n")
    assert read_records(tmp_path, "run", ["a"]) == {"a": ANSWER}
    path.write_bytes(line.replace(b"\n", b" ") + b"\n")
    assert "Line 1 of" in refused(lambda: read_records(tmp_path, "run", ["a"]))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1, "a": 2}', "[NaN]"])
def test_an_argument_of_a_harness(text):
    refused(lambda: patch_arguments({"strategy": "hired", "alpha": text}))


# -- any bytes, any values -----------------------------------------------------------------------------------
@FUZZ
@given(st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_are_a_value_or_one_sentence(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    for load in (read, Board.load, report.load, VTokenConfig.from_pretrained):
        try:
            value = load(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).endswith(".")
        else:
            assert load is not read or value == json.loads(data)


@FUZZ
@given(
    st.fixed_dictionaries(
        {"strategy": st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=2) | json_values},
        optional=dict.fromkeys(("budget", "positions", "options", "version", "budget_unit"), json_values),
    )
)
def test_any_values_are_a_config_that_round_trips_or_one_sentence(values):
    try:
        config = VTokenConfig.from_dict(values)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
        return
    assert VTokenConfig.from_dict(config.to_dict()) == config
    assert config.budget == values.get("budget", 0.2) and config.options == values.get("options", {})


def test_a_key_that_is_there_twice_among_many_is_found_at_once():
    """Each key is looked at once: as many looks as pairs of keys would take hours here."""
    text = "{" + ",".join(f'"{i}":0' for i in range(300_000)) + ',"299999":0}'
    with pytest.raises(ValueError, match="the key '299999' is there twice"):
        parse(text)
