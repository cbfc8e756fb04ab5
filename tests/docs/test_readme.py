"""README.md: its tables are fresh, its links exist, its code runs, its report is the printed one."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import vtoken
from tests.video.media import write
from vtoken import tiny
from vtoken.adapters.registry import list_families

from .test_guides import ROOT, run

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))),
]


def generator():
    spec = importlib.util.spec_from_file_location("generate_readme", ROOT / "docs" / "generate_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/families.md", "docs/choosing.md"])
def test_tables_are_fresh(page):
    make, text = generator(), (ROOT / page).read_text(encoding="utf-8")
    assert text == make.filled(page, *make.PAGES[page]), f"{page} is stale: run docs/generate_readme.py"
    shown = {"README.md": vtoken.list_strategies() + list_families(), "docs/families.md": list_families()}
    names = shown.get(page, ["farcover", "mmtok"])
    assert all(f"`{name}`" in text for name in names)


def test_every_family_was_seen_to_work():
    """Each model type has images in docs/families.json, which the matrix compares with what happens."""
    make = generator()
    known = json.loads(make.FAMILIES.read_text(encoding="utf-8"))
    assert set(known) == set(list_families())
    for abilities in known.values():  # the README says these of every family
        assert {"image", "several", "ragged", "selection"} <= set(abilities)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
        if "://" not in target:
            assert (Path(ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_code_runs(monkeypatch, tmp_path):
    model, _ = tiny.load("llava")
    ids = torch.full((1, 150), 5)
    ids[0, 2:146] = model.config.image_token_id
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(1, 3, 96, 96),
    }
    monkeypatch.chdir(tmp_path)
    image = Image.new("RGB", (96, 96))
    stream = {"source": "synthetic://0?fps=2&frames=3", "somebody_asks": lambda: True}
    stream["clip"] = str(write(tmp_path / "clip.mp4", 40))
    run("README.md", monkeypatch, model=model, inputs=inputs, image=image, folder=tmp_path, **stream)
    assert (tmp_path / "kept.png").is_file() and (tmp_path / "vtoken_config.json").is_file()
    assert vtoken.patching.patch_of(model).strategy.describe() == "hired(budget=0.2, alpha=0.4)"


def test_the_pasted_report_is_what_quickstart_prints(capsys):
    from .test_examples import load

    load("quickstart").main([])
    printed = capsys.readouterr().out.strip().splitlines()
    pasted = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[
        1
    ].splitlines()
    assert printed[:-1] == pasted[:-1] and printed[-1].split()[:2] == pasted[-1].split()[:2]


def test_links_lead_somewhere_on_the_page_of_a_package_index():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "README.md").read_text()
    for each in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
