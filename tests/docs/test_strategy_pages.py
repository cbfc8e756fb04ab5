"""Every strategy has a page, and no page is stale."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtoken.strategies import Random, list_names, strategy_info

DOCS = Path(__file__).parents[2] / "docs"


def generator(name="generate_strategy_pages"):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = generator().pages()
NAMES = [n for n in list_names() if strategy_info(n).cls.__module__.startswith("vtoken.")]


def test_there_is_a_page_for_every_strategy_and_none_besides():
    assert (
        {f"{n}.md" for n in NAMES} | {"README.md"}
        == set(PAGES)
        == {p.name for p in (DOCS / "strategies").iterdir()}
    )


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_would_be_written_now(name):
    fresh = (DOCS / "strategies" / name).read_text(encoding="utf-8") == PAGES[name]
    assert fresh, f"docs/strategies/{name} is stale: run python docs/generate_strategy_pages.py"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_says_what_a_reader_needs(name):
    info, page = strategy_info(name), PAGES[f"{name}.md"]
    assert info.summary in page and info.paper in page
    own = "a method of this project" in page
    assert info.baseline or own or (info.paper and info.code and info.differs), (
        "published methods name paper, code and differences"
    )
    assert info.experimental == ("**Experimental:**" in page)
    for option, value in info.defaults.items():
        assert f"| `{option}` | `{value!r}` |" in page
    assert f'vtoken.patch(model, "{name}"' in page


def test_the_page_shows_what_is_kept():
    """Every strategy has a picture or a reason for none."""
    kept = generator("generate_kept")
    told = json.loads(kept.FACTS.read_text(encoding="utf-8"))
    drawn = {name for name in told if "none" not in told[name]}
    assert set(told) == set(NAMES) and len(drawn) > len(NAMES) / 2
    assert drawn == {path.stem for path in kept.FOLDER.glob("*.webp")}
    for name in NAMES:
        assert (f"(../kept/{name}.webp)" in PAGES[f"{name}.md"]) == (name in drawn)


BY_DEFAULT = ("hired", "fastv", "vidkv", "tome")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in BY_DEFAULT else pytest.mark.product) for n in NAMES]
)
def test_the_picture_is_what_would_be_drawn_now(name):
    pytest.importorskip("timm" if name in ("tome", "tempme") else "skimage")
    kept = generator("generate_kept")
    picture, facts = kept.draw(name)
    assert facts == json.loads(kept.FACTS.read_text(encoding="utf-8"))[name]
    if picture is None:
        assert "none" in facts
        return
    with Image.open(kept.FOLDER / f"{name}.webp") as shown:
        difference = np.abs(np.asarray(shown.convert("RGB"), float) - np.asarray(picture, float))
    assert difference.mean() < 8  # of 255: it is compressed


def test_a_class_without_a_docstring_has_its_summary_for_an_idea():
    module = generator()

    @dataclass
    class Bare(Random):
        kept: int = 0

    assert Bare.__doc__.startswith("Bare(") and module.parse(Bare)[0] == ""
    info = replace(strategy_info("random"), cls=Bare)
    assert f"## Idea\n\n{info.summary}\n" in module.page(info)
