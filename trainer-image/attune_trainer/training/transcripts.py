"""Transcripts as what the decoder reads and what it is to say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.whisper import Whisper

IGNORED: Final = -100  # cross entropy's own default


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
        self._room = int(whisper.config.max_target_positions) - len(self._prompt)
        # Byte-level vocabularies begin words with a space, and a pretrained decoder begins its first word so as well.
        self._space = " " if "\u0120the" in whisper.tokenizer.get_vocab() else ""

    def encode(self, text: str) -> list[int] | None:
        """Gives a transcript's token ids without prompt and end; None where the decoder has too few positions."""
        ids = [int(token) for token in self._tokenizer(self._space + text.strip(), add_special_tokens=False).input_ids]
        return ids if len(ids) <= self._room else None

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
