"""Transcripts as what the decoder reads and what it is to say."""

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.whisper import Whisper
from attune_trainer.training.settings import TrainingUtterance

_log = logging.getLogger(__name__)

IGNORED: Final = -100  # cross entropy's own default
# More than this share of unusable transcripts is a mistake in the data, not a few odd lines.
_MAX_LEFT_OUT: Final = 0.1
_NAMED: Final = 10


@dataclass(frozen=True)
class TokenBatch:
    """Decoder inputs and targets, both of shape (utterances, tokens); targets are IGNORED outside the transcript."""

    inputs: Tensor
    targets: Tensor


class TranscriptEncoder:
    """Writes transcripts as tokens, with the prompt that the model is served with."""

    def __init__(self, whisper: Whisper, language: str) -> None:
        """Fixes the prompt.

        Args:
            whisper: whose tokenizer and prompt are used.
            language: ISO 639-1 code of the transcripts.

        Raises:
            InvalidInput: UnknownLanguage, where a multilingual model does not know the language.
        """
        known = whisper.languages()
        code = language.lower().partition("-")[0]
        if known and code not in known:
            message = (
                f"the base model does not know the language {language}; set the Dataset's spec.language to one of "
                f"{', '.join(sorted(known))}"
            )
            raise InvalidInput("UnknownLanguage", message)
        self.language = code if known else None
        self._prompt = whisper.prompt(known.get(code))
        self._tokenizer = whisper.tokenizer
        self._end = whisper.end
        self._known: dict[str, bool] = {}
        self._vocabulary = int(whisper.config.vocab_size)
        self._room = int(whisper.config.max_target_positions) - len(self._prompt)
        # Byte-level vocabularies begin words with a space, and a pretrained decoder begins its first word so as well.
        self._space = " " if "\u0120the" in whisper.tokenizer.get_vocab() else ""

    def encode(self, text: str) -> list[int] | None:
        """Gives a transcript's token ids without prompt and end; None where the decoder has too few positions.

        Raises:
            InvalidInput: TokenizerMismatch, where the network has no such token.
        """
        ids = self._tokenise(self._space + text.strip())
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
            given: str = self._tokenizer.decode(self._tokenise(character), skip_special_tokens=True)
            self._known[character] = _plain(given) == _plain(character)
        return self._known[character]

    def _tokenise(self, text: str) -> list[int]:
        # Split: a marker such as <|endoftext|> that somebody wrote into a transcript is text, and no token.
        found = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [int(token) for token in found.input_ids]

    def batch(self, transcripts: Sequence[Sequence[int]]) -> TokenBatch:
        """Puts transcripts side by side.

        The decoder reads prompt and transcript, and is to say transcript and end; what it says while it reads the
        prompt is given to it in serving, so that counts for nothing. Padding is told by length alone: the token that
        pads may be the one that ends a transcript.
        """
        width = len(self._prompt) + max(len(ids) for ids in transcripts)
        inputs = torch.full((len(transcripts), width), self._end, dtype=torch.long)
        targets = torch.full((len(transcripts), width), IGNORED, dtype=torch.long)
        first = len(self._prompt) - 1
        for row, ids in enumerate(transcripts):
            read = [*self._prompt, *ids]
            said = [*ids, self._end]
            inputs[row, : len(read)] = torch.tensor(read)
            targets[row, first : first + len(said)] = torch.tensor(said)
        return TokenBatch(inputs, targets)


def select_usable(
    utterances: Sequence[TrainingUtterance], encoder: TranscriptEncoder, whisper: Whisper
) -> tuple[TrainingUtterance, ...]:
    """Keeps the utterances that a model has room for and whose transcripts it can write.

    Raises:
        InvalidInput: UnknownCharacters or UtterancesTooLong, where more than a tenth would have to be left out.
    """
    lost = [encoder.lost(one.text) for one in utterances]
    unknown = sum(map(bool, lost))
    window = whisper.window_seconds
    short = [one.seconds <= window and encoder.encode(one.text) is not None for one in utterances]
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
            f"or have transcripts longer than its {whisper.config.max_target_positions} tokens; cut them into shorter "
            "utterances"
        )
        raise InvalidInput("UtterancesTooLong", message)
    kept = tuple(one for one, fits, gone in zip(utterances, short, lost, strict=True) if fits and not gone)
    if len(kept) < len(utterances):
        _log.warning("utterances left out", extra={"too_long": too_long, "unknown_characters": unknown})
    return kept


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()
