"""Hooks of the site: pages of other folders in the navigation, and links that leave docs/.

Pages link to files as they lie in the repository, so that they can be read there too. On the site a link to a
page stays one, and every other link leads to the file in the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPOSITORY = re.search(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[1]
# files of the repository's root that are pages of the site
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
NOTE = re.compile(r"\A<!--.*?-->\s*", re.S)
LINK = re.compile(r"```.*?^ *```|`[^`\n]+`|(\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", re.M | re.S)


def on_files(files: Any, config: Any) -> None:
    """A folder of the navigation, written `name/`, becomes its pages."""
    pages = [file.src_uri for file in files.documentation_pages()]
    config.nav = _unfolded(config.nav, pages)


def _unfolded(nav: list[Any], pages: list[str]) -> list[Any]:
    out = []
    for entry in nav:
        ((title, value),) = entry.items() if isinstance(entry, dict) else [(None, entry)]
        if isinstance(value, list):
            value = _unfolded(value, pages)
        elif value.endswith("/"):
            inside = [page for page in pages if page.startswith(value)]
            value = sorted(inside, key=lambda page: (posixpath.basename(page) != "README.md", page))
        out.append({title: value} if title else value)
    return out


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    shown = {file.src_uri for file in files if file.inclusion.is_included()}
    markdown = NOTE.sub("", markdown)  # so that the heading, which the navigation shows, comes first
    return relinked(markdown, page.file.src_uri, shown)


def relinked(markdown: str, page: str, shown: set[str]) -> str:
    """The text of a page with its links as the site needs them.

    Args:
        markdown: links are relative to the file's place in the repository.
        page: path of the page in docs/.
        shown: paths in docs/ of everything that the site has.
    """
    source = next((file for file, own in PAGES.items() if own == page), f"docs/{page}")

    def link(match: re.Match[str]) -> str:
        if match[1] is None:  # code
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        own = PAGES.get(target, target.removeprefix("docs/"))
        if own in shown and (target in PAGES or target.startswith("docs/")):
            place = posixpath.relpath(own, posixpath.dirname(page) or ".")
        elif (ROOT / target).exists():
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            place = f"{REPOSITORY}/{kind}/main/{target}"
        else:
            place = match[2]  # for the check of links to find
        return f"]({place}{match[3] or ''})"

    return LINK.sub(link, markdown)
