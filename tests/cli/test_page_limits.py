"""What one visitor can make the server of a page hold, open and wait for, on a real socket."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from asyncio import Queue
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from tests.cli.serving import Visitor, served, until
from vtoken.cli.page_guard import MAX_BODY

ROOM = 400_000


@pytest.fixture(scope="module")
def page():
    with served(room=ROOM, most=3) as service:
        yield service


def head(page, path: str, length: int, *more: str) -> bytes:
    host = page.url.removeprefix("http://").partition("/")[0]
    lines = [f"POST /gradio_api/{path} HTTP/1.1", f"Host: {host}", f"Content-Length: {length}", *more, "", ""]
    return "\r\n".join(lines).encode()


def connected(page) -> socket.socket:
    return socket.create_connection(page._listening.getsockname()[:2], timeout=60)


def said(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with suppress(ConnectionError):
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


FORM = "Content-Type: multipart/form-data; boundary=x"


def part(data: bytes, field: str = "files", name: str = "a.mp4") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode() + data


def files(page) -> list[Path]:
    return [f for f in page.folder.rglob("*") if f.is_file()]


# -- bodies --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["queue/join", "upload", "reset"])
def test_a_body_in_chunks_is_as_long_as_it_says(page, path):
    """The server reads chunks to their end, whatever length stands beside them."""
    with connected(page) as connection:
        connection.sendall(head(page, path, 10, FORM, "Transfer-Encoding: chunked"))
        with suppress(ConnectionError):
            for _ in range(3 * MAX_BODY // 2**12):
                connection.sendall(b"1000\r\n" + b" " * 2**12 + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        assert said(connection).startswith(b"HTTP/1.1 411")


@pytest.mark.parametrize("path", ["queue/join", "upload", "run/play"])
def test_a_body_that_does_not_come_is_not_waited_for(page, monkeypatch, path):
    monkeypatch.setattr("vtoken.cli.page_bodies.PATIENCE", 0.1)
    with connected(page) as connection:
        connection.sendall(head(page, path, 60, FORM) + b"{")
        connection.settimeout(30)
        assert said(connection)[:10] in (b"HTTP/1.1 4", b"")
    assert not page.guard.shares.open


def test_names_that_no_file_can_have_are_refused(page):
    visitor = Visitor(page)
    for path in (
        "/" + "a" * 5000,
        f"{page.folder}/{'a' * 300}",
        f"{page.folder}/\0",
        f"{page.folder}/\ud800",
    ):
        named = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"fn_index": visitor.events["upload"], "data": [named], "session_hash": visitor.session}
        answer = visitor.http.post("gradio_api/queue/join", content=json.dumps(body))
        assert answer.status_code == 403, path
    assert visitor.http.get("config", headers={"origin": "http://[x"}).status_code == 403


def test_an_event_is_read_in_one_way_only(page):
    """What two parsers of JSON may read differently is refused, whichever the server uses."""
    http = Visitor(page).http
    for body in (
        b'{"data": [], "data": [{"path": "/etc/passwd"}], "fn_index": 0, "session_hash": "x"}',
        b'{"data": [NaN], "fn_index": 0, "session_hash": "x"}',
        '{"data": [], "fn_index": 0, "session_hash": "x"}'.encode("utf-16"),
        b'{"data": ' + b"[" * 200 + b"]" * 200 + b', "fn_index": 0, "session_hash": "x"}',
    ):
        assert http.post("gradio_api/queue/join", content=body).status_code == 403


# -- uploads -------------------------------------------------------------------------------------------------
def test_an_upload_that_breaks_off_leaves_nothing(page):
    with connected(page) as connection:
        connection.sendall(head(page, "upload", 9000, FORM) + part(b"x" * 5000))
        until(lambda: page.guard.shares.open)
    until(lambda: not page.guard.shares.open)
    assert not files(page)


@pytest.mark.parametrize("body", [
    part(b"x" * 5000, "other") + b"\r\n--x--\r\n",
    part(b"", name="1") + b"\r\n" + part(b"", name="2") + b"\r\n--x--\r\n",
    b"".join(part(b"", name=str(i)) + b"\r\n" for i in range(900)),
    part(b"x" * 100), b"", b"--x\r\nno header",
])  # fmt: skip
def test_an_upload_is_one_file(page, body):
    with connected(page) as connection:
        connection.sendall(head(page, "upload", len(body), FORM, "Connection: close") + body)
        assert said(connection).startswith(b"HTTP/1.1 400")
    assert not files(page)


def send(page, data: bytes = b"x", name: str = "a.mp4", **more) -> httpx.Response:
    return Visitor(page).http.post("gradio_api/upload", files={"files": (name, data)}, **more)


def test_uploads_of_one_address_leave_room_for_others(page):
    paths = []
    while (answer := send(page, b"x" * 60_000)).status_code == 200:
        paths += answer.json()
    assert answer.status_code == 413 and len(paths) == 3
    assert page.guard.uploads.room("192.0.2.7") > ROOM // 3
    for path in paths:
        Path(path).unlink()
    count = 0
    while (answer := send(page, b"")).status_code == 200:
        count += 1
        assert count < 200, "empty files have no bound"
    assert answer.status_code == 413
    assert page.guard.uploads.room("192.0.2.7")
    for file in files(page):
        file.unlink()


def test_a_file_that_no_event_names_goes(page, monkeypatch):
    kept = send(page).json()[0]
    visitor = Visitor(page)
    named = {"path": kept, "meta": {"_type": "gradio.FileData"}}
    assert visitor.press("upload", named)[0] == kept
    lost = send(page).json()[0]
    monkeypatch.setattr("vtoken.cli.page_uploads.UNNAMED", 0.0)
    time.sleep(0.01)
    page.guard.uploads.room("")
    assert Path(kept).is_file() and not Path(lost).exists()
    assert not [f for f in page.folder.iterdir() if f.is_file()]  # gradio makes an empty one per event
    visitor.press("stop")
    page.guard.uploads.room("")
    assert not [*page.folder.iterdir()]


def test_equal_files_of_two_visitors_are_two(page):
    one, two = send(page, b"same").json()[0], send(page, b"same").json()[0]
    assert one != two and len(Path(one).parent.name) >= 32 and Path(one).name == "a.mp4"
    for name in ("../../up.mp4", "/etc/x", "..", "", "a\0b", "a" * 400 + ".mp4", "\u2603 %03d.mp4"):
        path = Path(send(page, b"x", name or "x").json()[0])
        assert path.parent.parent == page.folder and path.is_file()
    for file in files(page):
        file.unlink()


def test_upload_progress_is_not_told(page):
    """gradio keeps each name that anybody asks for."""
    http = Visitor(page).http
    assert http.get("gradio_api/upload_progress", params={"upload_id": "x"}).status_code == 404


# -- sessions ------------------------------------------------------------------------------------------------
def join(visitor: Visitor, session: str, name: str = "pause", *data) -> httpx.Response:
    body = {"fn_index": visitor.events[name], "data": list(data), "session_hash": session}
    return visitor.http.post("gradio_api/queue/join", json=body)


def test_answers_that_nobody_reads_are_bounded(page, monkeypatch):
    monkeypatch.setattr("vtoken.cli.page_shares.MAX_UNREAD", 12)
    monkeypatch.setattr("vtoken.cli.page_shares.MAX_IDLE", 5)
    visitor, queue = Visitor(page), page.page._queue
    for _ in range(30):
        answer = join(visitor, "deaf")
        until(lambda: not page.guard.shares.pending("deaf"))
    assert answer.status_code == 429 and queue.pending_messages_per_session["deaf"].qsize() < 20
    for i in range(20):
        assert join(visitor, f"one of many {i}").status_code == 200
        until(lambda i=i: not page.guard.shares.pending(f"one of many {i}"))
    for held in (queue.pending_messages_per_session, queue.pending_event_ids_session):
        assert len([name for name in held if name.startswith(("deaf", "one"))]) <= 7
    assert "press Play first" in visitor.press("ask", "who ?")[1]


def test_a_session_that_is_read_is_not_forgotten(page, monkeypatch):
    monkeypatch.setattr("vtoken.cli.page_shares.MAX_IDLE", 0)
    visitor, other = Visitor(page), Visitor(page)
    with visitor.here():
        answer = join(visitor, visitor.session)
        with visitor.http.stream("GET", f"gradio_api/queue/data?session_hash={visitor.session}") as stream:
            lines = stream.iter_lines()
            for _ in range(5):
                other.press("pause")
            assert any(answer.json()["event_id"] in line and "completed" in line for line in lines)


def test_a_session_has_a_short_name(page):
    visitor = Visitor(page)
    for name in ("x" * 65, "x" * 60_000):
        answer = join(visitor, name)
        assert answer.status_code == 403 and name not in page.page._queue.pending_event_ids_session
    assert page.page.state_session_capacity <= 1000


def test_sessions_of_others_do_not_end_the_queue(page, monkeypatch):
    """gradio forgets the messages of its oldest session, and stops for good where that still waits."""
    visitor, go = Visitor(page), threading.Event()
    buttons = page.page.fns[visitor.events["pause"]].fn.__self__
    monkeypatch.setattr(buttons.desks, "of", lambda browser: go.wait(60) and None)
    try:
        for _ in range(6):
            assert join(visitor, "waits").status_code == 200
        for i in range(2500):
            page.page._queue.pending_messages_per_session[f"other {i}"] = Queue()
    finally:
        go.set()
    until(lambda: not page.guard.shares.pending("waits"))
    assert not page.page._queue.stopped and "press Play first" in visitor.press("ask", "who ?")[1]


# -- connections ---------------------------------------------------------------------------------------------
def test_connections_of_one_address_are_bounded(monkeypatch):
    monkeypatch.setattr("vtoken.cli.page_server.MAX_OF_ADDRESS", 5)
    with served() as service, ExitStack() as held:
        silent = [held.enter_context(connected(service)) for _ in range(9)]
        until(lambda: len(service._server.server_state.connections) == 5)
        for connection in silent[5:]:
            assert said(connection) == b""
        silent[0].close()
        until(lambda: len(service._server.server_state.connections) == 4)
        assert Visitor(service).opened.status_code == 200


def test_open_files_do_not_grow(page):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    if before is None:
        pytest.skip("no /proc here")
    body = b"".join(part(b"", name=str(i)) + b"\r\n" for i in range(800))
    with connected(page) as connection:
        connection.sendall(head(page, "upload", len(body) + 10, FORM) + body)
        time.sleep(0.5)
        assert len(os.listdir("/proc/self/fd")) < before + 50
