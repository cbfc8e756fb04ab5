"""The site: every page is in the navigation, every error is on its page, links lead somewhere, and it builds."""

from __future__ import annotations

import ast
import html
import importlib.util
import re
import subprocess
import sys

import pytest

from .test_guides import ROOT

yaml = pytest.importorskip("yaml")
DOCS = ROOT / "docs"
STORED = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if p.parent.name != "measured"}


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site():
    """docs/generate_site.py, which imports the scripts beside it."""
    path = list(sys.path)
    yield script("generate_site")
    sys.path[:] = path


@pytest.fixture(scope="module")
def made(site):
    return site.pages()


def entries(nav):
    for entry in nav:
        ((_, value),) = entry.items()
        yield from entries(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation(made):
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = STORED | set(made)
    named = [
        p
        for e in entries(config["nav"])
        for p in sorted(pages)
        if p == e or (e[-1] == "/" and p.startswith(e))
    ]
    assert sorted(named) == sorted(pages), set(pages) ^ set(named)


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text)


def test_every_error_is_on_the_page_of_troubleshooting(made):
    """All literal words of each `raise X("...")`, in their order, found without the script that writes the page."""
    rows = [
        letters(html.unescape(row.split("|", 2)[2]))
        for row in made["troubleshooting.md"].splitlines()
        if "|" in row
    ]
    page, missing, count = "\n".join(rows), [], 0
    for file in sorted((ROOT / "vtoken").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else None
            first = call.args[0] if isinstance(call, ast.Call) and call.args else None
            parts = first.values if isinstance(first, ast.JoinedStr) else [first]
            said = [
                letters(p.value) for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)
            ]
            if re.search("[A-Za-z]{2}", "".join(said)):
                count += 1
                if not re.search(".*".join(map(re.escape, filter(None, said))), page):
                    missing.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert count > 700
    assert not missing


def test_errors_are_followed_to_their_texts(made):
    """Through names, conditions, and functions that make an error."""
    page = made["troubleshooting.md"]
    changed = r"\| `RuntimeError` \| … takes no KV cache: .*\| .*load the model anew, or unpatch it\. \|"
    assert re.search(changed, page)
    assert re.search(r"\| `TypeError or ValueError` \| .*, found … of shape … and …\. \|", page)
    assert "| `ValueError` | Selection.into must lie within \\[-1, …). |  |" in page


def test_every_public_room_is_in_the_reference(site):
    shown = {module for modules in site.REFERENCE.values() for module in modules}
    rooms = [p.parent for p in (ROOT / "vtoken").rglob("__init__.py") if "__all__ =" in p.read_text("utf-8")]
    inner = {"vtoken.kernels.triton"}
    assert {".".join(r.relative_to(ROOT).parts) for r in rooms} - inner <= shown
    assert "patch" in site.exported("vtoken") and "video" not in site.exported("vtoken")


@pytest.mark.parametrize(
    "page, written, link",
    [
        ("index.md", "[a](docs/video.md#x)", "[a](video.md#x)"),
        ("contributing.md", "[a](AGENTS.md)", "[a](REPO/blob/main/AGENTS.md)"),
        (
            "board.md",
            "[a](board), [b](https://x.y), [c](#z)",
            "[a](REPO/tree/main/docs/board), [b](https://x.y), [c](#z)",
        ),
        ("strategies/hired.md", "[a](../board.md)", "[a](../board.md)"),
        ("start.md", "[a](../CHANGELOG.md), [b](../nowhere.md)", "[a](changelog.md), [b](../nowhere.md)"),
        (
            "start.md",
            "`[a](../LICENSE)`\n```\n[a](../LICENSE)\n```",
            "`[a](../LICENSE)`\n```\n[a](../LICENSE)\n```",
        ),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page, written, link):
    hooks = script("site_hooks")
    shown = STORED | set(hooks.PAGES.values())
    assert hooks.relinked(written, page, shown) == link.replace("REPO", hooks.REPOSITORY)


@pytest.mark.site
def test_it_builds_strictly(tmp_path):
    """As `make site` does, without a network, and no page asks another host for anything."""
    pytest.importorskip("mkdocs_gen_files", reason="the site needs pip install 'vtoken[docs]'")
    pytest.importorskip("material")
    offline = "import socket, sys; socket.socket.connect = socket.getaddrinfo = None; from mkdocs.__main__ import cli; "
    build = f"{offline} cli(['build', '--strict', '--site-dir', {str(tmp_path)!r}])"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    loads = re.compile(
        r'<(?:script|img|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="?https?://[^" >]+'
    )
    assert len(pages) > 80 and not [found for p in pages for found in loads.findall(p.read_text("utf-8"))]
    assert "vtoken.patch" in (tmp_path / "reference/vtoken/index.html").read_text(encoding="utf-8")
