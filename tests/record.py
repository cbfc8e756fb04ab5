"""What each model family was seen to do in the tests: the source of the table in README.md and docs/families.md.

pytest tests/test_matrix.py tests/streaming/test_session.py --record-families FILE
python docs/generate_readme.py FILE
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from vtoken.mechanism.transformers_names import NEWEST

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
