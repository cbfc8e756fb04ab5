"""`vtoken demo stream` without a browser: player, desk, terminal, command."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import vtoken
from tests.streaming.common import model_of, processor_of
from vtoken.cli.main import cli
from vtoken.cli.page_visitors import Desks
from vtoken.cli.stream import make_session
from vtoken.cli.stream_page import PLOTS, Desk, build_page
from vtoken.cli.stream_player import COMPUTED, Player, draw_step, passes_by
from vtoken.cli.stream_terminal import recite, show_status
from vtoken.streaming.memory import Step
from vtoken.streams import TowerUse
from vtoken.video import Frame, VideoError, open_video

NAME = "qwen2_5_vl"
SHORT = "synthetic://3?fps=2&frames=9"


@pytest.fixture
def make():
    yield partial(make_session, model_of(NAME), processor_of(NAME))
    vtoken.unpatch(model_of(NAME))


def test_a_player_pushes_every_frame_in_order(make):
    with make("none", 1.0) as session, Player(session, SHORT, fps=2.0, speed=200.0) as player:
        assert not player.wait_until(99, timeout=60)
        assert player.ended and player.error is None
        assert session.stats["frames"] == 9
        # two frames are a step; the ninth waits
        assert [r.seconds for r in player.readings] == [0.5, 1.5, 2.5, 3.5]
        assert all(r.tokens == r.rows and r.saved == 0 and r.latency > 0 for r in player.readings)
        assert player.picture().size == (476, 476)  # 7 x 7 cells


def test_a_paused_player_takes_nothing_and_goes_on(make):
    with make("none", 1.0) as session, Player(session, "synthetic://0", fps=2.0, speed=500.0) as player:
        assert player.wait_until(2.0)
        player.pause()
        seen = threading.Event()
        seen.wait(0.3)
        frames = session.stats["frames"]
        seen.wait(0.3)
        assert session.stats["frames"] <= frames + 1 and not player.playing
        player.resume()
        assert player.wait_until(player.readings[-1].seconds + 3)
    assert player.ended


def test_a_player_tells_of_a_source_that_breaks_off(make):
    def frames():
        yield Frame(np.zeros((56, 56, 3), np.uint8), 0.0, 0)
        raise OSError("the cable is out")

    with make("none", 1.0) as session, Player(session, frames(), fps=2.0) as player:
        player.wait_until(9, timeout=60)
        assert "the cable is out" in player.error


def test_sources_that_pass_by():
    assert passes_by("rtsp://camera/stream") and not passes_by("synthetic://0") and not passes_by(iter([]))
    with pytest.raises(VideoError, match="no such file"):
        passes_by("nowhere.mp4")


def test_kept_cells_are_outlined_and_computed_ones_dotted():
    image = np.full((40, 40, 3), 90, np.uint8)
    step = Step((0.0,), torch.zeros(2, 4), torch.tensor([0, 3]), 4, torch.tensor([0, 3]), (2, 2))
    use = TowerUse([16, 16], [16, 4], [torch.ones(4, 4), torch.zeros(4, 4)])
    use.shares[-1][3, 0] = 1.0
    drawn = np.asarray(draw_step(image, step, use, side=160))
    assert drawn.shape == (160, 160, 3)
    assert (drawn[40, 40] == 90).all() and (drawn[40, 120] > 150).all()  # kept, dropped
    assert tuple(drawn[140, 20]) == COMPUTED and (drawn == COMPUTED).all(-1).sum() < 400  # one dot
    several_crops = Step((0.0,), torch.zeros(2, 4), torch.tensor([0, 3]), 4, torch.tensor([0, 3]), None)
    assert np.array_equal(np.asarray(draw_step(image, several_crops)), image)


def test_the_desk_plays_pauses_answers_and_forgets(make):
    desk = Desk(make, fps=2.0, speed=200.0)
    assert "Play" in next(desk.answer("what is here ?")).answer and desk.status() == "Nothing is playing."
    desk.play(SHORT, "stc_pruner", 0.5)
    player = desk.player
    player.wait_until(99, timeout=60)
    said = list(desk.answer("what is here ?"))
    assert "9 frames" in said[-1].facts and "visual tokens" in said[-1].facts
    assert said[-2].answer.strip() == said[-1].answer and list(desk.talk) == [said[-1]]
    table = desk.table()
    assert list(table.columns) == ["seconds", *PLOTS] and len(table) == 4
    assert table.tokens.max() < player.readings[0].rows
    assert "ended" in desk.status() and "9 frames" in desk.status()
    desk.play(SHORT, "none", 0.5)  # ended: begins anew, with another strategy
    assert desk.player is not player
    desk.close()
    assert desk.session is None and len(desk.table()) == 0 and vtoken.list_strategies(model=model_of(NAME))
    with pytest.raises(VideoError, match="no such file"):
        desk.play("nowhere.mp4", "none", 0.5)
    desk.close()


def test_the_page_has_its_parts(make):
    desks = Desks(lambda: Desk(make))
    page = build_page(desks, ["stc", "none"], examples=["what is here ?"])
    desks.close()
    kinds = [block.get_block_name() for block in page.blocks.values()]
    assert kinds.count("nativeplot") == len(PLOTS) and {"textbox", "timer"} <= set(kinds)
    # they write files, or read Markdown
    assert not {"image", "chatbot", "markdown", "uploadbutton"} & set(kinds)


def test_prepared_questions_see_nothing_later(make):
    out = Console(record=True, width=100)
    with make("none", 1.0) as session, open_video(SHORT) as video:
        answers = recite(out, session, video, [(2.0, "what is here ?"), (1.0, "what is here ?")])
        assert [a.time for a in answers] == [1.0, 2.0]
        assert [len(a.frames_used) for a in answers] == [3, 5]
    with (
        make("none", 1.0) as session,
        open_video(SHORT) as video,
        pytest.raises(ValueError, match="ended at 4 s"),
    ):
        recite(out, session, video, [(9.0, "what is here ?")])
    assert "1 s what is here ?" in out.export_text()


def test_the_status_line(make):
    out = Console(record=True, width=200)
    with make("none", 1.0) as session, Player(session, SHORT, fps=2.0, speed=200.0) as player:
        player.wait_until(99, timeout=60)
        show_status(out, player)
    assert "9 frames" in out.export_text()


def test_the_command_refuses_in_one_sentence():
    said = CliRunner().invoke(cli, ["demo", "stream", "--strategy", "fastv", "--ask", "1", "what ?"])
    assert said.exit_code == 2 and "inside the LLM" in said.output
    helped = CliRunner().invoke(cli, ["demo", "stream", "--help"])
    assert helped.exit_code == 0 and "--terminal" in helped.output


@pytest.mark.parametrize(
    "ask", [("nan", "who ?"), ("inf", "who ?"), ("-1", "who ?"), ("-inf", "who ?"), ("1", ""), ("1", " ")]
)
def test_questions_that_no_frame_answers_are_refused_before_the_work(ask, monkeypatch):
    """The time nan never comes: a stream without end was read for ever."""
    monkeypatch.setattr("vtoken.asking.load", lambda *_: pytest.fail("a model was loaded"))
    said = CliRunner().invoke(cli, ["demo", "stream", "--ask", *ask])
    assert said.exit_code == 2 and "--ask takes a time from 0 on and a question" in said.output


@pytest.mark.parametrize("content", [b"hello\n", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", b"\0" * 500])
def test_a_source_that_is_no_video_ends_the_conversation(tmp_path, content):
    """At once, and not with a prompt after which nothing answers."""
    (tmp_path / "a.mp4").write_bytes(content)
    said = CliRunner().invoke(
        cli, ["demo", "stream", "--terminal", "--source", str(tmp_path / "a.mp4")], input="\n"
    )
    assert said.exit_code == 2 and "a.mp4" in said.output.splitlines()[-1] and "> " not in said.output
