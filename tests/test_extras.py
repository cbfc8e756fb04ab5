"""Each optional package, absent: the entry point that needs it says in one sentence which extra brings it."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

import vtoken
from tests.release.first_lines import OPTIONAL
from vtoken import tiny
from vtoken.bench import report
from vtoken.config import VTokenConfig
from vtoken.eval.benchmarks import datasets, encoder_models, example_data, imagenet
from vtoken.eval.board import board, plot
from vtoken.eval.protocols import subtitles
from vtoken.eval.running.runner import Processes
from vtoken.fine_tuning.train import Plan, train_strategy
from vtoken.integrations import vllm
from vtoken.retrieval_training import add_lora
from vtoken.tiny import assets, digits, letters

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vtoken"
# the module of a distribution of another name
MODULES = {"decord2": "decord", "open_clip_torch": "open_clip", "scikit-image": "skimage"}


def clip(folder: Path) -> Path:
    path = folder / "clip.mp4"
    if not path.is_file():
        example_data.write_mp4(path, [Image.fromarray(np.full((32, 32, 3), i, "uint8")) for i in range(4)], 8)
    return path


def many_processes(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        Processes.found()


def page(name: str) -> Callable[[Path], None]:
    """Import the module of a page anew."""

    def call(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, f"vtoken.cli.{name}", raising=False)
            importlib.import_module(f"vtoken.cli.{name}")

    return call


def train(folder: Path) -> None:
    train_strategy(nn.Linear(1, 1), None, VTokenConfig("pvc"), [], folder, Plan(1))


ROWS = [{"question_id": "a", "image": b"", "category": "c", "question": "q", "answer": "Yes"}]
# (extra, module) -> calls that need it; each gets a folder of its own
ENTRIES: dict[tuple[str, str], list[Callable[[Path], Any]]] = {
    ("video", "av"): [
        lambda folder: vtoken.video.open_video(clip(folder)),
        lambda folder: vtoken.video.open_video(clip(folder), "decord"),
    ],
    ("video", "decord"): [lambda folder: vtoken.video.open_video(clip(folder), "decord")],
    ("timm", "timm"): [
        lambda folder: tiny.load_encoder("vit"),
        lambda folder: encoder_models.load("timm:vit_tiny_patch16_224", pretrained=True),
        lambda folder: imagenet.class_indices(["n01440764"], 1000, folder),
    ],
    ("timm", "torchvision"): [
        lambda folder: encoder_models.load("timm:vit_tiny_patch16_224", pretrained=True),
        lambda folder: imagenet.load(folder, 2),
    ],
    ("open_clip", "open_clip"): [
        lambda folder: tiny.load_encoder("clip"),
        lambda folder: encoder_models.load("open_clip:ViT-B-32/openai"),
    ],
    ("tempme", "peft"): [lambda folder: add_lora(nn.Linear(1, 1))],
    ("eval", "accelerate"): [train, many_processes],
    ("eval", "matplotlib"): [
        lambda folder: plot.draw(board.Board("t", {}, []), folder / "a.png"),
        lambda folder: plot.draw_points([], folder / "a.png", "t", "c", "v", "d"),
    ],
    ("eval", "pandas"): [
        lambda folder: datasets.read_tsv(folder / "a.tsv", ["answer"]),
        lambda folder: example_data.write_mme_tsv(folder / "a.tsv", ROWS),
    ],
    ("eval", "pyarrow"): [
        lambda folder: datasets.read_parquet(folder, ["answer"], "how"),
        lambda folder: example_data.write_mme(folder, ROWS),
    ],
    ("eval", "av"): [lambda folder: example_data.write_mp4(folder / "a.mp4", [], 8)],
    ("eval", "pysubs2"): [lambda folder: subtitles.at_frames(folder / "a.srt", [0], 8.0, 8)],
    ("demo", "matplotlib"): [
        lambda folder: report.draw({"machine": {}, "shapes": {}}, folder / "a.png"),
        lambda folder: digits.build(folder / "a.npz"),
        lambda folder: letters.build(folder / "a.npz"),
    ],
    ("stream", "gradio"): [page("stream_page"), page("explore_page")],
    ("vllm", "vllm"): [lambda folder: vllm.register()],
    ("dev", "skimage"): [lambda folder: assets.build(folder / "a.npz")],
}
# what an extra brings although vtoken does not import it under that extra
BROUGHT = {
    ("demo", "torchvision"): "processors of transformers resize with it",
    **{("integrations", m): "docs/integrations" for m in ("peft", "trl", "torchao", "bitsandbytes")},
}
TOOLS = ("dev", "docs")  # for the tests and the site, besides packages of other extras
CASES = [(extra, module, call) for (extra, module), calls in ENTRIES.items() for call in calls]
# of no extra: with torch, in an environment of its own, or chosen by a user who has it
FREE = {"triton", "lmms_eval", "vlmeval", "torchcodec"}
# imports without a check of their own, and why they are reached with the package only
LATER = {"adapters/encoders/timm.py": "a timm model is there", "cli/stream_visitors.py": "gradio brings pandas",
         "cli/page_server.py": "the module of the page comes first"}  # fmt: skip


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def module_of(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)[0]
    return MODULES.get(name, name)


def split(extra: str, known: dict[str, list[str]]) -> tuple[set[str], set[str]]:
    """What an extra itself names: (modules, other extras)."""
    groups = [re.match(r"vtoken\[(.*)\]", r) for r in known[extra]]
    others = {name for group in groups if group for name in group[1].split(",")}
    return {module_of(r) for r, group in zip(known[extra], groups) if not group}, others


def brought(extra: str, known: dict[str, list[str]]) -> set[str]:
    """The modules that an extra brings, those of the extras in it included."""
    modules, others = split(extra, known)
    return modules.union(*(brought(other, known) for other in others))


@pytest.mark.parametrize(("extra", "module", "call"), CASES, ids=[f"{e}-{m}" for e, m, _ in CASES])
def test_an_absent_package_is_named_with_its_extra(extra, module, call, monkeypatch, tmp_path):
    if extra == "video":
        clip(tmp_path)  # written while PyAV is there
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises((ImportError, vtoken.video.VideoError)) as caught:
        call(tmp_path)
    said = str(caught.value)
    assert f"pip install 'vtoken[{extra}]'" in said and "\n" not in said and len(said) < 160
    assert module in said.lower()
    known = project()["optional-dependencies"]
    assert module in brought(extra, known)  # so that the advice helps


def test_every_extra_has_an_entry_point_or_is_a_group():
    known = project()["optional-dependencies"]
    for extra in known:
        modules, others = split(extra, known)
        if extra in TOOLS:  # which the package does not import
            modules &= {module for module in modules if module in imported_by()}
        told = {m for e, m in (*ENTRIES, *BROUGHT) if e == extra}
        assert modules <= told, f"{extra} brings {modules - told}, which no entry point of the table needs"
        assert told or others or extra in TOOLS


def test_every_optional_package_is_in_the_table():
    core = {module_of(r) for r in project()["dependencies"]} | {"PIL", "packaging", "tokenizers"}
    found = set(imported_by()) - core - FREE - set(sys.stdlib_module_names) - {"vtoken"}
    assert found - {"fastapi", "starlette", "uvicorn"} == {
        module for _, module in ENTRIES
    }  # gradio brings these
    assert {module for _, module in (*ENTRIES, *BROUGHT)} <= set(OPTIONAL)


def test_every_import_of_an_optional_package_has_a_check():
    """In a file that imports an optional package there is a sentence for its absence."""
    optional = {module for _, module in ENTRIES} - {"vllm"}  # vLLM imports those of integrations/vllm itself
    for module, paths in imported_by().items():
        checked = re.compile(rf'require\([^)]*"{module}"|load\("{module}|except ImportError')
        for path in paths if module in optional else ():
            text = (PACKAGE / path).read_text(encoding="utf-8")
            assert path in LATER or checked.search(text), f"{path} imports {module} without a sentence"


@functools.cache
def imported_by() -> dict[str, set[str]]:
    """Per module from outside that the package imports or requires by name: the files that do so."""
    out: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in names_in(node):
                out.setdefault(name.partition(".")[0], set()).add(str(file.relative_to(PACKAGE)))
    return out


def names_in(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module]
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("require", "load") and node.args:
        given = node.args if node.func.id == "require" else node.args[:1]
        words = [each.value for each in given if isinstance(getattr(each, "value", None), str)]
        return words if node.func.id == "require" or len(node.args) == 2 else []
    return []
