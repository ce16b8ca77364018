"""What all tests share: golden files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write the golden files anew instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Compares an object with tests/goldens/<name>.json, or writes it with --update-goldens."""

    def compare(name: str, actual: Any) -> None:
        path = GOLDENS / f"{name}.json"
        text = json.dumps(actual, indent=2, sort_keys=True) + "\n"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} is missing; run pytest --update-goldens and read what it wrote"
        assert json.loads(path.read_text()) == json.loads(text), f"differs from {path}; pytest --update-goldens"

    return compare
