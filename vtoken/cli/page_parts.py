"""Parts of the pages, as HTML."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any


def picture_html(picture: Any, alt: str) -> str:
    """A PIL picture embedded in a page, with its alternative text: no file is written for it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'
