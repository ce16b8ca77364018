"""One normalisation of transcripts for every place that counts errors, so that all of them count alike."""

import re
import unicodedata
from typing import Final

NORMALISER: Final = "attune-unicode-1"

# Scripts written without spaces between words: each character counts as a word, as is usual for them.
WITHOUT_SPACES: Final = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
_DOTTED_I: Final = frozenset({"tr", "az"})
_APOSTROPHES: Final = str.maketrans(dict.fromkeys("’‘ʼ＇`´", "'"))  # noqa: RUF001 (these are what is replaced)
# An apostrophe between letters or marks is part of the word ("don't"); a mark between digits part of the number.
_INSIDE_WORD: Final = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])")
_INSIDE_NUMBER: Final = re.compile(r"(?<=\d)[.,:](?=\d)")


def normalise(text: str, language: str) -> str:
    """Lower-cases, drops punctuation and symbols, and leaves words with single spaces between them.

    Letters, digits and combining marks of every script survive: vowel signs of Indic scripts are marks, and a word
    without them is another word. Numbers and spellings are left as they are written. In scripts without spaces each
    character, with its marks, becomes a word.

    normalise("Don\u2019t -- press 3.5, please!", "en") -> "don't press 3.5 please"

    Args:
        text: a reference or a hypothesis.
        language: ISO 639 code, with or without a region ("en", "pt-BR").
    """
    language = language.lower().partition("-")[0]
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
    if language in _DOTTED_I:
        text = text.replace("I", "\u0131").replace("\u0130", "i")
    # Lower-casing U+0130 elsewhere leaves a combining dot; NFKC afterwards composes what can be composed.
    text = unicodedata.normalize("NFKC", text.lower())
    kept = {match.start() for pattern in (_INSIDE_WORD, _INSIDE_NUMBER) for match in pattern.finditer(text)}
    characters: list[str] = []
    for position, character in enumerate(text):
        category = unicodedata.category(character)
        if category[0] in "LNM" or position in kept:
            characters.append(character)
        elif category != "Cf":  # joiners and direction marks are invisible and part no words
            characters.append(" ")
    if language in WITHOUT_SPACES:
        characters = [
            character if unicodedata.category(character)[0] == "M" else f" {character}" for character in characters
        ]
    return " ".join("".join(characters).split())
