"""`vtoken demo explore` without a browser: answers, drawings, bounds, refusals, uploads, the command."""

from __future__ import annotations

import io
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import vtoken
from tests.cli.exploring import NAME, explorer, served
from tests.cli.serving import Visitor
from tests.video.media import write
from tests.video.test_limits import png
from vtoken import tiny
from vtoken.asking import TINY_KNOWS
from vtoken.cli.explore_html import LEGEND, PERFORMANCE, panel, times_html
from vtoken.cli.explore_inputs import FRAMES, SIDE, Subject, examples, of_a_visitor, of_the_owner
from vtoken.cli.explore_page import Controls
from vtoken.cli.explore_state import Outcome, Recent
from vtoken.cli.main import cli
from vtoken.tiny.questions import held_out, prepare

HOSTILE = "<img src=x onerror=alert(1)> ![x](http://evil.example/x.png)"
ROOM = 300_000


@pytest.fixture(scope="module")
def asked():
    return explorer()


@pytest.fixture(scope="module")
def subjects(asked):
    return examples(NAME, asked.processor)


@pytest.fixture(scope="module")
def page(asked):
    with served(asked, ROOM) as service:
        yield service


@pytest.fixture
def calls(asked, monkeypatch):
    """What the model is asked."""
    made, answer = [], asked._answer
    monkeypatch.setattr(asked, "_answer", lambda *a: made.append(a[1:]) or answer(*a))
    asked.recent._known.clear()
    return made


# -- answers and drawings ------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["divprune", "fastv", ""])
@pytest.mark.parametrize("number", [0, 1])
def test_answers_are_those_of_generate(asked, subjects, number, strategy):
    """Of a picture and of a clip, prepared by the processor itself."""
    example, question = held_out(NAME, number + 1)[number]
    subject = subjects[number]
    assert subject.kind == ("image", "video")[number] and subject.asked[0] == (question.text, question.answer)
    inputs = prepare(asked.processor, [(example, question)])

    def direct() -> str:
        out = asked.model.generate(**inputs, max_new_tokens=32, do_sample=False)
        return asked.processor.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()

    if not strategy:
        told = asked.everything(subject, question.text)
        assert told.said == direct() and told.report is None
        return
    told = asked.outcome(subject, question.text, strategy, 0.3)
    with vtoken.applied(asked.model, strategy, budget=0.3):
        assert told.said == direct()
        report = vtoken.report(asked.model)
    assert told.report.visual_per_layer == report.visual_per_layer and told.report.flops == report.flops
    assert torch.equal(told.report.visuals[0].keep, report.visuals[0].keep)
    assert told.report.kv_bytes == report.kv_bytes and told.seconds > 0


def kept_on(picture: Image.Image, original: Image.Image, grid: tuple[int, int], cell: int) -> np.ndarray:
    """Cells whose middle has the colours of the original."""
    rows, columns = grid
    whole = original.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    same = (np.asarray(picture) == np.asarray(whole)).all(-1).reshape(rows, cell, columns, cell)
    edge = max(2, cell // 6)
    return same[:, edge:-edge, :, edge:-edge].all((1, 3)).ravel()


def test_the_drawn_tokens_of_a_picture_are_those_of_the_report(asked, subjects):
    told = asked.outcome(subjects[0], "how many objects are there?", "divprune", 0.25)
    visual, (picture,) = told.report.visuals[0], told.pictures()
    cell = picture.width // visual.segments[0].grid[1]
    drawn = kept_on(picture, subjects[0].media, visual.segments[0].grid, cell)
    assert np.flatnonzero(drawn).tolist() == visual.kept_cells.tolist() and drawn.sum() == 25
    (whole,) = told.pictures(everything=True)
    assert kept_on(whole, subjects[0].media, visual.segments[0].grid, cell).all()


def test_a_budget_of_1_is_all_tokens(asked, subjects):
    """As a browser sends the end of the slider."""
    told = asked.outcome(subjects[0], "how many objects are there?", "divprune", 1)
    assert told.report.tokens_out == told.report.tokens_in == 100


def test_the_drawn_tokens_of_a_clip_are_those_of_the_report(asked):
    clip = max((s for s in examples("qwen2_5_vl_long", asked.processor)), key=lambda s: len(s.media))
    frames = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in clip.media.frames]
    told = asked.outcome(clip, "which digit came last?", "divprune", 0.25)
    visual, rows = told.report.visuals[0], told.pictures()
    steps, (high, wide) = len(visual.segments), visual.segments[0].grid
    columns = math.ceil(math.sqrt(steps))
    assert len(rows) == math.ceil(steps / columns) > 1
    cell = max(4, 480 // columns // max(high, wide))
    drawn = []
    for i in range(steps):
        left = 12 + i % columns * (wide * cell + 12)
        part = rows[i // columns].crop((left, 12, left + wide * cell, 12 + high * cell))
        drawn.append(kept_on(part, frames[2 * i], (high, wide), cell))
    assert np.flatnonzero(np.concatenate(drawn)).tolist() == visual.kept_cells.tolist()


def test_examples_are_the_pictures_that_each_model_knows():
    for name in tiny.names():
        found = examples(name, tiny.load(name)[1])
        kinds = {subject.kind for subject in found}
        expected = {"qwen2_5_vl": {"image", "video"}, "llava_onevision": {"image", "video"}}
        assert kinds == expected.get(name, {"video"} if name == "qwen2_5_vl_long" else {"image"}), name
        assert len({subject.name for subject in found}) == len(found) == 6
        assert all(subject.asked and all(truth for _, truth in subject.asked) for subject in found)
    assert {s.kind for s in examples("a/hub-model", object())} == {"image"}


def test_strategies_fit_the_input(asked):
    assert "evs" in asked.strategies("video") and "evs" not in asked.strategies("image")
    assert "globalcom2" in asked.strategies("image") and "globalcom2" not in asked.strategies("video")
    assert not {"voco", "llava_mini", "hired"} & {
        *asked.strategies("image")
    }  # new weights; needs a CLS token
    assert asked.two("image", ["evs", "pool"]) == ("pool", "farcover")
    assert asked.two("video", ["pool", "pool"]) == ("pool", "farcover")
    assert asked.two("image", ["pool + fastv", "tempme"]) == ("pool+fastv", "farcover")
    both = explorer(more=["pool+fastv"])
    assert "pool+fastv" in both.strategies("image") and both.two("image", ["pool+fastv"])[0] == "pool+fastv"
    with pytest.raises(ValueError, match="evs is not defined for image input"):
        both.check(["evs"], "image")


# -- the cache -----------------------------------------------------------------------------------------------
def test_the_same_request_is_answered_once_and_the_cache_is_bounded(asked, subjects, calls, monkeypatch):
    monkeypatch.setattr(asked.recent, "most", 3)
    for _ in range(3):
        asked.outcome(subjects[0], " how many objects are there? ", "random", 0.5)
        asked.outcome(subjects[0], "how many objects are there?", "decode_evict", 0.5)
    assert len(calls) == 2
    for budget in (0.1, 0.2, 0.3, 0.4):
        asked.outcome(subjects[0], "how many objects are there?", "random", budget)
    assert len(asked.recent) == 3 and len(calls) == 6
    asked.outcome(subjects[0], "how many objects are there?", "random", 0.2)
    assert len(calls) == 6
    asked.outcome(subjects[0], "how many objects are there?", "random", 0.5)  # forgotten meanwhile
    assert len(calls) == 7
    asked.outcome(subjects[2], "how many objects are there?", "random", 0.5)
    asked.forget(subjects[0])
    assert len(asked.recent) == 1


def test_a_strategy_without_a_budget_is_asked_once(asked, subjects, calls):
    name = next(
        n for n in asked.strategies("image") if not vtoken.strategies.strategy_info(n).cls.takes_budget()
    )
    for budget in (0.2, 0.5, 0.9):
        assert not asked.outcome(subjects[0], "how many objects are there?", name, budget).refused
    assert len(calls) == 1


# -- refusals ------------------------------------------------------------------------------------------------
def test_refusals_are_sentences_in_place_of_the_picture(asked, subjects, monkeypatch):
    clip = subjects[1]
    for outcome, words in (
        (asked.outcome(subjects[0], "where?", "sparsevlm", 0.1), "choose more"),
        (asked.outcome(clip, "where?", "globalcom2", 0.5), "globalcom2 is not defined for video input: use"),
        (asked.outcome(clip, "where?", "/etc/passwd", 0.5), "Unknown strategy '/etc/passwd'"),
        (asked.outcome(clip, "where?", "fastvv", 0.5), "did you mean fastv"),
        (asked.outcome(clip, "where?", "x" * 9999, 0.5), "x" * 100 + "': there are"),
        (asked.outcome(clip, "where?", "tempme", 0.5), "tempme is defined for plain encoders"),
        (asked.outcome(clip, "where?", "hired+fastv", 0.5), "a CLS token, which the vision tower"),
        (asked.outcome(clip, "where?", "pool+divprune", 0.5), "only one can"),
        (asked.outcome(clip, "where?", "pool+", 0.5), "are joined as in"),
        (asked.outcome(clip, "where?", "voco", 0.5), "voco needs trained weights"),
        (asked.outcome(clip, "where?", None, 0.5), "Choose a strategy first"),
        (asked.outcome(clip, "where?", ["pool"], 0.5), "Unknown strategy"),
        (asked.outcome(clip, "where?", "pool", float("nan")), "share above 0"),
        (asked.outcome(clip, "where?", "pool", 2.0), "share above 0"),
        (asked.outcome(clip, "  ", "pool", 0.5), "Ask a question first"),
        (asked.everything(subjects[0], ""), "Ask a question first"),
        (asked.outcome(subjects[0], "<|image_pad|> what?", "pool", 0.5), "."),
        (asked.outcome(clip, "<|video_pad|> what?", "pool", 0.5), "."),
    ):
        assert words in outcome.refused and "\n" not in outcome.refused and outcome.report is None
        shown = panel("x", outcome, Outcome(""))
        assert "<img" not in shown and 'role="status"' in shown and "Traceback" not in shown
    assert not any(key[3:] == ("sparsevlm", 0.1) for key in asked.recent._known)

    def fail(*_):
        raise KeyError("inner")

    monkeypatch.setattr(asked, "_answer", fail)
    assert asked.outcome(clip, "why?", "pool", 0.5).refused == "The model failed (KeyError)."
    assert not asked.model._forward_hooks  # and nothing stays patched


def test_names_that_are_joined_by_a_plus_are_asked(asked, subjects, calls):
    """As `vtoken.patch` does, whatever the spaces."""
    question = "how many objects are there?"
    told = [asked.outcome(subjects[0], question, name, 0.25) for name in ("pool+fastv", " pool + fastv ")]
    assert told[0] is told[1] and len(calls) == 1 and not told[0].refused
    with vtoken.applied(asked.model, "pool+fastv", budget=0.25):
        asked._answer(subjects[0], question, "pool+fastv")
        assert told[0].report.visual_per_layer == vtoken.report(asked.model).visual_per_layer


def test_a_typed_name_is_what_box_and_card_show(page):
    visitor = Visitor(page)
    question = "how many objects are there?"
    shown = visitor.press("show", "picture 1", question, "visionzip+fastv", HOSTILE, 0.2)
    assert "<h2>visionzip+fastv</h2>" in shown[1] and "100 of 100" in shown[0] and "<img" in shown[1]
    assert "Unknown strategy" in shown[2] and "<img" not in shown[2] and "&lt;img" in shown[2]
    shown = visitor.press("show", "picture 1", question, "hired(score=received)", None, 0.2)
    assert "A strategy gets its options when the page is started" in shown[1]
    shown = visitor.press("show", "picture 1", question, "tempme", None, 0.2)
    assert "defined for plain encoders" in shown[1] and "Choose a strategy first" in shown[2]
    a, b = visitor.press("choose", "picture 2", "pool+fastv", "tempme", 4)[2:4]
    assert (a["value"], b["value"]) == ("pool+fastv", "divprune")


def test_the_words_below_are_true_of_every_strategy_and_lead_to_the_documentation():
    project = Path(__file__).parents[2]
    address = re.search(r'^Documentation = "(.*)"$', (project / "pyproject.toml").read_text(), re.M)[1]
    assert PERFORMANCE.startswith(address + "/")
    assert (project / "docs" / PERFORMANCE.removeprefix(address + "/")).is_file()
    assert f'href="{PERFORMANCE}" target="_blank" rel="noopener noreferrer"' in times_html(True)
    assert "the last layer" in LEGEND and "<a" not in times_html(False)


def test_all_text_is_shown_as_it_is(asked, subjects):
    told = asked.outcome(subjects[0], HOSTILE, "divprune", 0.2)
    dense = Outcome("", said=HOSTILE + "!")
    shown = panel(HOSTILE, Outcome(HOSTILE, HOSTILE, 0.1, told.report, told.seen), dense, truth=HOSTILE)
    shown += panel("b", Outcome("b", refused=HOSTILE), dense)
    assert shown.count("<img") == shown.count("<img alt=") == 1 and "<img src" not in shown
    assert shown.count("onerror=") == shown.count("onerror=alert(1)&gt;") >= 4


# -- files ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("bomb.png", png(60_000, 60_000), "pixels"),
        ("large.png", png(8000, 8000), "more than"),
        ("text.png", b"no picture", "not an image"),
        ("page.html", b"<html></html>", "not an image"),
        ("list.m3u8", b"#EXTM3U\n/etc/passwd", "not an image"),
        ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", ""),
        ("text.mp4", b"no video", ""),
        ("empty.mkv", b"", ""),
        ("a<b>.png", b"\x89PNG\r\n\x1a\n", ""),
    ],
)
def test_files_that_are_no_pictures_or_too_large_are_sentences(asked, tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        asked.read(path, "what?")
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not path.exists()


def test_uploads_are_made_small_and_then_asked_about(asked, tmp_path):
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "wide.jpg")
    picture = of_a_visitor(tmp_path / "wide.jpg", "what?", asked.processor)
    assert picture.media.size == (SIDE, SIDE // 2) and picture.name == "yours: wide.jpg"
    clip = of_a_visitor(write(tmp_path / "clip.mp4", 24), "what?", asked.processor)
    assert clip.kind == "video" and len(clip.media) == FRAMES
    for subject in (picture, clip):
        told = asked.outcome(subject, "what?", "pool", 0.25)
        assert not told.refused and told.report.tokens_out < told.report.tokens_in and told.pictures()
    owners = of_the_owner(None, str(tmp_path / "clip.mp4"), "what?", asked.processor)
    assert owners.name == "clip.mp4" and len(owners.media) == FRAMES
    with pytest.raises(ValueError, match="reads no videos"):
        of_the_owner(None, str(tmp_path / "clip.mp4"), "what?", object())


def test_only_a_tiny_model_and_a_file_have_a_note(asked, subjects, monkeypatch):
    file = Subject("mine.png", subjects[0].media, own=True)
    buttons = Controls(asked, None, subjects, (), False)
    assert TINY_KNOWS in buttons.note(file)["value"] and not buttons.note(subjects[0])["visible"]
    monkeypatch.setattr(asked, "tiny", False)
    assert buttons.note(file) == {"value": "", "visible": False}


def test_an_answer_that_ends_after_its_visitor_left_is_not_kept(subjects):
    recent, (mine, other) = Recent(4), subjects[:2]

    def leaves():
        recent.forget(mine)
        return Outcome("", "two")

    assert recent.get((mine, "?"), leaves).said == "two" and not len(recent)
    recent.get((mine, "?"), lambda: Outcome("", "two"))
    recent.get((other, "?"), lambda: Outcome("", "three"))
    assert len(recent) == 2


def test_frames_of_a_clip_are_drawn_small_and_once(subjects):
    clip = next(each for each in subjects if each.kind == "video")
    large = Subject("large", replace(clip.media, frames=torch.zeros(2, 3, 720, 1280, dtype=torch.uint8)))
    assert [frame.size for frame in large.frames] == [(480, 270)] * 2 and large.frames is large.frames


def sent(visitor: Visitor, name: str, data: bytes):
    return visitor.http.post("gradio_api/upload", files={"files": (name, data)})


def test_a_page_takes_files_only_where_it_says_so(asked):
    with served(asked) as service:
        visitor = Visitor(service)
        assert "upload" not in visitor.events and sent(visitor, "a.png", b"x").status_code == 404
        shown = visitor.press("show", "picture 1", "how many objects are there?", "divprune", "pool", 0.2)
        assert "100 of 100" in shown[0] and "20 of 100" in shown[1] and "pool" in shown[2]
        shown = shown[1]
        assert "20 of 100" in shown and "data:image/jpeg" in shown


def test_an_upload_is_its_visitors_alone_and_goes_with_them(page, tmp_path):
    a, b = Visitor(page), Visitor(page)
    file = io.BytesIO()
    Image.new("RGB", (120, 120), "green").save(file, "PNG")
    with a.here(), b.here():
        path = sent(a, "mine.png", file.getvalue()).json()[0]
        named = {"path": path, "meta": {"_type": "gradio.FileData"}}
        got = a.press("upload", named, "divprune", "fastv", 1)
        assert TINY_KNOWS in got[5]["value"]
        assert not a.press("choose", "picture 1", "divprune", "fastv", 1)[4]["visible"]
        assert got[0]["value"] == "yours: mine.png"
        left = [f for f in page.folder.rglob("*") if f.is_file()]
        assert not Path(path).exists() and not sum(f.stat().st_size for f in left)  # gradio makes empty ones
        question = ("what is shown here?", "divprune", "fastv", 0.2)
        shown = a.press("show", "yours: mine.png", *question)
        assert all("data:image/jpeg" in panel for panel in shown)
        assert "data:image/jpeg" not in str(b.press("show", "yours: mine.png", *question))
        file.seek(0)
        Image.open(file).save(secret := tmp_path / "secret.png")
        with pytest.raises(httpx.HTTPStatusError, match="403"):
            a.press("upload", named | {"path": str(secret)}, "pool", "fastv", 1)
        assert secret.is_file()
        bad = sent(a, "bad.png", HOSTILE.encode()).json()[0]
        message = a.press("upload", named | {"path": bad}, "divprune", "fastv", 1)
        assert "is not an image" in str(message) and not Path(bad).exists()
        assert sent(a, "large.png", b"x" * (ROOM + 1)).status_code == 413
        held = [desk.subject for desk in page.desks._desks.values() if desk.subject]
        assert len(held) == 1
    end = time.monotonic() + 60
    while len(page.desks):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not any(key[0] is held[0] for key in page.desks.make().explorer.recent._known)


def test_choosing_a_clip_changes_questions_and_strategies(page):
    visitor = Visitor(page)
    text, tries, a, b, note, message, turn = visitor.press(
        "choose", "clip 1, 4 frames", "globalcom2", "fastv", 4
    )
    assert (
        text == tries["value"] == "which digit came last?" and turn == 5 and not message and not note["value"]
    )
    assert a["value"] == "fastv" and b["value"] == "divprune"  # globalcom2 reads no clips
    assert "evs" in {choice[0] for choice in a["choices"]}


# -- one model, many moves -----------------------------------------------------------------------------------
def test_a_newer_request_takes_the_place_of_one_that_waits(page):
    """The model runs one call; while it does, of what a browser asks for only the latest waits."""
    config = {fn.name: fn for fn in page.page.fns.values()}
    event = config["show"]
    assert event.concurrency_limit == 1 and event.concurrency_id == "model"
    assert event.trigger_mode == "always_last"
    told = page.page.get_config_file()["dependencies"]
    moved = [d for d in told if any(event == "change" and not d["backend_fn"] for _, event in d["targets"])]
    assert len(moved) == 1 and "clearTimeout" in moved[0]["js"]  # the slider asks when it rests


# -- the command ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image", "a.png", "--video", "b.mp4"), "give --image or --video"),
        (("--budget", "64"), "takes a share"),
        (("--strategies", "pool,fastv,random"), "shows two strategies"),
        (("--strategies", "nothing"), "nothing"),
        (("--strategies", "hired"), "hired"),
        (("--strategies", "evs"), "not defined for image input"),
        (("--model", "llava", "--video", "clip.mp4"), "reads no videos"),
        (("--host", "a b"), "no known name"),
        (("--port", "70000"), "from 0 to 65535"),
    ],
)
def test_bad_options_are_sentences(arguments, words):
    said = CliRunner().invoke(cli, ["demo", "explore", "--no-open", *arguments])
    assert said.exit_code == 2 and words in " ".join(said.output.split()), said.output
    assert "Traceback" not in said.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--image", "nowhere.png"), "no image file"), (("--model", "nobody/nothing"), "Cannot load")],
)
def test_what_is_not_there_is_a_sentence(arguments, words):
    said = CliRunner().invoke(cli, ["demo", "explore", "--no-open", *arguments])
    assert said.exit_code == 1 and words in said.output and "Usage" not in said.output


def test_the_command_begins_with_the_file_of_its_owner(tmp_path, monkeypatch):
    built = {}

    class Server:
        def __init__(self, page, *args):
            built.update(page=page, args=args)
            self.url, self.token = "http://127.0.0.1:1/", None

        def run(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("vtoken.cli.page_server.Service", Server)
    Image.new("RGB", (90, 90), "blue").save(tmp_path / "mine.png")
    arguments = ("--image", str(tmp_path / "mine.png"), "--strategies", "pool,fastv", "--budget", "0.5")
    said = CliRunner().invoke(cli, ["demo", "explore", "--no-open", "--allow-uploads", *arguments])
    assert said.exit_code == 0 and "The page is at" in said.output and "may upload" in said.output
    parts = built["page"].get_config_file()["components"]
    values = {c["props"].get("elem_id"): c["props"].get("value") for c in parts}
    assert TINY_KNOWS in values["note"]
    assert values["which"] == "mine.png" and values["question"] == "how many objects are there?"
    assert (values["first"], values["second"], values["budget"]) == ("pool", "fastv", 0.5)
    labelled = [c for c in parts if c["type"] in ("dropdown", "textbox", "slider", "radio")]
    assert all(c["props"].get("label") for c in labelled)
