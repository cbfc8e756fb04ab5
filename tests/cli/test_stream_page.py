"""The page on a real socket: access, sessions of several visitors, and clean-up."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.cli.serving import SOURCE, Visitor, served, until
from vtoken.cli import stream_page as page_module
from vtoken.cli.main import cli
from vtoken.cli.page_guard import LOOPBACK, MAX_BODY, Guard
from vtoken.cli.page_server import listen, private_folder
from vtoken.cli.page_shares import MAX_PENDING, Shares
from vtoken.cli.page_uploads import Uploads
from vtoken.cli.page_visitors import Desks
from vtoken.cli.stream_page import talk_html
from vtoken.cli.stream_visitors import Desk, Said

ROOM = 300_000


@pytest.fixture(scope="module")
def closed():
    """A page as it is by default."""
    with served() as service:
        yield service


@pytest.fixture(scope="module")
def open_to_sources(closed):
    """Made after the other: gradio knows the uploads of the latest folder."""
    with served(room=ROOM, most=3) as service:
        yield service


# -- whose stream --------------------------------------------------------------------------------------------
def test_every_browser_has_its_own_stream(closed):
    a, b = Visitor(closed), Visitor(closed)
    with a.here(), b.here():
        assert "playing" in a.play() or "ended" in a.play()
        closed.desks.of(a.session).player.wait_until(99)
        shown, status, *_ = a.look()
        assert "data:image/jpeg" in shown and "9 frames" in status
        assert closed.desks.of(b.session) is None
        assert not any("image" in str(part) for part in b.look())  # b sees nothing of a's
        asked = b.press("ask", "what is here ?")
        assert "press Play first" in asked[1]
        b.press("pause")
        b.press("stop")
        assert closed.desks.of(a.session).session.stats["frames"] == 9  # and ends nothing
        talk = a.press("ask", "what is here ?")[1]
        assert "9 frames" in talk and "what is here ?" in talk
        b.play()
        assert "what is here" not in b.press("ask", "")[1]
    until(lambda: len(closed.desks) == 0)


def test_places_are_bounded_and_freed_when_a_browser_leaves(closed):
    visitors = [Visitor(closed) for _ in range(3)]
    with visitors[1].here():
        with visitors[0].here():
            assert "frames" in visitors[0].play() and "frames" in visitors[1].play()
            assert "All 2 places are taken" in visitors[2].play() and len(closed.desks) == 2
        until(lambda: closed.desks.of(visitors[0].session) is None)
        assert "frames" in visitors[2].play()
        visitors[2].press("stop")
    until(lambda: len(closed.desks) == 0)


def test_a_browser_that_went_without_a_word_is_freed():
    made: list[Desk] = []

    def make() -> Desk:
        made.append(Desk(lambda *_: None))
        return made[-1]

    desks = Desks(make, most=1, idle=0.1)
    desks.open("a")
    until(lambda: len(desks) == 0)
    desks.open("b")
    with pytest.raises(ValueError, match="needs its session"):
        desks.open(None)
    desks.close()
    with pytest.raises(ValueError, match="places are taken"):
        desks.open("c")


# -- sources -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "source", ["/etc/passwd", "http://127.0.0.1:9/", "-", "0", "synthetic://7", "concat:/etc/passwd"]
)
def test_a_visitor_names_no_source(closed, source, monkeypatch):
    opened = []
    monkeypatch.setattr(Desk, "play", lambda self, source, *rest: opened.append(source))
    visitor = Visitor(closed)
    visitor.play(source)
    visitor.press("stop")
    assert opened == [SOURCE]


def test_what_is_not_on_the_page_is_refused(closed):
    visitor = Visitor(closed)
    for strategy, budget, fps in (
        ("fastv", 0.5, 2.0),
        ("none", 7.0, 2.0),
        ("none", 0.5, 1e9),
        ("none", 0.5, 0.0),
    ):
        said = str(visitor.press("play", "", strategy, budget, fps))
        assert "playing" not in said and len(closed.desks) == 0
    assert len(visitor.http.get("config").text) and SOURCE not in visitor.opened.text


def test_a_page_that_takes_sources_still_keeps_its_input(open_to_sources):
    visitor = Visitor(open_to_sources)
    assert "standard input" in visitor.play("-") and "no such file" in visitor.play("nowhere.mp4")
    assert "frames" in visitor.play("synthetic://1?frames=3")
    visitor.press("stop")


def test_the_source_is_not_told(monkeypatch):
    secret = "rtsp://me:secret@camera/1"
    buttons = page_module.Buttons(Desks(lambda: None), ["none"], secret, False)
    assert "secret" not in buttons._text(f"cannot open {secret}: gone")
    buttons.desks.close()


# -- requests ------------------------------------------------------------------------------------------------
def test_routes_that_the_page_does_not_need_are_closed(closed):
    http = Visitor(closed).http
    for path in (
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={Path(__file__)}",
        "gradio_api/file=http://127.0.0.1:9/",
        "gradio_api/file/etc/passwd",
        "file=/etc/passwd",
        "gradio_api/proxy=https://example.org",
        "gradio_api/info",
        "gradio_api/openapi.json",
        "openapi.json",
        "docs",
        "redoc",
        "monitoring",
        "gradio_api/runs",
        "gradio_api/deep_link",
        "gradio_api/upload_progress",
        "static/../../etc/passwd",
        "static/%2e%2e/%2e%2e/etc/passwd",
        "assets/..%2f..%2fetc/passwd",
    ):
        assert http.get(path).status_code == 404, path
    for path in ("gradio_api/upload", "gradio_api/run/play", "gradio_api/api/play", "gradio_api/call/play", "login",
                 "gradio_api/process_recording", "gradio_api/vibe-edit", "gradio_api/component_server"):  # fmt: skip
        assert http.post(path, json={"data": []}).status_code == 404, path
    assert http.request("DELETE", "").status_code == http.options("").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "evil.example:{port}"}, 421),
        ({"host": "192.168.1.5:{port}"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "[oops"}, 421),
        ({"host": ""}, 421),
        ({"host": "localhost:{port}"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:{port}"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "http://localhost:{port}"}, 403),
        ({"origin": "http://127.0.0.1:{port}"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_other_names_and_other_sites_are_refused(closed, headers, status):
    port = closed.url.rpartition(":")[2].strip("/")
    headers = {name: value.format(port=port) for name, value in headers.items()}
    visitor = Visitor(closed)
    got = visitor.http.get("config", headers=headers)
    assert got.status_code == status
    body = {"fn_index": visitor.events["play"], "data": ["", "none", 0.5, 2.0], "session_hash": "foreign"}
    got = visitor.http.post(
        "gradio_api/queue/join", json=body | {"fn_index": visitor.events["pause"]}, headers=headers
    )
    assert got.status_code == status and closed.desks.of("foreign") is None


def test_sizes_are_bounded(closed, open_to_sources):
    http = Visitor(closed).http
    assert http.post("gradio_api/queue/join", content=b"x" * (MAX_BODY + 1)).status_code == 413
    # of unknown length
    assert http.post("gradio_api/queue/join", content=iter([b"x"] * 3)).status_code == 411
    visitor = Visitor(open_to_sources)

    def send(size: int, **kwargs) -> httpx.Response:
        return visitor.http.post("gradio_api/upload", files={"files": ("a.mp4", b"x" * size)}, **kwargs)

    assert send(ROOM + 1).status_code == 413
    assert send(10, headers={"origin": "http://evil.example"}).status_code == 403
    first = send(ROOM // 3)
    assert first.status_code == 200 and Path(first.json()[0]).is_relative_to(open_to_sources.folder)
    assert send(ROOM // 3 + 1).status_code == 413  # together they are too many for one address
    assert sum(f.stat().st_size for f in open_to_sources.folder.rglob("*") if f.is_file()) == ROOM // 3
    assert visitor.http.get(f"gradio_api/file={first.json()[0]}").status_code == 404
    named = {"path": first.json()[0], "meta": {"_type": "gradio.FileData"}}
    assert visitor.press("upload", named)[0] == first.json()[0]
    visitor.press("stop")
    assert not Path(first.json()[0]).exists()


def test_nothing_that_was_shown_stays_on_disk(closed):
    visitor = Visitor(closed)
    with visitor.here():
        visitor.play()
        for _ in range(5):
            visitor.look()
        visitor.press("ask", "what is here ?")
    assert not [f for f in closed.folder.rglob("*") if f.is_file()]
    assert closed.page.delete_cache is not None and not closed.page.analytics_enabled
    assert all(fn.api_visibility == "private" for fn in closed.page.fns.values() if fn.name != "leave")
    with private_folder() as folder:
        (folder / "a.mp4").write_bytes(b"x")
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
    assert not folder.exists() and os.environ.get("GRADIO_TEMP_DIR") != str(folder)


def test_all_text_is_shown_as_it_is():
    hostile = "![x](http://evil.example/x.png) <img src=x onerror=alert(1)> [a](javascript:b) &lt;"
    html = talk_html([Said(hostile, hostile, truth=hostile, unpruned=hostile, facts=hostile)])
    assert "<img" not in html and html.count("&lt;img src=x onerror=alert(1)&gt;") == 5 and "&amp;lt;" in html


def test_every_answer_has_the_policy(closed):
    http = Visitor(closed).http
    for path in ("", "config", "nowhere"):
        policy = http.get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy and "img-src 'self' data: blob:;" in policy


# -- one visitor's share -------------------------------------------------------------------------------------
def test_a_greedy_visitor_does_not_fill_the_queue(closed, monkeypatch):
    """One that asks and asks, under one session and under many: the queue has 64 places here."""
    greedy, calm, go = Visitor(closed), Visitor(closed), threading.Event()
    buttons = closed.page.fns[greedy.events["pause"]].fn.__self__
    monkeypatch.setattr(
        buttons.desks, "of", lambda browser: None if browser == calm.session else go.wait(60) and None
    )

    def join(session: str) -> httpx.Response:
        body = {"fn_index": greedy.events["pause"], "data": [], "session_hash": session}
        return greedy.http.post("gradio_api/queue/join", json=body)

    try:
        codes = [join(greedy.session).status_code for _ in range(40)]
        assert codes == [200] * MAX_PENDING + [429] * (40 - MAX_PENDING)
        codes = [join(f"made up {i}").status_code for i in range(100)]
        assert codes.count(200) == 32 - MAX_PENDING and codes[-1] == 429
        assert "still waiting" in join("another").text
        # another address
        closed.guard.shares._sessions["192.0.2.7"] = closed.guard.shares._sessions.pop("127.0.0.1")
        assert "press Play first" in calm.press("ask", "who ?")[1]
    finally:
        go.set()
    until(lambda: len(closed.page._queue) == 0)


def test_shares_of_sessions_and_addresses(monkeypatch):
    monkeypatch.setattr("vtoken.cli.page_shares.MAX_IDLE", 0)
    waiting = {"a": MAX_PENDING, "b": 3, "c": 0}
    shares = Shares(lambda s: waiting.get(s, 0), 5)

    def too_much(address, session):
        return shares.takes_too_much(address, json.dumps({"session_hash": session}).encode())

    assert too_much("1", "a") and not too_much("1", "b") and not too_much("1", "c")
    waiting["c"] = 2
    assert too_much("1", "c") and too_much("1", "new") and not too_much("2", "new")
    waiting["b"] = 0
    assert not too_much("1", "new")
    waiting.clear()
    assert not too_much("1", "x") and [*shares._sessions["1"]] == ["x"]  # what is done is forgotten
    for body in (b"", b"[]", b"{}", b"3", b"\xff", b'{"session_hash": 3}', b"[" * 60_000):
        assert not shares.takes_too_much("1", body)


def test_open_requests_of_one_address_are_bounded(monkeypatch):
    monkeypatch.setattr("vtoken.cli.page_guard.MAX_OPEN", 3)
    with served() as service, httpx.Client(base_url=service.url, trust_env=False, timeout=30) as http:
        with ExitStack() as beats:
            for i in range(3):
                other = beats.enter_context(httpx.Client(base_url=service.url, trust_env=False, timeout=30))
                beats.enter_context(other.stream("GET", f"gradio_api/heartbeat/{i}"))
            refused = http.get("config")
            assert refused.status_code == 429 and "too many requests open" in refused.text
        until(lambda: http.get("config").status_code == 200)


def test_one_question_at_a_time(closed):
    desk = Desk(lambda *_: None)
    closed.desks._desks["busy"] = desk
    buttons = closed.page.fns[Visitor(closed).events["ask"]].fn.__self__
    request = SimpleNamespace(session_hash="busy")
    with desk.turn("answer"):
        (shown,) = buttons.ask("who ?", request)
        assert "One at a time" in shown[1] and shown[0] == "who ?"
        assert "press Play first" not in shown[1]
    assert "press Play first" in list(buttons.ask("who ?", request))[-1][1]
    with desk.turn("play"):
        assert "One at a time" in buttons.play("", "none", 0.5, 2.0, request)
    left = buttons.ask("who ?", request)
    next(left)
    left.close()  # the browser goes in the middle of an answer
    assert "press Play first" in list(buttons.ask("who ?", request))[-1][1]
    closed.desks.leave("busy")


# -- other machines ------------------------------------------------------------------------------------------
def test_others_need_the_token():
    with served("0.0.0.0", hosts=("box.example",)) as service:
        assert len(service.token) >= 22 and service.token in service.url
        bare = service.url.partition("?")[0]
        port = bare.rpartition(":")[2].strip("/")
        base = f"http://127.0.0.1:{port}/"
        for url in (base, f"{base}?token=", f"{base}?token=wrong", f"{base}config", f"{base}assets/a.js"):
            assert httpx.get(url, trust_env=False).status_code == 403, url
        assert (
            httpx.get(base, headers={"cookie": "vtoken_token=\u00e9".encode()}, trust_env=False).status_code
            == 403
        )
        assert httpx.post(f"{base}gradio_api/queue/join", json={}, trust_env=False).status_code == 403
        with httpx.Client(base_url=base, trust_env=False) as http:
            shown = http.get(f"/?token={service.token}")
            assert shown.status_code == 303 and "token" not in shown.headers["location"]
            cookie = shown.headers["set-cookie"].lower()
            assert "httponly" in cookie and "samesite=lax" in cookie
            assert http.get("/config").status_code == 200
            # an address is no name
            assert http.get("/config", headers={"host": "192.168.1.5"}).status_code == 200
            assert http.get("/config", headers={"host": "box.example"}).status_code == 200
            assert http.get("/config", headers={"host": "evil.example"}).status_code == 421
        bearer = {"authorization": f"Bearer {service.token}"}
        assert httpx.get(f"{base}config", headers=bearer, trust_env=False).status_code == 200


def test_websockets_are_closed():
    import asyncio

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(None, LOOPBACK)({"type": "websocket", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# -- host and port -------------------------------------------------------------------------------------------
def test_hosts_and_ports_that_cannot_be_had():
    with listen("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        for host, wanted, match in (
            ("127.0.0.1", port, "is in use"),
            ("nowhere.invalid", None, "no known name or address"),
            ("a b", 8000, "no known name or address"),
            ("\u2603" * 100, None, "no known name or address"),
            ("192.0.2.1", None, "cannot serve on"),
            ("127.0.0.1", 70000, "from 0 to 65535"),
            ("127.0.0.1", -1, "from 0 to 65535"),
        ):
            with pytest.raises(ValueError, match=match) as caught:
                listen(host, wanted)
            assert str(caught.value).count("\n") == 0
        with listen("127.0.0.1") as second:  # the next free one
            assert second.getsockname()[1] != port
        said = CliRunner().invoke(cli, ["demo", "stream", "--no-open", "--port", str(port)])
        assert said.exit_code == 2 and "is in use" in said.output and "Traceback" not in said.output


def test_ports_that_need_rights(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(ValueError, match="needs rights"):
        listen("127.0.0.1", 80)


# -- what is shown next to an answer -------------------------------------------------------------------------
def test_the_truth_and_the_unpruned_answer_stand_next_to_it():
    from vtoken import tiny
    from vtoken.cli.stream import make_session

    loaded = tiny.load("qwen2_5_vl")
    desk = Desk(lambda strategy, budget: make_session(*loaded, strategy, budget, max_steps=4), speed=500.0)
    desk.play("synthetic://0?frames=40", "stc_pruner", 0.5)
    desk.player.wait_until(99)
    said = list(desk.answer("Which digit is shown now?"))[-1]
    stream, since, now = desk.player.labels(16.0, 19.5)
    assert (since, now) == (16.0, 19.5)
    assert said.truth == stream.answer_to("which digit is shown now?", 19.5, 16.0) is not None
    assert (
        said.unpruned and desk.talk[-1] == said and "40 frames" not in said.facts and "8 frames" in said.facts
    )
    assert list(desk.answer("what is here ?"))[-1].truth is None
    for name in ("star", "7", "red circle"):
        shown = any(
            name in (m.digit, m.shape, f"{m.colour} {m.shape}") for m in stream.moments(39) if m.stop > 32
        )
        assert stream.answer_to(f"was there a {name}?", 19.5, 16.0) == ("yes" if shown else "no")
    assert stream.answer_to("was there a cow?", 19.5, 16.0) is None
    assert desk.bound(desk.session.stats) == 4 * 36 >= desk.table().memory.max() > 0
    assert desk.session.stats["steps"] == 4
    desk.close()
    assert not desk.talk


def test_a_question_is_cut_and_a_stream_that_ends_meanwhile_is_a_sentence():
    session = SimpleNamespace(
        stream_answer=lambda text: (_ for _ in ()).throw(RuntimeError(f"closed {len(text)}"))
    )
    desk = Desk(lambda *_: session)
    desk.session, desk.player = session, SimpleNamespace(readings=[1])
    assert list(desk.answer("x" * 10**5))[-1] == replace(desk.talk[-1], answer="closed 500")
    assert len(desk.talk[-1].question) == 500


@pytest.mark.parametrize("which", ["closed", "open_to_sources"])
def test_an_event_names_no_file_of_this_machine(which, request, tmp_path):
    """gradio would copy what the mapping names into the page's folder, whatever the field is for."""
    page = request.getfixturevalue(which)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    visitor = Visitor(page)
    before = set(page.folder.rglob("*"))
    inside = page.folder / "link.png"
    inside.symlink_to(secret)
    for path in (
        secret,
        tmp_path,
        inside,
        page.folder,
        Path("/dev/zero"),
        "http://example.com/x.png",
        3,
        None,
    ):
        named = {
            "path": path if path is None or path == 3 else str(path),
            "meta": {"_type": "gradio.FileData"},
        }
        for data in ([named], [[{"deep": named}]], [{"url": "http://example.com/x.png"}]):
            body = {"fn_index": visitor.events["play"], "data": data, "session_hash": visitor.session}
            answer = visitor.http.post("gradio_api/queue/join", json=body)
            assert answer.status_code == 403 and "names no file" in answer.text
    inside.unlink()
    assert visitor.http.post("gradio_api/queue/join", content=b"{no json").status_code == 403
    assert set(page.folder.rglob("*")) == before


def test_uploads_on_their_way_count():
    """Many at once may not have more than the room together."""

    async def run():
        headers = [
            (b"host", b"localhost"),
            (b"content-length", b"60"),
            (b"content-type", b"multipart/form-data; boundary=x"),
        ]
        scope = dict(type="http", method="POST", path="/gradio_api/upload", query_string=b"", headers=headers)
        sent = []

        async def send(message):
            sent.append(message.get("status"))

        async def comes():
            await gate.wait()
            return {"type": "http.disconnect"}

        async def receive():
            return {"type": "http.request", "body": b""}

        first = asyncio.create_task(guard(scope, comes, send))
        await asyncio.sleep(0)
        await guard(scope, receive, send)
        assert sent[0] == 413
        gate.set()
        await first
        assert (
            guard.refusal("POST", "/gradio_api/upload", {"host": "localhost", "content-length": "60"}) is None
        )

    with private_folder() as folder:
        gate, guard = asyncio.Event(), Guard(None, uploads=Uploads(folder, 120))
        asyncio.run(run())
