"""What a release is checked for: the files of its wheel and sdist, and the README's first lines without extras."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.release.contents import IN_THE_SDIST, IN_THE_WHEEL, LARGEST, sdist_faults, wheel_faults

ROOT = Path(__file__).parents[2]
LICENCE = "vtoken-0.0.dist-info/licenses/LICENSE"


def wheel(path: Path, *names: str, size: int = 0) -> list[str]:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.writestr(name, bytes(size))
    return wheel_faults(path)


def test_a_wheel_of_the_package_alone_passes(tmp_path):
    assert wheel(tmp_path / "a.whl", *IN_THE_WHEEL, LICENCE) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests/conftest.py", "outside"),
        ("benchmarks/video.py", "outside"),
        ("training/tiny/loop.py", "outside"),
        ("docs/board.md", "outside"),
        ("vtoken/tiny/llava/training_log.json", "does not belong"),
        ("vtoken/tiny/llava/curve.png", "does not belong"),
        ("vtoken/run.log", "does not belong"),
        ("vtoken/__pycache__/fit.cpython-312.pyc", "does not belong"),
    ],
)
def test_other_files_in_a_wheel_are_named(name, words, tmp_path):
    (told,) = wheel(tmp_path / "a.whl", *IN_THE_WHEEL, LICENCE, name)
    assert told.startswith(name) and words in told


def test_a_wheel_that_is_too_large_or_lacks_files_is_told(tmp_path):
    names = (*IN_THE_WHEEL, LICENCE)
    told = wheel(tmp_path / "a.whl", *names, size=int(LARGEST) // len(names))
    assert len(told) == 1 and "bytes, the limit is 40000000" in told[0]
    assert wheel(tmp_path / "b.whl", *IN_THE_WHEEL[1:]) == [
        "vtoken/py.typed is missing.",
        "The licence is missing.",
    ]


def sdist(path: Path, *names: str, link: bool = False) -> list[str]:
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            file.addfile(tarfile.TarInfo(f"vtoken-0.0/{name}"), io.BytesIO())
        if link:
            entry = tarfile.TarInfo("vtoken-0.0/docs/link")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(entry)
    return sdist_faults(path)


def test_files_of_an_sdist(tmp_path):
    assert sdist(tmp_path / "a.tar.gz", *IN_THE_SDIST, "vtoken/tiny/llava/curve.png") == []
    told = sdist(tmp_path / "b.tar.gz", *IN_THE_SDIST[1:], ".venv/bin/python", link=True)
    assert told == [
        ".venv/bin/python does not belong in an sdist.",
        "docs/link is a link.",
        "pyproject.toml is missing.",
    ]


@pytest.mark.slow
def test_the_first_lines_import_no_optional_package():
    script = ROOT / "tests" / "release" / "first_lines.py"
    done = subprocess.run(
        [sys.executable, str(script), "README.md"],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vtoken report: hired(budget=0.2)" in done.stdout and "image in row 0: 16 -> 3" in done.stdout
