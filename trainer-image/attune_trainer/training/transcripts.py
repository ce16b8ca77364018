"""Transcripts as tokens, and which utterances a model has room for."""

import logging
import unicodedata
from collections.abc import Sequence
from typing import Final

from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.speech_model import SpeechModel, TokenBatch
from attune_trainer.training.settings import TrainingUtterance

_log = logging.getLogger(__name__)

# More than this share of unusable transcripts is a mistake in the data, not a few odd lines.
_MAX_LEFT_OUT: Final = 0.1
_NAMED: Final = 10


class TranscriptEncoder:
    """Writes transcripts as tokens, with the prompt that the model is served with."""

    def __init__(self, speech_model: SpeechModel, language: str) -> None:
        """Fixes the language.

        Args:
            speech_model: whose tokenizer and prompt are used.
            language: ISO 639-1 code of the transcripts.

        Raises:
            InvalidInput: UnknownLanguage, where a multilingual model does not know the language.
        """
        known = speech_model.languages()
        code = language.lower().partition("-")[0]
        if known and code not in known:
            message = (
                f"the base model does not know the language {language}; set the Dataset's spec.language to one of "
                f"{', '.join(sorted(known))}"
            )
            raise InvalidInput("UnknownLanguage", message)
        self.language = code if known else None
        self._speech_model = speech_model
        self._known: dict[str, bool] = {}
        self._space = speech_model.first_space
        self._vocabulary = speech_model.vocabulary
        self._room = speech_model.room(self.language)

    def encode(self, text: str) -> list[int] | None:
        """Gives a transcript's token ids without prompt and end; None where the model has too little room for them.

        Raises:
            InvalidInput: TokenizerMismatch, where the network has no such token.
        """
        ids = self._speech_model.tokenise(self._space + text.strip())
        if ids and max(ids) >= self._vocabulary:
            message = (
                f"the base model's tokenizer has a token {max(ids)}, but its network knows only {self._vocabulary}; "
                "upload the tokenizer that belongs to the model"
            )
            raise InvalidInput("TokenizerMismatch", message)
        return ids if len(ids) <= self._room else None

    def lost(self, text: str) -> set[str]:
        """Gives the characters of a transcript that the vocabulary lacks; a tokenizer passes over them in silence."""
        return {one for one in set(text) if not one.isspace() and not self._knows(one)}

    def _knows(self, character: str) -> bool:
        """Tells whether a character's tokens give it back, be it in another case or form."""
        if character not in self._known:
            ids = self._speech_model.tokenise(character)
            given: str = self._speech_model.tokenizer.decode(ids, skip_special_tokens=True)
            self._known[character] = _plain(given) == _plain(character)
        return self._known[character]

    def batch(self, transcripts: Sequence[Sequence[int]]) -> TokenBatch:
        """Puts transcripts side by side, as the model's loss takes them."""
        return self._speech_model.write(transcripts, self.language)


def select_usable(
    utterances: Sequence[TrainingUtterance], encoder: TranscriptEncoder, speech_model: SpeechModel
) -> tuple[TrainingUtterance, ...]:
    """Keeps the utterances that a model has room for and whose transcripts it can write.

    Raises:
        InvalidInput: UnknownCharacters or UtterancesTooLong, where more than a tenth would have to be left out.
    """
    lost = [encoder.lost(one.text) for one in utterances]
    unknown = sum(map(bool, lost))
    window = speech_model.window_seconds
    short = [one.seconds <= window and _is_room(one, encoder, speech_model) for one in utterances]
    if unknown > _MAX_LEFT_OUT * len(utterances):
        named = sorted(set[str]().union(*lost))
        message = (
            f"{unknown} of {len(utterances)} training transcripts have characters that the base model's vocabulary "
            f"lacks ({' '.join(named[:_NAMED])}{' ...' if len(named) > _NAMED else ''}); write them in others, or "
            "choose a base model that knows them"
        )
        raise InvalidInput("UnknownCharacters", message)
    too_long = short.count(False)
    if too_long > _MAX_LEFT_OUT * len(utterances):
        message = (
            f"{too_long} of {len(utterances)} training utterances are longer than the model's window of {window:g} s "
            f"or {speech_model.describe_room()}; cut them into shorter utterances"
        )
        raise InvalidInput("UtterancesTooLong", message)
    kept = tuple(one for one, fits, gone in zip(utterances, short, lost, strict=True) if fits and not gone)
    if len(kept) < len(utterances):
        _log.warning("utterances left out", extra={"too_long": too_long, "unknown_characters": unknown})
    return kept


def _is_room(utterance: TrainingUtterance, encoder: TranscriptEncoder, speech_model: SpeechModel) -> bool:
    ids = encoder.encode(utterance.text)
    return ids is not None and speech_model.has_time_for(ids, utterance.seconds)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()
