"""Filter of requests to a page: known routes, same origin, bounded size, and the token if there is one."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections import Counter
from collections.abc import Callable
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .page_uploads import names_other_files

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
READ = (
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
    "/gradio_api/queue/data",
)
READ_UNDER = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
JOIN = "/gradio_api/queue/join"
WRITE = (JOIN, "/gradio_api/cancel", "/gradio_api/reset")
UPLOAD, PROGRESS = "/gradio_api/upload", "/gradio_api/upload_progress"
MAX_BODY = 64 * 2**10  # bytes of a request that is no upload
MAX_DRAINED = 2**20
MAX_PENDING = 16  # events of one browser that wait or run
MAX_OPEN = 64  # requests of one address at a time; a page takes two or three
COOKIE = "vtoken_token"
HEADERS = {
    # the page loads nothing from elsewhere; gradio's plots compile their own scripts
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self'"
        " data:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; media-src 'self' blob:;"
        " worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors"
        " 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Shares:
    """Limits on one visitor's share of the queue and of the connections.

    Args:
        pending: tells how many events of a session wait or run.
        queue: events that one address may have waiting or running, whatever number of sessions it says it
            has.
    """

    def __init__(self, pending: Callable[[str], int], queue: int) -> None:
        self.pending, self.queue = pending, queue
        self.open: Counter[str] = Counter()
        self._sessions: dict[str, set[str]] = {}

    def takes_too_much(self, address: str, body: bytes) -> bool:
        """Whether this event exceeds the limit of its session or address; counts it if not."""
        try:
            session = json.loads(body)["session_hash"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return False  # gradio refuses it
        if not isinstance(session, str):
            return False
        known = {s for s in self._sessions.pop(address, set()) if self.pending(s)}
        full = self.pending(session) >= MAX_PENDING or sum(map(self.pending, known)) >= self.queue
        if known or not full:
            self._sessions[address] = known if full else known | {session}
        return full


class Guard:
    """An ASGI application that passes on the page's own requests and refuses all others in one sentence.

    Args:
        app: the page.
        hosts: names that requests may address (`Host`), and addresses such as 192.168.1.5 if there is a
            token.
        token: required of visitors; None for loopback.
        uploads: the folder that uploaded files go to; None to take none.
        max_upload: bytes of one upload, and of all that lie in the folder.
        shares: limits for one visitor; None for no limit on events.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        hosts: frozenset[str] = LOOPBACK,
        token: str | None = None,
        uploads: Path | None = None,
        max_upload: int = 0,
        shares: Shares | None = None,
    ) -> None:
        self.app, self.hosts, self.token = app, hosts, token
        self.shares = shares or Shares(lambda session: 0, queue=1)
        self.uploads, self.max_upload = uploads, max_upload
        self._coming = 0  # bytes of uploads on their way

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refusal = self.refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await _drain(receive)
            return await _answer(send, *refusal)
        if self.token is not None and not self._knows_token(headers):
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                await _drain(receive)
                return await _answer(
                    send, 403, "Open the address with the token that the command of this page has printed."
                )
            cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Lax; Path=/"
            return await _answer(send, 303, "", {"location": "/", "set-cookie": cookie})

        async def answer(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(k, v) for k, v in message["headers"] if k.decode().lower() not in HEADERS]
                message = message | {"headers": own + [(k.encode(), v.encode()) for k, v in HEADERS.items()]}
            await send(message)

        length = int(headers["content-length"]) if scope["path"] == UPLOAD else 0
        self._coming += length  # no other request runs between the look at the room and this line
        try:
            await self._within(scope, receive, answer)
        finally:
            self._coming -= length

    async def _within(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        """Pass a request on unless its visitor has too many open or waiting requests, or names a file."""
        shares, address = self.shares, (scope.get("client") or ("",))[0]
        shares.open[address] += 1
        try:
            if shares.open[address] > MAX_OPEN:
                await _drain(receive)
                return await _answer(send, 429, "Your address has too many requests open: close some pages.")
            if scope["method"] == "POST" and scope["path"] == JOIN:
                body = await _body(receive)
                if names_other_files(body, self.uploads):
                    return await _answer(send, 403, "An event names no file but one that was uploaded here.")
                if shares.takes_too_much(address, body):
                    return await _answer(
                        send, 429, "Too much that you asked for is still waiting: try again later."
                    )
                receive = _again(body, receive)
            await self.app(scope, receive, send)
        finally:
            shares.open[address] -= 1
            if not shares.open[address]:
                del shares.open[address]

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and sentence for a request that is refused, None for one that is passed on.

        Args:
            headers: with names in lower case.
        """
        host = headers.get("host", "")
        if not self._is_own(host):
            return (
                421,
                (
                    "This server does not go by that name: use the address that the command of this page has"
                    " printed."
                ),
            )
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if foreign or (site in ("cross-site", "same-site") and (method, path) != ("GET", "/")):
            return 403, "Requests from other sites are refused."
        if method in ("GET", "HEAD"):
            known = (
                path in READ or path.startswith(READ_UNDER) or (path == PROGRESS and self.uploads is not None)
            )
            return None if known and ".." not in path.split("/") else (404, "There is no such page.")
        if method != "POST" or not (path in WRITE or (path == UPLOAD and self.uploads is not None)):
            return 404, "There is no such page."
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            return 411, "A request says how long it is."
        if int(length) > (self._room() if path == UPLOAD else MAX_BODY):
            return (
                413,
                (
                    f"That is too large: uploads may have {self.max_upload} bytes together, other requests"
                    f" {MAX_BODY}."
                ),
            )
        return None

    def _room(self) -> int:
        """Bytes that may still be uploaded."""
        assert self.uploads is not None
        held = sum(f.stat().st_size for f in self.uploads.rglob("*") if f.is_file())
        return self.max_upload - held - self._coming

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self.hosts:
            return True
        if self.token is None:
            return False
        try:  # a page of another site that makes its name point here sends its name
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _knows_token(self, headers: dict[str, str]) -> bool:
        assert self.token is not None
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except Exception:
            cookie = None
        given = headers.get("authorization", "").removeprefix("Bearer ") if cookie is None else cookie.value
        return secrets.compare_digest(given.encode(), self.token.encode())


async def _drain(receive: Callable[..., Any]) -> None:
    """Read a small body to its end: a client that still writes at the close does not read the answer."""
    taken, more = 0, True
    while more and taken <= MAX_DRAINED:
        message = await receive()
        taken += len(message.get("body", b""))
        more = message.get("more_body", False)


async def _body(receive: Callable[..., Any]) -> bytes:
    """The body of a request, which the server ends at its stated length."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Callable[..., Any]) -> Callable[..., Any]:
    """A `receive` that first gives a body that was read already, then continues with the connection."""
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return given.pop() if given else await receive()

    return again


async def _answer(
    send: Callable[..., Any], status: int, sentence: str, more: dict[str, str] | None = None
) -> None:
    headers = {
        "content-type": "text/plain; charset=utf-8",
        "cache-control": "no-store",
        "connection": "close",
    }
    pairs = [(k.encode(), v.encode()) for k, v in (HEADERS | headers | (more or {})).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": sentence.encode()})
