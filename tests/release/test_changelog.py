"""One version everywhere, a changelog in the form of keep a changelog, and workflows that publish without secrets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import vtoken
from tests.release.changelog import faults, lacks_entry, notes, sections, version

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GOOD = "# Changelog\n\n## Unreleased\n\n### Added\n- a\n\n## 0.2.0 - 2026-02-01\n\n### Fixed\n- b\n\n## 0.1.0 - 2026-01-01\n- c\n"


def test_the_version_is_in_one_place():
    assert version() == vtoken.__version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == vtoken.__version__
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'path = "vtoken/version.py"' in project and not re.search(r"^version\s*=", project, re.M)


def test_the_changelog_has_its_form():
    assert faults((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), vtoken.__version__) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("## Unreleased\n", "## Next\n", "'Next' is neither"),
        ("0.2.0 - 2026-02-01", "0.2.0", "'0.2.0' is neither"),
        ("0.2.0 - 2026-02-01", "v0.2.0 - 2026-02-01", "'v0.2.0 - 2026-02-01' is neither"),
        ("## Unreleased\n\n### Added\n- a\n\n", "", "The newest heading is '0.2.0 - 2026-02-01', neither"),
        ("2026-02-01", "2025-02-01", "not ordered"),
        ("### Fixed", "### Mended", "'Mended' is none of Added"),
        ("### Fixed", "### Fixed\n- x\n\n### Fixed", "0.2.0 - 2026-02-01 has 'Fixed' twice"),
        ("## 0.1.0 - 2026-01-01", "## 0.1.0 - 2026-01-01\n\n## Unreleased 2", "'Unreleased 2' is neither"),
    ],
)
def test_headings_of_another_form_are_told(old, new, words):
    assert faults(GOOD, "0.1.0") == [] and GOOD.count(old)
    assert any(words in fault for fault in faults(GOOD.replace(old, new), "0.1.0"))


def test_a_heading_that_is_there_twice():
    with pytest.raises(ValueError, match="has 'Unreleased' twice"):
        sections(GOOD + "\n## Unreleased\n")


def test_notes_of_a_release():
    assert notes("v0.2.0", GOOD, "0.2.0") == "### Fixed\n- b"
    for tag, present, words in (
        ("v0.3.0", "0.2.0", "The tag is v0.3.0, and the version 0.2.0"),
        ("0.2.0", "0.2.0", r"the tag must be v0\.2\.0"),
        ("v0.3.0", "0.3.0", r"has no section of 0\.3\.0"),
    ):
        with pytest.raises(ValueError, match=words):
            notes(tag, GOOD, present)


def test_which_changes_need_an_entry():
    assert lacks_entry(["vtoken/fit.py", "tests/test_face.py"])
    assert not lacks_entry(["vtoken/fit.py", "CHANGELOG.md"])
    assert not lacks_entry(["docs/board.md", "tests/test_face.py"]) and not lacks_entry([])


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_no_secrets_pin_actions_and_call_targets_that_exist(path):
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert "secrets." not in text
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    for job in jobs(path).values():
        for step in job["steps"]:
            assert "uses" not in step or re.search(r"@(v\d+|release/v\d+)$", step["uses"])
            run = step.get("run", "")
            assert not re.search(
                r"\$\{\{ *github\.(event|head_ref|ref_name)", run
            )  # text of others in a shell
            for target in re.findall(r"^make ([\w-]+)", run, re.M):
                assert target in targets


@pytest.mark.skipif(not WORKFLOWS, reason="an sdist has no workflows")
def test_only_the_last_jobs_of_a_release_may_write():
    release = ROOT / ".github" / "workflows" / "release.yml"
    told = {name: (job.get("environment"), job.get("permissions")) for name, job in jobs(release).items()}
    assert told == {
        "build": (None, None),
        "publish": ("pypi", {"id-token": "write"}),
        "notes": (None, {"contents": "write"}),
    }
    order = {name: job.get("needs") for name, job in jobs(release).items()}
    assert order == {"build": None, "publish": "build", "notes": "publish"}
    # PyYAML reads the key `on` as True
    assert yaml.safe_load(release.read_text(encoding="utf-8"))[True] == {"push": {"tags": ["v*"]}}
