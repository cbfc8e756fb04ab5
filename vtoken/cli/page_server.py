"""Serves a page: its socket, server and folder, and an access token on any host but loopback."""

from __future__ import annotations

import errno
import ipaddress
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .options import console
from .page_guard import LOOPBACK, Guard
from .page_shares import Events, Shares
from .page_uploads import Uploads

FIRST_PORT, PORTS = 7860, 100
MAX_CONNECTIONS = 256
MAX_OF_ADDRESS = MAX_CONNECTIONS // 2


def listen(host: str, port: int | None = None) -> socket.socket:
    """A listening socket.

    Args:
        host: a name or address of this machine.
        port: None for a free one from 7860.

    Raises:
        ValueError: for a host that this machine does not have, or a port that cannot be had.
    """
    if port is not None and not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, found {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, ValueError):
        raise ValueError(
            f"--host {host!r} is no known name or address: use 127.0.0.1, for instance."
        ) from None
    for number in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        try:
            return socket.create_server((address[0], number), family=family, backlog=128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"Port {port} of {host} is in use: choose another --port, or none."
                ) from None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise ValueError(
                    f"Port {port} of {host} needs rights that you do not have: use 1024 or more."
                ) from None
            raise ValueError(
                f"This machine cannot serve on --host {host!r}: {error.strerror or error}."
            ) from None
    raise ValueError(f"Ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} of {host} are in use: choose a --port.")


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for all files of a page built in the block, then removed; gradio sends no telemetry."""
    names = ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_SHARE")
    before = {name: os.environ.pop(name, None) for name in names}
    with tempfile.TemporaryDirectory(prefix="vtoken-page-", ignore_cleanup_errors=True) as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", GRADIO_SHARE="False")
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def connections() -> Any:
    """The server's class of a connection, with a bounded number for each address, silent ones among them."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    parent: Any = AutoHTTPProtocol

    class Connection(parent):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            address = (self.client or ("",))[0]
            if sum((other.client or ("",))[0] == address for other in self.connections) > MAX_OF_ADDRESS:
                transport.close()

    return Connection


def mounted(page: Any, address: str, port: int, max_upload: int, css: str) -> Any:
    """The page as an ASGI application that serves nothing else; arguments as of `Service`."""
    import gradio as gr
    from fastapi import FastAPI

    fonts = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    bare = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page.state_session_capacity = MAX_CONNECTIONS  # sessions whose fields gradio remembers
    app = gr.mount_gradio_app(
        bare,
        page,
        "/",
        server_name=address,
        server_port=port,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=max_upload or MAX_CONNECTIONS,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=fonts,
        css=css,
    )
    page.has_launched = True  # else gradio serves events files of this machine that nobody uploaded
    return app


class Service:
    """The page and its guard on a listening socket.

    Args:
        page: a `gradio.Blocks`.
        listening: the socket; any address but loopback gets a token.
        host: the requested name.
        hosts: further names under which a browser may reach it.
        uploads: folder for uploaded files, None to take none.
        max_upload: bytes that they may have together, and half of that those from one address.
        css: style sheet of the page.

    Attributes:
        url: address of the page, with the token if there is one.
        token: None on loopback.
        guard: the ASGI application.
    """

    def __init__(
        self,
        page: Any,
        listening: socket.socket,
        host: str = "127.0.0.1",
        hosts: tuple[str, ...] = (),
        uploads: Path | None = None,
        max_upload: int = 0,
        css: str = "",
    ) -> None:
        import uvicorn

        address, port = listening.getsockname()[:2]
        known = LOOPBACK | {host.lower(), *(name.lower() for name in hosts)}
        self.token = None
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            self.token = secrets.token_urlsafe(24)
            known |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # all addresses of this machine
        name = f"[{name}]" if ":" in name else name
        self.url = f"http://{name}:{port}/" + (f"?token={self.token}" if self.token else "")
        app = mounted(page, address, port, max_upload, css)
        events = Events(page._queue)
        most = (page._queue.max_size or MAX_CONNECTIONS) // 2
        shares = Shares(events.pending, most, events.unread, events.forget)
        taken = None if uploads is None else Uploads(uploads, max_upload, page.upload_file_set)
        self.guard = Guard(app, frozenset(known), self.token, taken, shares)
        config = uvicorn.Config(
            self.guard,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=connections(),
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=2,
        )
        self._server, self._listening = uvicorn.Server(config), listening
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until interrupted."""
        self._server.run(sockets=[self._listening])

    def start(self) -> None:
        """Serve in a thread."""
        self._thread = threading.Thread(target=self.run, name="vtoken-page", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)

    def stop(self) -> None:
        """End the server that `start` began."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._listening.close()


def serve(service: Service, may: str, warning: str = "", show: bool = True) -> None:
    """Print the address of the page and its audience, open it in a browser, and serve until interrupted.

    Args:
        may: what whoever has the address can do, in words.
        warning: a further sentence for the operator; none if empty.
        show: whether to open it.
    """
    out = console()
    out.print(f"The page is at {service.url} (Ctrl+C ends it).", highlight=False, soft_wrap=True)
    if service.token is not None:
        out.print(
            "Warning: other machines can reach this page by the addresses of this one. Whoever has the"
            f" address with its token can {may}; it travels unencrypted.",
            style="yellow",
        )
    if warning:
        out.print(warning, style="yellow")
    if show:
        import webbrowser

        webbrowser.open(service.url)
    with suppress(KeyboardInterrupt):
        service.run()
