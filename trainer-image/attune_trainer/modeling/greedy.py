"""Greedy decoding, token by token, that always ends."""

import math
from collections.abc import Collection, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from attune_trainer.modeling.speech_model import SAMPLE_RATE

# A loop is cut off where no speaker could go on: 25 tokens a second is fast speech spelled by single characters.
TOKENS_PER_SECOND: Final = 25
TOKENS_AT_LEAST: Final = 16


def token_limit(samples: int, room: int) -> int:
    """Gives how many tokens a clip's transcript may have: 16 and 25 for each second, as far as there is room."""
    return max(1, min(room, TOKENS_AT_LEAST + math.ceil(TOKENS_PER_SECOND * samples / SAMPLE_RATE)))


class Decoding(Protocol):
    """A batch that is being decoded, with what the network remembers of it."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Reads tokens of shape (rows, any number); gives the logits of the next, shape (rows, vocabulary)."""

    def keep(self, rows: Tensor) -> None:
        """Forgets all rows but these."""


class DecoderDecoding:
    """Decoding by a decoder that attends to what an encoder has heard."""

    def __init__(self, decoder: Any, projection: Any, encoded: Tensor, mask: Tensor | None = None) -> None:
        """Begins.

        Args:
            decoder: of transformers.
            projection: hidden states to logits.
            encoded: shape (rows, positions, units).
            mask: True where a position is no padding, shape (rows, positions); None where all count.
        """
        self._decoder = decoder
        self._projection = projection
        self._encoded = encoded
        self._mask = mask
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def advance(self, tokens: Tensor) -> Tensor:
        """Gives the logits of the next token."""
        masked = {} if self._mask is None else {"encoder_attention_mask": self._mask}
        hidden = self._decoder(
            input_ids=tokens,
            encoder_hidden_states=self._encoded,
            past_key_values=self._cache,
            use_cache=True,
            **masked,
        ).last_hidden_state
        logits: Tensor = self._projection(hidden[:, -1])
        return logits

    def keep(self, rows: Tensor) -> None:
        """Forgets all rows but these."""
        self._cache.batch_select_indices(rows)
        self._encoded = self._encoded[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]


def decode_greedily(
    decoding: Decoding,
    prompt: Tensor,
    limits: Sequence[int],
    *,
    ends: Collection[int],
    suppressed: Tensor,
    suppressed_first: Tensor | None = None,
) -> list[list[int]]:
    """Gives the token ids that each row says; rows that have ended leave the batch once they are the half of it.

    Args:
        decoding: a batch at its beginning.
        prompt: what is read first, shape (rows, tokens).
        limits: tokens of each row, at most.
        ends: ids that end a row, and are no part of it.
        suppressed: ids that are never said.
        suppressed_first: ids that are not said first.
    """
    tokens: list[list[int]] = [[] for _ in limits]
    rows = list(range(len(tokens)))  # which clip each row of the batch still belongs to
    ended = [False] * len(tokens)
    step = prompt
    for position in range(max(limits)):
        logits = decoding.advance(step)
        logits[:, suppressed] = -torch.inf
        if position == 0 and suppressed_first is not None:
            logits[:, suppressed_first] = -torch.inf
        chosen = logits.argmax(dim=-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if ended[row]:
                continue
            if token not in ends:
                tokens[row].append(token)
            ended[row] = token in ends or len(tokens[row]) >= limits[row]
        if all(ended):
            break
        going = [index for index, row in enumerate(rows) if not ended[row]]
        if 2 * len(going) <= len(rows):
            keep = torch.tensor(going, device=chosen.device)
            decoding.keep(keep)
            chosen = chosen[keep]
            rows = [rows[index] for index in going]
        step = chosen[:, None]
    return tokens
