"""Models of which an encoder hears and a decoder writes."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attune_trainer.modeling.greedy import DecoderDecoding, decode_greedily, token_limit
from attune_trainer.modeling.speech_model import IGNORED, SpeechModel, TokenBatch


def write_behind(prompt: Sequence[int], transcripts: Sequence[Sequence[int]], end: int) -> TokenBatch:
    """Puts transcripts side by side, each behind the same prompt.

    The decoder reads prompt and transcript, and is to say transcript and end; what it says while it reads the prompt is
    given to it in serving, so that counts for nothing. Padding is told by length alone: the token that pads may be the
    one that ends a transcript.
    """
    width = len(prompt) + max(len(ids) for ids in transcripts)
    inputs = torch.full((len(transcripts), width), end, dtype=torch.long)
    targets = torch.full((len(transcripts), width), IGNORED, dtype=torch.long)
    first = len(prompt) - 1
    for row, ids in enumerate(transcripts):
        read = [*prompt, *ids]
        said = [*ids, end]
        inputs[row, : len(read)] = torch.tensor(read)
        targets[row, first : first + len(said)] = torch.tensor(said)
    return TokenBatch(inputs, targets)


class Seq2Seq(SpeechModel):
    """An encoder and a decoder, as transformers' ForConditionalGeneration has them: model.encoder, model.decoder."""

    @abstractmethod
    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gives what the encoder hears, shape (clips, positions, units), and where that is no padding.

        The mask has the shape (clips, positions); None where every position counts.
        """

    @abstractmethod
    def prompt_of(self, language: str | None) -> list[int]:
        """Gives the token ids that every transcript starts with."""

    @abstractmethod
    def suppressed(self) -> list[int]:
        """Lists ids that no transcript contains."""

    @property
    @abstractmethod
    def positions(self) -> int:
        """How many tokens the decoder has places for, the prompt's included."""

    @property
    def end(self) -> int:
        """The token id that closes a transcript."""
        return int(self.config.eos_token_id)

    @property
    def generation(self) -> Any:
        """Token ids that steer decoding."""
        return self.model.generation_config

    @property
    def first_space(self) -> str:
        """Byte-level vocabularies begin words with a space; a pretrained decoder begins its first word so as well."""
        return " " if "\u0120the" in self.tokenizer.get_vocab() else ""

    def room(self, language: str | None) -> int:
        """Gives how many tokens a transcript may have."""
        return self.positions - len(self.prompt_of(language))

    def describe_room(self) -> str:
        """Says which transcripts the model has no room for."""
        return f"have transcripts longer than its {self.positions} tokens"

    def write(self, transcripts: Sequence[Sequence[int]], language: str | None) -> TokenBatch:
        """Puts transcripts side by side, each behind the prompt."""
        return write_behind(self.prompt_of(language), transcripts, self.end)

    def loss(self, features: Tensor, inputs: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """Gives the cross entropy of the transcripts, averaged over their tokens."""
        hidden = self._read(features, inputs, lengths)
        # The vocabulary's projection is the dearest product of a small model: only real tokens go through it.
        counted = targets != IGNORED
        logits = self.model.proj_out(hidden[counted])
        return nn.functional.cross_entropy(logits.float(), targets[counted])

    def logits(self, features: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Gives the decoder's logits, shape (clips, tokens, vocabulary)."""
        found: Tensor = self.model.proj_out(self._read(features, inputs, lengths))
        return found.float()

    def decode(
        self, features: Tensor, lengths: Tensor, language: str | None = None, limit: int | None = None
    ) -> list[str]:
        """Transcribes a batch greedily."""
        return [
            self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            for ids in self.generate(features, lengths, language, limit)
        ]

    @torch.inference_mode()
    def generate(
        self, features: Tensor, lengths: Tensor, language: str | None = None, limit: int | None = None
    ) -> list[list[int]]:
        """Gives the token ids of what decode says."""
        device = self.model.device
        encoded, mask = self.encode(features.to(device, self.model.dtype), lengths.to(device))
        prompt = self.prompts(encoded, language)
        limits = [token_limit(samples, self.positions - prompt.shape[1]) for samples in lengths.tolist()]
        if limit is not None:
            limits = [min(one, limit) for one in limits]
        first = [
            token
            for token in getattr(self.generation, "begin_suppress_tokens", None) or ()
            if 0 <= token < self.vocabulary
        ]
        return decode_greedily(
            DecoderDecoding(self.model.model.decoder, self.model.proj_out, encoded, mask),
            prompt,
            limits,
            ends=(self.end,),
            suppressed=torch.tensor(self.suppressed(), dtype=torch.long, device=device),
            suppressed_first=torch.tensor(first, dtype=torch.long, device=device),
        )

    def prompts(self, encoded: Tensor, language: str | None) -> Tensor:
        """Gives the decoder's first tokens for each clip, shape (clips, tokens)."""
        return torch.tensor([self.prompt_of(language)] * encoded.shape[0], device=encoded.device)

    def special_tokens(self) -> set[int]:
        """Gives the ids of tokens that are no text, the end among them."""
        special = {token for token in self.tokenizer.all_special_ids if token is not None}
        return special | {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}

    def _read(self, features: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        encoded, mask = self.encode(features, lengths)
        masked = {} if mask is None else {"encoder_attention_mask": mask}
        hidden: Tensor = self.model.model.decoder(
            input_ids=inputs, encoder_hidden_states=encoded, use_cache=False, **masked
        ).last_hidden_state
        return hidden
