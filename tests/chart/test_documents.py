"""What the documents name is there, and the code map knows every part."""

import re
from pathlib import Path

import pytest

from tests.chart.rendering import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for place in ("docs", "devcluster", "examples") for page in ROOT.glob(f"{place}/**/*.md")),
    ]
)
PARTS = ("operator/attune", "trainer-image/attune_trainer")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", page.read_text())
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def code_map() -> str:
    return (ROOT / "docs" / "architecture.md").read_text().partition("## Code map")[2]


def test_the_code_map_ends_the_page_and_names_what_exists() -> None:
    text = code_map()
    assert "\n## " not in text
    for row in re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", row):
            assert list(ROOT.glob(path)), path


def test_the_code_map_names_every_package_and_every_kind_of_test() -> None:
    text = code_map()
    for part in PARTS:
        for package in (ROOT / part).glob("*/__init__.py"):
            assert f"`{part}/{package.parent.name}/`" in text
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            assert f"`{folder.name}`" in text, folder.name
