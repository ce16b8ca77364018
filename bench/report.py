"""Prints a benchmark's table and writes bench/results/<name>.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure. target says what was promised; holds is None where nothing was; versus says what it stands beside."""

    what: str
    figure: float
    unit: str
    target: str = ""
    holds: bool | None = None
    versus: str = ""


def report(name: str, rows: Sequence[Row], *, keep: bool = True) -> None:
    """Prints the rows and writes them down, unless they are only a try."""
    table = Table(title=name)
    for heading in ("what", "figure", "target", "", "versus"):
        table.add_column(heading)
    for row in rows:
        verdict = "" if row.holds is None else "holds" if row.holds else "falls short"
        table.add_row(row.what, f"{row.figure:.4g} {row.unit}".rstrip(), row.target, verdict, row.versus)
    Console(width=140).print(table)
    if not keep:
        return
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"written to bench/results/{target.name}")
