"""The page of `vtoken demo stream` in a headless Chromium: play, pause, ask, read the right answer.

pip install playwright && apt install chromium && pytest -m browser tests/cli/test_stream_browser.py
"""

from __future__ import annotations

import threading

import pytest

from tests.cli.browser import opened
from vtoken import tiny
from vtoken.cli.page_server import Service, listen, private_folder
from vtoken.cli.page_visitors import Desks
from vtoken.cli.stream import EXAMPLES, TINY, TINY_STEPS, make_session
from vtoken.cli.stream_page import CSS, build_page
from vtoken.cli.stream_visitors import Desk
from vtoken.tiny.clips import stream

pytestmark = pytest.mark.browser
SEED = 0


@pytest.fixture(scope="module")
def desks():
    def make(strategy, budget):
        return make_session(*tiny.load(TINY), strategy, budget, max_steps=TINY_STEPS)

    desks = Desks(lambda: Desk(make, fps=2.0), most=3)
    yield desks
    desks.close()


@pytest.fixture(scope="module")
def address(desks):
    with listen("127.0.0.1") as listening, private_folder() as folder:
        page = build_page(
            desks, ["stc_pruner", "none"], f"synthetic://{SEED}", allow_sources=True, examples=EXAMPLES
        )
        service = Service(page, listening, uploads=folder, max_upload=2**20, css=CSS)
        service.start()
        yield service.url
        service.stop()


def test_play_ask_and_see_the_right_answer(desks, address, browser, tmp_path):
    page, foreign = opened(browser, address, "#play", viewport={"width": 1400, "height": 1250})
    page.locator("#play").click()
    labels = stream(SEED)
    page.wait_for_function(
        "document.querySelector('#status').innerText.includes('visual tokens in memory')", timeout=60_000
    )
    (desk,) = desks._desks.values()
    assert desk.player.wait_until(3.0)
    while True:  # until it stands still with a digit on screen
        page.locator("#pause").click()
        page.wait_for_function(
            "document.querySelector('#status').innerText.includes('paused')", timeout=60_000
        )
        now = desk.session.stats["last"]
        right = {q.text: q.answer for q in labels.questions_at(now) if q.kind == "now"}
        if right["which digit is shown now?"] != "none":
            break
        page.locator("#play").click()
        assert desk.player.wait_until(now + 0.5) and now < 60
    page.get_by_role("button", name="which digit is shown now?").click()
    page.wait_for_function(
        "document.querySelector('#chat').innerText.includes('without pruning')", timeout=60_000
    )
    said = page.locator("#chat .bot.message").last.inner_text()
    page.screenshot(path=tmp_path / "asked.png")
    assert said.split()[0] == right["which digit is shown now?"], (said, right)
    assert f"shown: {right['which digit is shown now?']}" in said
    assert page.locator("#frame img").count() == 1
    assert "visual tokens in memory" in page.locator("#status").inner_text()
    page.locator("#play").click()  # goes on
    assert desk.player.wait_until(now + 2.0)

    hostile = "{{1+1}} ${2+2} ![x](http://evil.example/x.png) <img src=http://evil.example/y.png>"
    page.locator("#question textarea, #question input").first.fill(hostile)
    page.locator("#ask").click()
    page.get_by_text(hostile).wait_for(timeout=60_000)
    assert page.locator("#chat img").count() == 0 and foreign == []
    other, _ = opened(browser, address, "#play")
    other.wait_for_timeout(1500)
    assert (
        other.locator("#frame img").count() == 0
        and "Nothing is playing" in other.locator("#status").inner_text()
    )
    assert hostile not in other.content()
    page.context.close()
    other.context.close()
    for _ in range(600):
        if not len(desks):
            return
        threading.Event().wait(0.1)
    raise AssertionError("the stream plays on for nobody")


def test_play_is_in_the_first_screen_of_a_phone(address, browser, tmp_path):
    page, _ = opened(browser, address, "#play", viewport={"width": 390, "height": 844})
    page.screenshot(path=tmp_path / "phone.png")
    box = page.locator("#play").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 844 and box["x"] + box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.context.close()


def test_a_source_that_is_not_there_is_said_on_the_page(address, browser):
    page, _ = opened(browser, address, "#play")
    page.locator("#source textarea, #source input").first.fill("nowhere.mp4")
    page.locator("#play").click()
    page.get_by_text("no such file").first.wait_for(timeout=60_000)
    page.context.close()
