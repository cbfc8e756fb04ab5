"""Pages in a browser that note what they ask of other sites."""

from __future__ import annotations

from typing import Any


def opened(browser: Any, address: str, ready: str, **kwargs: Any) -> tuple[Any, list[str]]:
    """A page in a context of its own once `ready` is there, and what it asked of other sites."""
    page, foreign = browser.new_context(**kwargs).new_page(), []
    page.on(
        "request",
        lambda r: foreign.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None,
    )
    page.goto(address)
    page.locator(ready).first.wait_for(timeout=60_000)
    return page, foreign
