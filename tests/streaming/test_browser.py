"""The page of `vtoken demo stream` in a headless Chromium: play, pause, ask, read the right answer.

    pip install playwright && apt install chromium && pytest -m browser tests/streaming/test_browser.py
"""

from __future__ import annotations

import shutil
from functools import partial

import pytest

from vtoken import tiny
from vtoken.streaming.command import TINY, make_session
from vtoken.streaming.page import Desk, build_page
from vtoken.tiny.clips import stream

pytestmark = pytest.mark.browser
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-quic"]
SEED = 0


@pytest.fixture(scope="module")
def desk():
    model, processor = tiny.load(TINY)
    desk = Desk(partial(make_session, model, processor), fps=2.0)
    yield desk
    desk.close()


@pytest.fixture(scope="module")
def address(desk):
    page = build_page(desk, ["stc", "none"], f"synthetic://{SEED}")
    yield page.launch(prevent_thread_lock=True, quiet=True, inbrowser=False, server_name="127.0.0.1")[1]
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


def test_play_ask_and_see_the_right_answer(desk, address, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1400, "height": 1250})
    page.goto(address)
    page.locator("#play").click()
    labels = stream(SEED)
    page.wait_for_function("document.querySelector('#status').innerText.includes('visual tokens in memory')", timeout=60_000)
    assert desk.player.wait_until(3.0)
    while True:  # until it stands still with a digit on screen
        page.locator("#pause").click()
        page.wait_for_function("document.querySelector('#status').innerText.includes('paused')", timeout=60_000)
        now = desk.session.stats["last"]
        right = {q.text: q.answer for q in labels.questions_at(now) if q.kind == "now"}
        if right["which digit is shown now?"] != "none":
            break
        page.locator("#play").click()
        assert desk.player.wait_until(now + 0.5) and now < 60
    page.locator("#question textarea").fill("which digit is shown now?")
    page.locator("#ask").click()
    page.wait_for_function("document.querySelector('#chat').innerText.includes('visual tokens')", timeout=60_000)
    said = page.locator("#chat .bot.message").last.inner_text()
    page.screenshot(path=tmp_path / "asked.png")
    assert said.split()[0] == right["which digit is shown now?"], (said, right)
    assert page.locator("#frame img").count() == 1
    assert "visual tokens in memory" in page.locator("#status").inner_text()
    page.locator("#play").click()  # goes on
    assert desk.player.wait_until(now + 2.0)


def test_a_source_that_is_not_there_is_said_on_the_page(address, browser):
    page = browser.new_page()
    page.goto(address)
    page.locator("#source textarea, #source input").first.fill("nowhere.mp4")
    page.locator("#play").click()
    page.get_by_text("no such file").first.wait_for(timeout=60_000)
