"""The page of `vtoken demo explore` in a headless Chromium: strategies, the budget, clips, a phone.

pip install playwright && apt install chromium && pytest -m browser tests/cli/test_explore_browser.py
"""

from __future__ import annotations

import pytest
from PIL import Image

from tests.cli.browser import opened
from tests.cli.exploring import explorer, served
from vtoken.asking import TINY_KNOWS

pytestmark = pytest.mark.browser
READY = "#panel-b .said"
# moves a slider step by step, a few milliseconds apart
DRAGGED = """async (slider, values) => {
  for (const value of values) {
    slider.value = value;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    await new Promise(done => setTimeout(done, 5));
  }
}"""
HOSTILE = "{{1+1}} <img src=http://evil.example/y.png> ![x](http://evil.example/x.png)"


@pytest.fixture(scope="module")
def made():
    return explorer()


@pytest.fixture(scope="module")
def address(made):
    with served(made, 2**20) as service:
        yield service.url


def reads(page, panel: str, words: str) -> None:
    """Wait until a panel says so."""
    script = "([id, words]) => document.querySelector(id).innerText.includes(words)"
    page.wait_for_function(script, arg=[f"#panel-{panel}", words], timeout=60_000)


def choose(page, field: str, option: str) -> None:
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_strategies_and_the_budget_change_what_is_read(made, address, browser, monkeypatch):
    page, foreign = opened(browser, address, READY, viewport={"width": 1280, "height": 900})
    for panel, words in (("all", "100 of 100"), ("a", "20 of 100"), ("b", "60 of 100")):
        reads(page, panel, words)
    choose(page, "second", "pyramiddrop")
    reads(page, "b", "pyramiddrop")
    reads(page, "b", "20 of 100")
    asked = []
    page.on("request", lambda r: asked.append(r.post_data) if "queue/join" in r.url else None)
    page.wait_for_timeout(1500)
    seen = len(asked)
    page.wait_for_timeout(1500)
    assert len(asked) == seen  # nothing goes on by itself
    budgets, outcome = set(), made.outcome
    monkeypatch.setattr(made, "outcome", lambda *a: budgets.add(a[3]) or outcome(*a))
    slider = page.locator("#budget input[type=range]")
    slider.evaluate(DRAGGED, [0.21 + i / 100 for i in range(30)])
    reads(page, "a", "50 of 100")
    assert budgets == {0.5}  # not one call for each step
    slider.focus()
    page.keyboard.press("ArrowRight")
    reads(page, "a", "51 of 100")
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 20, box["y"] + box["height"] / 2, steps=20)
    page.mouse.up()
    reads(page, "a", "100 of 100")
    assert page.locator("#panel-a img").get_attribute("alt").endswith("enter the language model")
    page.get_by_label("number input for budget").fill("0.05")
    reads(page, "a", "5 of 100")
    choose(page, "second", "sparsevlm")
    reads(page, "b", "choose more")  # a refusal, in place of the picture
    assert page.locator("#panel-b img").count() == 0 and page.locator("#panel-a img").count() == 1
    page.locator("#question input, #question textarea").first.fill(HOSTILE)
    page.keyboard.press("Enter")
    page.wait_for_timeout(1500)
    assert page.locator("#panel-a img").count() == 1 and foreign == []
    page.context.close()


def test_a_typed_name_is_in_its_box_and_on_its_card(address, browser):
    page, foreign = opened(browser, address, READY, viewport={"width": 1280, "height": 900})
    box = page.locator("#first input")
    for typed, words in (
        ("visionzip+fastv", "20 of 100"),
        ("tempme", "defined for plain encoders"),
        (HOSTILE, "Unknown strategy"),
    ):
        box.fill(typed)
        box.press("Enter")
        reads(page, "a", words)
        assert box.input_value() == typed
        reads(page, "a", typed[:12])
    assert page.locator("#panel-a img").count() == 0 and page.locator("#panel-b img").count() == 1
    box.fill("pool+fastv")
    page.locator("#panel-b h2").click()  # leaving the box asks too
    reads(page, "a", "pool+fastv")
    assert box.input_value() == "pool+fastv" and foreign == []
    page.context.close()


def test_a_clip_and_a_file(address, browser, tmp_path):
    page, foreign = opened(browser, address, READY, viewport={"width": 1280, "height": 900})
    choose(page, "which", "clip 1, 4 frames")
    reads(page, "all", "72 of 72")
    page.get_by_label("was there a 8?").click()
    reads(page, "all", "yes")
    page.screenshot(path=tmp_path / "clip.png", full_page=True)
    bad = tmp_path / "<b>bad.png"
    bad.write_text("no picture")
    page.locator("input[type=file]").set_input_files(bad)
    page.get_by_text("is not an image that can be read").wait_for(timeout=60_000)
    Image.new("RGB", (112, 56), "red").save(tmp_path / "mine.png")
    page.locator("input[type=file]").set_input_files(tmp_path / "mine.png")
    page.get_by_text(TINY_KNOWS).wait_for(timeout=60_000)
    reads(page, "all", " of 120")  # the file itself, and not the clip before it
    choose(page, "which", "picture 1")
    reads(page, "all", "100 of 100")
    assert page.get_by_text(TINY_KNOWS).count() == 0 and foreign == []
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_one_column_without_a_horizontal_scroll(address, browser, tmp_path, scheme):
    for name, size in (("phone", (390, 844)), ("desktop", (1280, 900))):
        viewport = {"width": size[0], "height": size[1]}
        page, _ = opened(browser, address, READY, viewport=viewport, color_scheme=scheme)
        reads(page, "all", "100 of 100")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        boxes = [page.locator(f"#panel-{panel} .panel").bounding_box() for panel in ("all", "a", "b")]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= size[0] for box in boxes)
        assert len({round(box["x"]) for box in boxes}) == (1 if name == "phone" else 3)
        order = sorted(("all", "a", "b"), key=lambda p: page.locator(f"#panel-{p}").bounding_box()["y"])
        assert order == (["a", "b", "all"] if name == "phone" else ["all", "a", "b"])
        page.screenshot(path=tmp_path / f"{name}_{scheme}.png", full_page=True)
        if name == "phone":
            page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
            slider = page.locator("#budget input[type=range]").bounding_box()
            assert page.evaluate("window.scrollY") > 300 and 0 <= slider["y"] < size[1] / 2
            page.screenshot(path=tmp_path / f"{name}_{scheme}_end.png")
        page.context.close()
