"""Filter of requests to a page: known routes, same origin, bounded size, and the token if there is one."""

from __future__ import annotations

import ipaddress
import json
import secrets
from collections.abc import Callable
from contextlib import nullcontext
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .page_bodies import again, body_of, drain, in_time, stated_length
from .page_shares import MAX_NAME, Shares, session_of
from .page_uploads import Uploads, files_named

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
JOIN, DATA, UPLOAD = "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/upload"
READ = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", DATA)
READ_UNDER = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
WRITE = (JOIN, "/gradio_api/cancel", "/gradio_api/reset")
MAX_BODY = 64 * 2**10  # bytes of a request that is no upload
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


class Guard:
    """An ASGI application that passes on the page's own requests and refuses all others in one sentence.

    Args:
        app: the page.
        hosts: names that requests may address (`Host`), and addresses such as 192.168.1.5 if there is a
            token.
        token: required of visitors; None for loopback.
        uploads: takes uploaded files, in place of the page; None to take none.
        shares: limits for one visitor; None for no limit on events.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        hosts: frozenset[str] = LOOPBACK,
        token: str | None = None,
        uploads: Uploads | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.app, self.hosts, self.token, self.uploads = app, hosts, token, uploads
        self.shares = shares or Shares(lambda session: 0, queue=1)

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        receive = in_time(receive, stated_length(headers) or 0)
        refusal = self.refusal(scope["method"], scope["path"], headers, _address(scope))
        if refusal is not None:
            await drain(receive)
            return await _answer(send, *refusal)
        if self.token is not None and not self._knows_token(headers):
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                await drain(receive)
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

        # no other request runs between the look at the room and the count of this one
        length = (stated_length(headers) or 0) if scope["path"] == UPLOAD else 0
        with self.uploads.under_way(_address(scope), length) if self.uploads else nullcontext():
            await self._within(scope, receive, answer)

    async def _within(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        """Pass a request on unless its visitor has too many open or waiting requests."""
        shares, address, reads = self.shares, _address(scope), ""
        if scope["path"] == DATA:
            reads = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[-1]
        shares.open[address] += 1
        shares.read[reads] += 1
        try:
            if shares.open[address] > MAX_OPEN:
                await drain(receive)
                return await _answer(send, 429, "Your address has too many requests open: close some pages.")
            if scope["method"] == "POST" and scope["path"] == UPLOAD:
                return await self._upload(scope, receive, send)
            if scope["method"] == "POST" and scope["path"] == JOIN:
                body = await body_of(receive)
                refusal = self._refused_event(body, address)
                if refusal is not None:
                    return await _answer(send, *refusal)
                receive = again(body, receive)
            await self.app(scope, receive, send)
        finally:
            for counted, name in ((shares.open, address), (shares.read, reads)):
                counted[name] -= 1
                if not counted[name]:
                    del counted[name]

    async def _upload(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        """Keep a file and answer as gradio does."""
        assert self.uploads is not None
        try:
            path = await self.uploads.take(scope, receive)
        except ValueError as error:
            return await _answer(send, 400, str(error))
        await _answer(send, 200, json.dumps([path]), {"content-type": "application/json"})

    def _refused_event(self, body: bytes, address: str) -> tuple[int, str] | None:
        """Status and sentence for an event that names a file or a session that it may not, or is too much."""
        named, session = files_named(body), session_of(body)
        if named is None or not (self.uploads.may_name(named) if self.uploads else not named):
            return 403, "An event names no file but one that was uploaded here."
        if session is not None and len(session) > MAX_NAME:
            return 403, f"The name of a session has {MAX_NAME} characters at most."
        if self.shares.takes_too_much(address, body):
            return 429, "Too much that you asked for is still waiting: try again later."
        return None

    def refusal(
        self, method: str, path: str, headers: dict[str, str], address: str = ""
    ) -> tuple[int, str] | None:
        """Status and sentence for a request that is refused, None for one that is passed on.

        Args:
            headers: with names in lower case.
            address: of the visitor.
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
        foreign = origin is not None and _netloc(origin) != host.lower()
        if foreign or (site in ("cross-site", "same-site") and (method, path) != ("GET", "/")):
            return 403, "Requests from other sites are refused."
        if method in ("GET", "HEAD"):
            known = path in READ or path.startswith(READ_UNDER)
            return None if known and ".." not in path.split("/") else (404, "There is no such page.")
        if method != "POST" or not (path in WRITE or (path == UPLOAD and self.uploads is not None)):
            return 404, "There is no such page."
        length = stated_length(headers)
        if length is None:
            return 411, "A request says how long it is."
        if path == UPLOAD:
            assert self.uploads is not None
            if length > self.uploads.room(address):
                most = self.uploads.most
                return (413, f"That is too large: uploads may have {most} bytes, half from one address.")
        elif length > MAX_BODY:
            return 413, f"That is too large: a request may have {MAX_BODY} bytes."
        return None

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


def _address(scope: dict[str, Any]) -> str:
    return (scope.get("client") or ("",))[0]


def _netloc(origin: str) -> str | None:
    """The host and port of an origin, None if it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


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
