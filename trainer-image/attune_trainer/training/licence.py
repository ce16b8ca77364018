"""Under which licence a model's files say that they are."""

import re
from pathlib import Path
from typing import Final

_CHARACTERS: Final = 20000
# The key of a model card's front matter, as model hubs read it.
_FRONT_MATTER: Final = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.MULTILINE | re.DOTALL)
_KEY: Final = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9.+-]{0,63})[\"']?[ \t]*$", re.MULTILINE)
# How the texts of licences begin, and their names on model hubs; the first that fits counts.
_TEXTS: Final = (
    (re.compile(r"apache license\s+version 2\.0", re.IGNORECASE), "apache-2.0"),
    (re.compile(r"\bmit license\b", re.IGNORECASE), "mit"),
    (re.compile(r"permission is hereby granted, free of charge, to any person", re.IGNORECASE), "mit"),
    (re.compile(r"creative commons attribution-noncommercial 4\.0", re.IGNORECASE), "cc-by-nc-4.0"),
    (re.compile(r"creative commons attribution-sharealike 4\.0", re.IGNORECASE), "cc-by-sa-4.0"),
    (re.compile(r"(creative commons )?attribution 4\.0 international", re.IGNORECASE), "cc-by-4.0"),
)
OTHER: Final = "other"


def read_licence(folder: Path) -> str | None:
    """Gives the licence that a model folder states, by its name on model hubs.

    The model card's front matter counts first, then the text of a LICENSE file: "other" where it is none that is known.
    None where nothing is stated.
    """
    card = _read(folder, "README.md")
    front = _FRONT_MATTER.match(card)
    stated = _KEY.search(front[1]) if front else None
    if stated:
        return stated[1].lower()
    text = next(filter(None, (_read(folder, name) for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"))), "")
    if not text:
        return None
    return next((name for pattern, name in _TEXTS if pattern.search(text)), OTHER)


def _read(folder: Path, name: str) -> str:
    try:
        with (folder / name).open(encoding="utf-8", errors="replace") as file:
            return file.read(_CHARACTERS)
    except OSError:
        return ""
