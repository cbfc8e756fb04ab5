"""CHANGELOG.md in the form of keep a changelog: its sections, the notes of a release, and what needs an entry.

python tests/release/changelog.py notes v0.1.0                      # prints the section of that version
git diff --name-only A...B | python tests/release/changelog.py changed  # fails if an entry is missing
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNRELEASED = "Unreleased"
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
RELEASED = re.compile(r"(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?) - (\d{4}-\d{2}-\d{2})")


def version(root: Path = ROOT) -> str:
    """The version in vtoken/version.py, without importing the package."""
    return re.search(r'^__version__ = "(.+)"$', (root / "vtoken" / "version.py").read_text("utf-8"), re.M)[1]


def sections(text: str) -> dict[str, str]:
    """Per heading of the second level, in order, the text below it.

    Raises:
        ValueError: for two equal headings.
    """
    _, *parts = re.split(r"^## (.+)\n", text, flags=re.M)
    heads = [head.strip() for head in parts[::2]]
    if twice := {head for head in heads if heads.count(head) > 1}:
        raise ValueError(f"The changelog has {min(twice)!r} twice.")
    return dict(zip(heads, (body.strip() for body in parts[1::2]), strict=True))


def faults(text: str, present: str) -> list[str]:
    """One sentence for everything that is wrong with the headings, given the present version."""
    known = sections(text)
    found = [
        f"{head!r} is neither {UNRELEASED!r} nor a version with its date, such as '0.2.0 - 2026-01-31'."
        for head in known
        if head != UNRELEASED and not RELEASED.fullmatch(head)
    ]
    newest = next(iter(known), "")
    if newest != UNRELEASED and newest.partition(" - ")[0] != present:
        found.append(f"The newest heading is {newest!r}, neither {UNRELEASED!r} nor {present}.")
    if UNRELEASED in [*known][1:]:
        found.append(f"{UNRELEASED!r} comes first.")
    dates = [match[2] for head in known if (match := RELEASED.fullmatch(head))]
    if dates != sorted(dates, reverse=True):
        found.append("The versions are not ordered from the newest to the oldest.")
    for head, body in known.items():
        kinds = re.findall(r"^### (.+)$", body, re.M)
        found += [f"{head}: {kind!r} is none of {', '.join(KINDS)}." for kind in kinds if kind not in KINDS]
        found += [f"{head} has {kind!r} twice." for kind in KINDS if kinds.count(kind) > 1]
    return found


def notes(tag: str, text: str, present: str) -> str:
    """The section of a tag's version.

    Raises:
        ValueError: if the tag is not that of the present version, or the version has no section.
    """
    if tag != f"v{present}":
        raise ValueError(f"The tag is {tag}, and the version {present}: the tag must be v{present}.")
    known = {head.partition(" - ")[0]: body for head, body in sections(text).items()}
    if not known.get(present):
        raise ValueError(f"CHANGELOG.md has no section of {present}, or an empty one.")
    return known[present]


def lacks_entry(changed: Iterable[str]) -> bool:
    """Whether files of the package changed and the changelog did not."""
    names = set(changed)
    return any(name.startswith("vtoken/") for name in names) and "CHANGELOG.md" not in names


def main(what: str, *given: str) -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if what == "notes":
        try:
            print(notes(*given, text, version()))
        except ValueError as error:
            sys.exit(str(error))
    elif what == "changed" and lacks_entry(sys.stdin.read().splitlines()):
        sys.exit(
            "vtoken/ changed without CHANGELOG.md: add a line below 'Unreleased', or the label 'skip changelog'"
            " or [skip changelog] in the title of the pull request."
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
