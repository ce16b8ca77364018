"""Which language a transcript is in, where that is beyond doubt."""

import threading
from typing import Any, Final

# Shorter texts ("no, no, no") are in several languages.
_LETTERS: Final = 20
# Probabilities: the other language's at least, and the wanted one's at most.
_FOUND: Final = 0.5
_WANTED: Final = 0.02

_lock = threading.Lock()
_identifier: Any = None


def is_other_language(text: str, language: str) -> bool:
    """Tells whether a transcript is surely in another language.

    Never where it has fewer than 20 letters, or the language is none that can be told apart.

    Args:
        text: a transcript.
        language: ISO 639 code of what it should be in, with or without a region.
    """
    code = language.partition("-")[0].lower()
    if sum(character.isalpha() for character in text) < _LETTERS:
        return False
    with _lock:  # it keeps state, and is fast
        identifier = _load()
        if code not in {str(label) for label in identifier.labels}:
            return False
        ranked = identifier.rank(text.lower())
    return bool(ranked[0][1] >= _FOUND and dict(ranked)[code] <= _WANTED)


def _load() -> Any:
    global _identifier  # noqa: PLW0603 (loading takes a while, and only who asks for it pays)
    if _identifier is None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # noqa: PLC0415

        _identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return _identifier
