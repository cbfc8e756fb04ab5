"""Wilson intervals, and the board: measured counts and their tables."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vtoken
from vtoken import tiny
from vtoken.cli import board as tiny_command
from vtoken.eval.board import page as board_page
from vtoken.eval.board.board import Batch, Board, Cell, measure, wilson
from vtoken.eval.board.tiny import plan, subjects, tiny_board
from vtoken.eval.board.tower_memo import TowerMemo
from vtoken.tiny.questions import answers, held_out, prepare, score
from vtoken.tiny.scenes import KINDS, Question


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
def subject():
    return subjects("llava", questions=10, seed=3, batch_size=4)[0]


def test_subjects_are_prepared_as_the_model_is_measured(subject):
    model, processor = tiny.load("llava")
    pairs = held_out("llava", 10, 3)
    assert (subject.stem, subject.medium) == ("llava", "image") and [
        len(b.asked) for b in subject.batches
    ] == [4, 4, 2]
    assert [a for b in subject.batches for a in b.asked] == [(q.kind, q.answer) for _, q in pairs]
    assert [text for b in subject.batches for text in b.say(subject.model)] == answers(
        model, processor, pairs
    )


def test_a_shared_tower_changes_no_answer():
    model, processor = tiny.load("llava")
    pairs = held_out("llava", 4, 8)
    inputs = [prepare(processor, pairs[:2]), prepare(processor, pairs[2:])]
    memo, spared = TowerMemo(model), []

    def logits(i):
        with torch.no_grad():
            return model(**inputs[i]).logits

    assert len(memo.layers) == 1 + model.config.vision_config.num_hidden_layers  # the patch embedding
    for strategy in ("uniform", "hired", "mustdrop", "visionzip", "hired"):
        with vtoken.applied(model, strategy, budget=0.5):
            plain, before = [logits(i) for i in (0, 1)], memo.spared
            for i in (0, 1):
                with memo.reading(i):
                    assert torch.equal(logits(i), plain[i]), strategy
            spared.append((memo.spared - before) // 2)
    layers = len(memo.layers)
    assert spared[0] == 0 and layers - 2 <= spared[4] < layers and spared[2] <= 2, spared
    assert not any("forward" in layer.__dict__ for layer in memo.layers)
    memo.known[0, 2][1].add_(0)  # written to in place: no longer to be trusted
    with vtoken.applied(model, "uniform", budget=0.5), memo.reading(0):
        before = memo.spared
        logits(0)
    assert memo.spared == before + layers - 2


def test_media_are_asked_about_apart(monkeypatch):
    clips = [SimpleNamespace(media=[0] * n) for n in (6, 8, 6)]
    pairs = [(example, Question("who?", "me", "k")) for example in (SimpleNamespace(media=1), *clips)]
    monkeypatch.setattr("vtoken.tiny.questions.held_out", lambda *a: pairs)
    monkeypatch.setattr(
        "vtoken.eval.board.tiny._batch", lambda p, some, *memo: Batch([q[0].media for q in some], len)
    )
    images, videos = subjects("llava", 4)
    assert (images.stem, videos.stem) == ("llava_image", "llava_video")
    assert [b.asked for b in images.batches] == [[1]]
    assert [b.asked for b in videos.batches] == [[[0] * 6, [0] * 6], [[0] * 8]]
    monkeypatch.setattr(vtoken, "list_strategies", lambda: ["mustdrop", "stc_cacher", "uniform", "vidcom2"])
    assert images.fitting() == ["mustdrop", "uniform"]  # the tiny LLaVA reads no clips
    monkeypatch.setattr(
        "vtoken.eval.board.tiny.refusal", lambda model, name, budget: "no" * (name == "mustdrop")
    )
    assert images.fitting() == ["uniform"] and videos.fitting() == ["stc_cacher", "uniform", "vidcom2"]


def test_measure_reads_what_the_report_says(subject):
    calls = []

    def spied(batch):
        def say(model):
            said = batch.say(model)
            calls.append(vtoken.report(model))
            return said

        return Batch(batch.asked, say)

    cell = measure(subject.model, [spied(b) for b in subject.batches], "vtc_cls", 0.25)
    assert len(calls) == 3 and cell.asked == 10 and cell.seconds > 0
    assert cell.tokens == sum(r.average_visual_tokens * r.prompts for r in calls) / 10 == 36
    assert cell.tokens_in == 144
    assert cell.flops == pytest.approx(sum(r.flops for r in calls) / sum(r.flops_dense for r in calls))
    pairs = held_out("llava", 10, 3)
    with vtoken.applied(subject.model, "vtc_cls", budget=0.25):
        right = score(pairs, answers(subject.model, tiny.load("llava")[1], pairs))
    assert cell.accuracy == pytest.approx(right["all"])
    assert {k: r / n for k, (r, n) in cell.kinds.items()} == pytest.approx({k: right[k] for k in KINDS})
    with pytest.raises(ValueError, match="not patched"):
        vtoken.report(subject.model)


def test_the_dense_row_is_the_unpatched_model(subject):
    plain = [b.say(subject.model) for b in subject.batches]
    heard = []
    batches = [Batch(b.asked, lambda m, b=b: heard.append(b.say(m)) or heard[-1]) for b in subject.batches]
    cell = measure(subject.model, batches, None)
    assert (
        heard == plain
        and cell.strategy == "dense"
        and cell.tokens == cell.tokens_in == 144
        and cell.flops == 1
    )


def test_wrong_answers_count_as_wrong(subject):
    batches = [Batch(b.asked, lambda m, b=b: ["no idea"] * len(b.say(m))) for b in subject.batches]
    cell = measure(subject.model, batches, "random", 0.5)
    assert cell.right == 0 and cell.asked == 10 and all(r == 0 and n == 2 for r, n in cell.kinds.values())


def test_budget_one_is_measured_once():
    assert plan(["a", "b"], [1.0, 0.5, 1]) == [(None, 1.0), ("a", 0.5), ("a", 1), ("b", 0.5), ("b", 1)]


def test_one_token_and_all_tokens_are_two_budgets(tmp_path):
    hired = [cell("hired", 1, 1, 20), cell("hired", 1.0, 100, 98), cell("hired", 0.5, 50, 70)]
    cells = [cell("dense", 1.0, 100, 99, True), *hired]
    board = Board("t", {}, cells)
    board.save(tmp_path / "a.json")
    # a program that knows one kind of number writes 1.0 as 1
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("1.0", "1"))
    for one in (board, Board.load(tmp_path / "a.json")):
        assert len(one.at) == 4 and [repr(b) for b in one.budgets] == ["1", "1.0", "0.5"]
        head, _, row = board_page.accuracy(one)
        assert [e.strip() for e in head.strip("| ").split("|")] == [
            "strategy",
            "budget 1",
            "budget 1.0",
            "budget 0.5",
        ]
        assert [e.split()[0] for e in row.strip("| ").split("|")] == ["hired", "20.0", "98.0", "70.0"]
    # a board that was written before cells said their unit
    text = (
        (tmp_path / "a.json")
        .read_text()
        .replace('"budget_unit":"share",', "")
        .replace('"budget_unit":"tokens",', "")
    )
    (tmp_path / "a.json").write_text(text)
    assert [type(c.budget) for c in Board.load(tmp_path / "a.json").cells] == [int, int, int, float]


def test_what_is_named_twice_is_measured_once():
    assert plan(["a", "a"], [0.5, 0.5, 1]) == [(None, 1.0), ("a", 0.5), ("a", 1)]


def test_same_seed_same_board(subject):
    a, b = (tiny_board(subject, ["random"], [0.2], seed=3) for _ in range(2))
    assert [(c.right, c.kinds, c.tokens) for c in a.cells] == [(c.right, c.kinds, c.tokens) for c in b.cells]
    assert a.settings["questions"] == 10 and a.settings["seed"] == 3


def test_unknown_strategy_is_refused_before_the_work(subject):
    with pytest.raises(ValueError, match="did you mean hired"):
        tiny_board(subject, ["hirde"])


def test_cell_share_and_interval():
    cell = Cell("hired", 0.2, False, 28.0, 144.0, 0.2, 45, 50, {"count": (45, 50)}, 1.0)
    assert cell.accuracy == 0.9 and cell.interval == wilson(45, 50)


def test_an_interrupted_board_goes_on_where_it_stopped(subject, monkeypatch):
    partial = []
    whole = tiny_board(subject, ["random"], [0.5, 0.2], cell_done=lambda b, c: partial.append(len(b.cells)))
    assert partial == [1, 2, 3]
    half = Board(whole.title, whole.settings, whole.cells[:2])
    measured = []
    monkeypatch.setattr(
        "vtoken.eval.board.tiny.measure", lambda *a, **k: measured.append(a[3]) or whole.cells[2]
    )
    assert tiny_board(subject, ["random"], [0.5, 0.2], known=half) == whole
    assert measured == [0.2]
    kept = []
    gap = Board(whole.title, whole.settings, [whole.cells[0], whole.cells[2]])
    tiny_board(subject, ["random"], [0.5, 0.2], known=gap, cell_done=lambda b, c: kept.append(list(b.cells)))
    assert measured.pop() == 0.5 and len(kept[0]) == 3  # cells behind the gap are not lost
    other = Board(whole.title, whole.settings | {"weights": "other"}, whole.cells)
    tiny_board(subject, ["random"], [0.5, 0.2], known=other)
    assert measured == [0.2, 1.0, 0.5, 0.2]


def test_a_budget_that_a_strategy_refuses_is_left_out(subject, monkeypatch):
    said = []
    board = tiny_board(subject, ["sparsevlm", "uniform"], [0.1], refused=said.append)
    assert [c.strategy for c in board.cells] == ["dense", "uniform"]
    assert len(said) == 1 and said[0].startswith("sparsevlm at 0.1: ")

    def refuses(model, batches, strategy, *rest):
        raise ValueError(f"no {strategy}")

    monkeypatch.setattr("vtoken.eval.board.tiny.measure", refuses)
    assert not tiny_board(subject, ["uniform"], [0.1], refused=said.append).cells
    assert said[1:] == ["all visual tokens: no None", "uniform at 0.1: no uniform"]


def cell(strategy, budget, tokens, right, baseline=False, asked=100):
    kinds = {"count": (right, asked)}
    return Cell(strategy, budget, baseline, tokens, 100.0, tokens / 100, right, asked, kinds, 1.0)


def test_below_random_is_judged_at_equal_tokens():
    cells = [
        cell("dense", 1.0, 100, 100, True),
        cell("random", 0.5, 50, 80, True),
        cell("random", 0.1, 10, 40, True),
    ]
    board = Board("t", {}, cells)
    assert (
        board.chance(50) == 0.8
        and board.chance(75) == pytest.approx(0.9)
        and board.chance(30) == pytest.approx(0.6)
    )
    assert board.chance(9) is None and Board("t", {}, cells[:1]).chance(100) is None
    low, fine, out = cell("low", 0.5, 75, 80), cell("fine", 0.5, 75, 86), cell("out", 0.1, 5, 0)
    pool = cell("pool", 0.5, 75, 10, baseline=True)
    board.cells += [low, fine, out, pool]
    assert board.below_random() == [(low, pytest.approx(0.9))]
    assert board_page.low(board) == [
        "Below *random* at equal tokens, whole interval: low at 0.5 (80.0 with 75.0 tokens, random 90.0)."
    ]


def test_page_round_trip(tmp_path):
    page = tmp_path / "sub" / "board.md"
    run = [
        "--strategies",
        "uniform,hired",
        "--questions",
        "10",
        "--budgets",
        "0.5,0.2",
        "--output",
        str(page),
    ]
    for again in ([], ["--resume"]):
        ran = CliRunner().invoke(tiny_command.tiny, [*run, *again], catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
        text = page.read_text()
        page.write_text(text.replace("# The board", "# The board\n\nProse in front.") + "Prose behind.\n")
    board = Board.load(tmp_path / "sub" / "board" / "llava.json")
    assert len(board.cells) == 5 and len({c.seconds for c in board.cells}) > 1
    text = page.read_text()
    assert (
        text.count("Prose in front.") == 2
        and text.count("Prose behind.") == 2
        and text.count("### Tiny llava") == 1
    )
    assert (
        "`vtoken eval tiny --model llava --strategies uniform,hired --budgets 0.5,0.2 --questions 10 --seed 0`"
        in text
    )
    assert "| *uniform* |" in text and "| hired |" in text
    for one in board.cells:
        assert f"{100 * one.accuracy:.1f} [" in text and f"@ {one.tokens:.1f}" in text
    with Image.open(tmp_path / "sub" / "board" / "llava.png") as plot:
        assert len(plot.convert("RGB").getcolors(maxcolors=1 << 20)) > 20
    page.write_text(board_page.BEGIN)
    with pytest.raises(ValueError, match="one of the marks"):
        board_page.write(page, [], "", [])


def test_unknown_models_are_refused_with_the_list():
    ran = CliRunner().invoke(tiny_command.tiny, ["--model", "lava"])
    assert ran.exit_code == 2 and "the shipped models are" in ran.output and "llava" in ran.output
