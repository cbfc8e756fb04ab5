"""Wilson intervals, and the board: counts that are measured, tables that say what was measured."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vtoken
from vtoken import tiny
from vtoken.eval.board import Board, Cell, measure, wilson
from vtoken.eval.tiny_board import plan, tiny_board
from vtoken.tiny.evaluate import answers, score
from vtoken.tiny.scenes import KINDS, held_out


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(case):
    right, asked = case
    low, high = wilson(right, asked)
    assert 0 <= low <= right / asked <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert math.isclose(
                (right / asked - bound) ** 2, 1.959963984540054**2 * bound * (1 - bound) / asked, abs_tol=1e-9
            )


def test_wilson_of_a_known_case():
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


@pytest.mark.parametrize("case", [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_what_is_no_share(case):
    with pytest.raises(ValueError, match="right <= asked"):
        wilson(*case)


@pytest.fixture(scope="module")
def loaded():
    return tiny.load("llava")


def test_measure_reads_what_the_report_says(loaded):
    model, processor = loaded
    pairs = held_out(10, seed=3)
    asked, calls = [(q.kind, q.answer) for _, q in pairs], []

    def say(patched, first, last):
        said = answers(patched, processor, pairs[first:last])
        calls.append((last - first, vtoken.report(patched)))
        return said

    cell = measure(model, asked, say, "vtc_cls", 0.25, batch_size=4)
    assert [n for n, _ in calls] == [4, 4, 2] and cell.asked == 10
    assert cell.tokens == sum(r.average_visual_tokens for _, r in calls) / 10 == 36 and cell.tokens_in == 144
    assert cell.flops == pytest.approx(sum(r.flops for _, r in calls) / sum(r.flops_dense for _, r in calls))
    with vtoken.applied(model, "vtc_cls", budget=0.25):
        right = score(pairs, answers(model, processor, pairs, batch_size=10))
    assert cell.accuracy == pytest.approx(right["all"])
    assert {k: r / n for k, (r, n) in cell.kinds.items()} == pytest.approx({k: right[k] for k in KINDS})
    with pytest.raises(ValueError, match="not patched"):
        vtoken.report(model)


def test_the_dense_row_is_the_unpatched_model(loaded):
    model, processor = loaded
    pairs = held_out(10, seed=4)
    plain = answers(model, processor, pairs)
    heard = []
    cell = measure(
        model,
        [(q.kind, q.answer) for _, q in pairs],
        lambda m, a, b: heard.extend(answers(m, processor, pairs[a:b])) or heard[a:b],
        None,
    )
    assert heard == plain and cell.strategy == "dense" and cell.tokens == cell.tokens_in == 144 and cell.flops == 1


def test_wrong_answers_count_as_wrong(loaded):
    model, processor = loaded
    pairs = held_out(5, seed=5)

    def stubborn(m, first, last):
        answers(m, processor, pairs[first:last])
        return ["no idea"] * (last - first)

    cell = measure(model, [(q.kind, q.answer) for _, q in pairs], stubborn, "random", 0.5)
    assert cell.right == 0 and cell.asked == 5 and all(r == 0 and n == 1 for r, n in cell.kinds.values())


def test_budget_one_is_measured_once():
    assert plan(["a", "b"], [1.0, 0.5, 1]) == [(None, 1.0), ("a", 0.5), ("a", 1), ("b", 0.5), ("b", 1)]


def test_board_round_trip_table_and_plot(tmp_path):
    seen = []
    board = tiny_board(["uniform", "hired"], [1.0, 0.5, 16], questions=10, step=lambda what, n: seen.append(n))
    assert sum(seen) == 5 * 10 and len(board.cells) == 5
    paths = board.save(tmp_path / "sub" / "board", "the command")
    assert [p.name for p in paths] == ["board.json", "board.md", "board.png"]
    assert Board.load(paths[0]) == board
    stored = json.loads(paths[0].read_text())["cells"]
    assert stored[0]["interval"] == list(board.cells[0].interval)
    table = paths[1].read_text()
    assert "| *uniform* |" in table and "| hired |" in table and "@ 16.0" in table and "`the command`" in table
    for cell in board.cells:
        assert f"{100 * cell.accuracy:.1f} [" in table
    with Image.open(paths[2]) as plot:
        assert len(plot.convert("RGB").getcolors(maxcolors=1 << 20)) > 20


def test_same_seed_same_board():
    a, b = (tiny_board(["random"], [0.2], questions=10, seed=7) for _ in range(2))
    assert [(c.right, c.kinds, c.tokens) for c in a.cells] == [(c.right, c.kinds, c.tokens) for c in b.cells]


def test_unknown_strategy_is_refused_before_the_work():
    with pytest.raises(ValueError, match="did you mean hired"):
        tiny_board(["hirde"])


def test_cell_share_and_interval():
    cell = Cell("hired", 0.2, False, 28.0, 144.0, 0.2, 45, 50, {"count": (45, 50)}, 1.0)
    assert cell.accuracy == 0.9 and cell.interval == wilson(45, 50)


def test_an_interrupted_board_goes_on_where_it_stopped(monkeypatch):
    partial = []
    whole = tiny_board(["random"], [0.5, 0.2], questions=5, board_done=lambda b: partial.append(len(b.cells)))
    assert partial == [1, 2, 3]
    half = Board(whole.title, whole.settings, whole.cells[:2])
    measured = []
    monkeypatch.setattr("vtoken.eval.tiny_board.measure", lambda *a, **k: measured.append(a[4]) or whole.cells[2])
    assert tiny_board(["random"], [0.5, 0.2], questions=5, known=half) == whole
    assert measured == [0.2]
    other = Board(whole.title, whole.settings | {"weights": "other"}, whole.cells)
    tiny_board(["random"], [0.5, 0.2], questions=5, known=other)
    assert measured == [0.2, 1.0, 0.5, 0.2]


def test_a_budget_that_a_strategy_refuses_is_left_out(tmp_path):
    said = []
    board = tiny_board(["sparsevlm", "uniform"], [0.1], questions=5, refused=said.append)
    assert [c.strategy for c in board.cells] == ["dense", "uniform"]
    assert len(said) == 1 and said[0].startswith("sparsevlm at 0.1: ")
