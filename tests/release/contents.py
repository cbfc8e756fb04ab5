"""What the wheel and the sdist in a folder hold: ``python tests/release/contents.py dist``."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

LARGEST = 40e6  # bytes of the package's files, so that the models that ship stay small
# left over from a run or a build
LEFT_OVER = re.compile(r"(^|/)(__pycache__|\.venv[^/]*|dist|[^/]+\.(log|pyc|part|whl|lock))(/|$)")
LEFT_OUT_OF_THE_WHEEL = ("training_log.json", "curve.png")  # how the tiny models were trained
IN_THE_WHEEL = ("vtoken/py.typed", "vtoken/tiny/llava/model.safetensors", "vtoken/strategies/__init__.pyi")
IN_THE_SDIST = ("pyproject.toml", "README.md", "LICENSE", "vtoken/version.py", "tests/conftest.py")


def wheel_faults(path: Path) -> list[str]:
    """One sentence for everything that is wrong with a wheel's files."""
    with zipfile.ZipFile(path) as file:
        sizes = {info.filename: info.file_size for info in file.infolist()}
    faults = [
        f"{name} does not belong in a wheel."
        for name in sizes
        if LEFT_OVER.search(name) or name.endswith(LEFT_OUT_OF_THE_WHEEL)
    ]
    outside = re.compile(r"(?!vtoken/|vtoken-[^/]+\.dist-info/)")
    faults += [f"{name} lies outside of the package." for name in sizes if outside.match(name)]
    faults += [f"{name} is missing." for name in IN_THE_WHEEL if name not in sizes]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in sizes):
        faults.append("The licence is missing.")
    if sum(sizes.values()) >= LARGEST:
        faults.append(f"Its files have {sum(sizes.values())} bytes, the limit is {LARGEST:.0f}.")
    return faults


def sdist_faults(path: Path) -> list[str]:
    """One sentence for everything that is wrong with an sdist's files."""
    with tarfile.open(path) as file:
        members = {member.name.partition("/")[2]: member for member in file.getmembers()}
    faults = [f"{name} does not belong in an sdist." for name in members if LEFT_OVER.search(name)]
    faults += [f"{name} is a link." for name, member in members.items() if member.issym() or member.islnk()]
    return faults + [f"{name} is missing." for name in IN_THE_SDIST if name not in members]


def main(folder: str) -> None:
    wheels, sdists = sorted(Path(folder).glob("*.whl")), sorted(Path(folder).glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        sys.exit(f"{folder} has {len(wheels)} wheels and {len(sdists)} sdists, one of each is expected.")
    faults = [f"{wheels[0].name}: {fault}" for fault in wheel_faults(wheels[0])]
    faults += [f"{sdists[0].name}: {fault}" for fault in sdist_faults(sdists[0])]
    if faults:
        sys.exit("\n".join(faults))
    for path in (*wheels, *sdists):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
