"""The files of the Hugging Face Space: its page is built without being served, and shows the boards."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from vtoken.cli.page_visitors import Desks
from vtoken.cli.stream import SESSIONS
from vtoken.cli.stream_visitors import Desk

gr = pytest.importorskip("gradio")
SPACE = Path(__file__).parents[2] / "spaces"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_header_says_what_runs():
    _, header, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    told = yaml.safe_load(header)
    assert (
        told["sdk"] == "gradio" and (SPACE / told["app_file"]).is_file() and told["license"] == "apache-2.0"
    )
    assert gr.__version__.split(".")[0] == told["sdk_version"].split(".")[0]
    assert len(told["short_description"]) <= 60  # the Hub refuses more
    assert (SPACE / "requirements.txt").read_text().startswith("vtoken[stream]") and text.strip()


def test_the_page_is_built_with_the_boards_below_the_stream(app):
    desks = Desks(lambda: Desk(app.session), SESSIONS)
    try:
        blocks = app.build(desks)
    finally:
        desks.close()
    kinds = {block["props"].get("elem_id"): block["type"] for block in blocks.get_config_file()["components"]}
    assert {"play", "frame", "question", "board"} <= set(kinds) and kinds["board"] == "markdown"
    assert "uploadbutton" not in kinds.values()  # visitors bring no files
    assert {"play", "look", "ask", "leave"} <= {fn.name for fn in blocks.fns.values()}


def test_the_boards_are_those_of_the_documentation(app):
    shown = app.leaderboard()
    assert (
        "| farcover |" in shown
        and "### Mean rank at equal tokens" in shown
        and "Made by `vtoken eval" in shown
    )
    assert "![" not in shown and "<!--" not in shown  # plots lie in the repository only


def test_a_visitor_gets_a_session_that_answers(app):
    with app.session("stc_pruner", 0.5) as session:
        assert session.stats["frames"] == 0


def test_the_boards_lie_beside_the_app_in_a_space(app, tmp_path, monkeypatch):
    (tmp_path / "board.md").write_text(
        "<!-- summary: made by the command below -->\nours\n<!-- summary: end -->\n"
    )
    monkeypatch.setattr(app, "PAGES", (tmp_path / "board.md", *app.PAGES[1:]))
    assert app.leaderboard().startswith("ours\n")
