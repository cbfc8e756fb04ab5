"""What each model family was seen to do in the tests: the source of the table in README.md and docs/families.md.

pytest tests/test_matrix.py tests/streaming/test_session.py --record-families FILE
python docs/generate_readme.py FILE
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import transformers

from vtoken.mechanism.transformers_names import NEWEST

if TYPE_CHECKING:
    from tests.models import Family

KNOWN = Path(__file__).parents[1] / "docs" / "families.json"

# ability -> the row of the matrix that shows it
ABILITIES = {"divprune": "selection", "visionzip": "attention", "tome": "merging", "fastv": "prefill"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-families", metavar="FILE", help="append what each family was seen to do")


@pytest.fixture
def sighted(request: pytest.FixtureRequest) -> Callable[[str, str, bool], None]:
    """`sighted(model_type, ability, works)` records it, or compares it with docs/families.json."""
    file = request.config.getoption("--record-families")
    known: dict[str, list[str]] = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.exists() else {}

    def note(model_type: str, ability: str, works: bool = True) -> None:
        if file is not None:
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps([model_type, ability, works]) + "\n")
        elif transformers.__version__.startswith(f"{NEWEST}."):
            assert works == (ability in known.get(model_type, [])), (
                f"docs/families.json is stale for {ability} of {model_type}: see tests/record.py"
            )

    return note


@functools.cache
def model_type(family: Family) -> str:
    return family.config().model_type


def note(sighted: Callable[[str, str, bool], None], family: Family, row: str, works: bool) -> None:
    """Record what one strategy on a batch of prompts shows of a family; of a type with several rows, the first."""
    from tests.models import FAMILIES

    kind = model_type(family)
    rows = (f for f in FAMILIES.values() if f.modality == family.modality)
    if next((f for f in rows if model_type(f) == kind), family) != family:
        return
    if family.modality == "image" and row in ABILITIES:
        sighted(kind, ABILITIES[row], works)
    if row == "divprune":
        sighted(kind, family.modality, works)
        if family.modality == "image":
            sighted(kind, "several", works and family.per_prompt > 1)
            sighted(kind, "ragged", works)
