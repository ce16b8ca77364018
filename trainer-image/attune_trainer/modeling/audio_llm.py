"""Language models that hear: an audio encoder, a projector, and a decoder that is prompted with what was heard."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, Qwen3ASRForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.greedy import decode_greedily, token_limit
from attune_trainer.modeling.seq2seq import write_behind
from attune_trainer.modeling.speech_model import (
    IGNORED,
    SAMPLE_RATE,
    Audio,
    SpeechModel,
    TokenBatch,
    check_mels,
    check_sampling_rate,
    load_network,
)

_CLIP: Final = "clip.wav"  # stands for the audio in a chat template; never opened
_TEXT_MARK: Final = "<asr_text>"  # between the name of the language and the words
_INSTRUCTION: Final = "Write down the words that are spoken."


@dataclass(frozen=True)
class AudioLlm(SpeechModel):
    """A decoder that reads a prompt, in which one place is taken by what the encoder heard, and goes on with the words.

    Attributes:
        processor: tokenizer, feature extractor and chat template.
    """

    processor: Any

    network_class: ClassVar[Any]
    adapted_part: ClassVar[str] = "model.language_model"

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Loads a model from a folder of safetensors.

        Raises:
            InvalidInput: PromptUnsupported, where its chat template has no place for one clip, or for a folder in which
                something is missing or does not fit together.
        """
        network, processor = load_network(
            cls.network_class,
            folder,
            dtype,
            lambda _: (AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False),),
            files="processor_config.json, tokenizer.json, chat_template.jinja and generation_config.json",
        )
        extractor = processor.feature_extractor
        check_sampling_rate(extractor)
        check_mels(extractor.feature_size, network.config.audio_config.num_mel_bins)
        cls._prepare(network)
        loaded = cls(
            model=network.to(device).eval(), tokenizer=processor.tokenizer, extractor=extractor, processor=processor
        )
        loaded.prompt(None)
        return loaded

    @classmethod
    def _prepare(cls, network: Any) -> None:
        """Makes the encoder take audio shorter than its window."""

    @abstractmethod
    def listen(self, features: Tensor, lengths: Tensor) -> list[Tensor]:
        """Gives what the decoder hears of each clip, of shape (positions, units): of its padding nothing."""

    @abstractmethod
    def heard_positions(self, seconds: float) -> int:
        """Gives how many of the decoder's positions a clip takes."""

    @abstractmethod
    def conversation(self, language: str | None) -> tuple[list[dict[str, Any]], dict[str, bool]]:
        """Gives what the chat template is filled with, and whether the last turn is begun or to be continued."""

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the layers that adapters can go on: those of the language model."""
        return ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    @property
    def vocabulary(self) -> int:
        """How many token ids the network knows."""
        return int(self.config.text_config.vocab_size)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The token ids that close a transcript; the first is the one that is trained."""
        stated = self.model.generation_config.eos_token_id
        own = self.tokenizer.eos_token_id
        found = [stated] if isinstance(stated, int) else list(stated or ())
        return tuple(dict.fromkeys([own, *found] if own in found or not found else [*found]))

    def prompt(self, language: str | None) -> tuple[list[int], list[int]]:
        """Gives the token ids before and behind the place of the audio.

        Raises:
            InvalidInput: PromptUnsupported.
        """
        messages, turn = self.conversation(language)
        text = self.processor.apply_chat_template(messages, tokenize=False, **turn)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        places = [place for place, token in enumerate(ids) if token == self.config.audio_token_id]
        if len(places) != 1 or places[0] == len(ids) - 1:
            message = (
                f"the chat template of the base model makes {len(places)} audio tokens of a turn with one clip, and "
                "one is needed, with something behind it; upload the chat_template.jinja that belongs to the model"
            )
            raise InvalidInput("PromptUnsupported", message)
        return ids[: places[0]], ids[places[0] + 1 :]

    def room(self, language: str | None) -> int:
        """Gives how many tokens a transcript may have beside the longest clip."""
        before, behind = self.prompt(language)
        most = int(self.config.text_config.max_position_embeddings)
        return most - len(before) - len(behind) - self.heard_positions(self.window_seconds)

    def describe_room(self) -> str:
        """Says which transcripts the model has no room for."""
        return f"have transcripts longer than the {self.room(None)} tokens that its prompt and the audio leave"

    def write(self, transcripts: Sequence[Sequence[int]], language: str | None) -> TokenBatch:
        """Puts what stands behind the audio side by side: the rest of the prompt, which counts for nothing, and words.

        What stands before it is the same for all, and the loss puts it there.
        """
        _, behind = self.prompt(language)
        return write_behind(behind, transcripts, self.ends[0])

    def loss(self, features: Tensor, inputs: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """Gives the cross entropy of the transcripts, averaged over their tokens."""
        counted = targets != IGNORED
        logits = self.model.lm_head(self._read(features, inputs, lengths)[counted])
        return nn.functional.cross_entropy(logits.float(), targets[counted])

    def logits(self, features: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Gives the decoder's logits behind the audio, shape (clips, tokens, vocabulary)."""
        found: Tensor = self.model.lm_head(self._read(features, inputs, lengths))
        return found.float()

    @torch.inference_mode()
    def decode(
        self, features: Tensor, lengths: Tensor, language: str | None = None, limit: int | None = None
    ) -> list[str]:
        """Transcribes a batch greedily."""
        device = self.model.device
        told = language if language in self.languages() else None
        heard = self._embed(self.listen(features.to(device, self.model.dtype), lengths.to(device)))
        behind = torch.tensor([self.prompt(told)[1]] * len(heard), device=device)
        limits = [token_limit(samples, self.room(told)) for samples in lengths.tolist()]
        if limit is not None:
            limits = [min(one, limit) for one in limits]
        said = decode_greedily(
            _PromptedDecoding(self.model, heard),
            behind,
            limits,
            ends=self.ends,
            suppressed=torch.tensor(self._suppressed(told), dtype=torch.long, device=device),
        )
        return [self.tokenizer.decode(self._words(ids), skip_special_tokens=True).strip() for ids in said]

    def save_companions(self, folder: Path) -> None:
        """Writes tokenizer, feature extractor and chat template."""
        self.processor.save_pretrained(folder)

    def _suppressed(self, language: str | None) -> list[int]:  # noqa: ARG002 (a family may have to say more)
        """Lists ids that are never said: special tokens but the ends, and what the tokenizer does not know."""
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        unknown = range(len(self.tokenizer), self.vocabulary)
        return sorted((special | {*self.tokenizer.all_special_ids, *unknown}) - {*self.ends})

    def _words(self, ids: list[int]) -> list[int]:
        """Gives the part of what was said that is the transcript."""
        return ids

    def _embed(self, heard: list[Tensor]) -> list[Tensor]:
        """Puts what stands before the audio before each clip; no language is told there."""
        embed = self.model.get_input_embeddings()
        before = embed(torch.tensor(self.prompt(None)[0], dtype=torch.long, device=heard[0].device))
        return [torch.cat([before, clip.to(before.dtype)]) for clip in heard]

    def _read(self, features: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Gives the hidden states that belong to the inputs, shape (clips, tokens, units)."""
        heard = self._embed(self.listen(features, lengths))
        texts = self.model.get_input_embeddings()(inputs)
        # Padding stands behind each row, where a causal decoder does not see it.
        rows = [torch.cat([clip, text]) for clip, text in zip(heard, texts, strict=True)]
        hidden = self.model.model.language_model(
            inputs_embeds=pad_sequence(rows, batch_first=True), use_cache=False
        ).last_hidden_state
        width = inputs.shape[1]
        return torch.stack([row[len(clip) : len(clip) + width] for row, clip in zip(hidden, heard, strict=True)])


class _PromptedDecoding:
    """Decoding behind prompts of different lengths: padding stands before them, and is not attended to."""

    def __init__(self, model: Any, heard: list[Tensor]) -> None:
        self._model = model
        self._heard: Tensor | None = pad_sequence(heard, batch_first=True, padding_side="left")
        counts = torch.tensor([len(clip) for clip in heard], device=self._heard.device)
        width = self._heard.shape[1]
        self._mask = torch.arange(width, device=counts.device) >= (width - counts)[:, None]
        self._cache = DynamicCache()

    def advance(self, tokens: Tensor) -> Tensor:
        """Gives the logits of the next token; the first call reads what was heard as well."""
        embedded = self._model.get_input_embeddings()(tokens)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        if self._heard is not None:
            embedded = torch.cat([self._heard, embedded], dim=1)
            self._heard = None
        places = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self._model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=self._mask,
            position_ids=places[:, -embedded.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        logits: Tensor = self._model.lm_head(hidden[:, -1])
        return logits

    def keep(self, rows: Tensor) -> None:
        """Forgets all rows but these."""
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]


class SlicedQwen2AudioEncoder(Qwen2AudioEncoder):  # type: ignore[misc]
    """Qwen2-Audio's encoder, cut to the length of its input."""

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """Encodes log-mel features of shape (clips, mels, frames), frames a multiple of 4 and at most the window's."""
        del kwargs
        hidden = nn.functional.gelu(self.conv1(input_features))
        hidden = nn.functional.gelu(self.conv2(hidden)).permute(0, 2, 1)
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        hidden = nn.functional.dropout(hidden, p=self.dropout, training=self.training)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
        pooled = self.avg_pooler(hidden.permute(0, 2, 1)).permute(0, 2, 1)
        return BaseModelOutput(last_hidden_state=self.layer_norm(pooled))


class Qwen2Audio(AudioLlm):
    """Qwen2-Audio (arXiv 2407.10759): Whisper's encoder, one projection, and a Qwen2."""

    network_class: ClassVar[Any] = Qwen2AudioForConditionalGeneration

    @classmethod
    def _prepare(cls, network: Any) -> None:
        network.model.audio_tower.__class__ = SlicedQwen2AudioEncoder

    @property
    def window_seconds(self) -> float:
        """The longest audio that one pass takes."""
        return float(2 * self.config.audio_config.max_source_positions * self.extractor.hop_length / SAMPLE_RATE)

    def conversation(self, language: str | None) -> tuple[list[dict[str, Any]], dict[str, bool]]:
        """Gives a turn of the user's: the clip, and what to do with it."""
        del language
        content = [{"type": "audio", "audio_url": _CLIP}, {"type": "text", "text": _INSTRUCTION}]
        return [{"role": "user", "content": content}], {"add_generation_prompt": True}

    def features(self, audio: Sequence[Audio], seconds: float) -> Tensor:
        """Turns clips into log-mel features of shape (clips, mels, frames), each padded with silence."""
        quantum = 4 * self.extractor.hop_length  # a position of the decoder's
        samples = -(-round(seconds * SAMPLE_RATE) // quantum) * quantum
        return self.extract(audio, samples, "input_features")

    def heard_positions(self, seconds: float) -> int:
        """Gives how many of the decoder's positions a clip takes."""
        return int(self._positions(torch.tensor([round(seconds * SAMPLE_RATE)]))[1])

    def listen(self, features: Tensor, lengths: Tensor) -> list[Tensor]:
        """Gives what the decoder hears of each clip."""
        tower = self.model.model.audio_tower
        encoded, heard = self._positions(lengths)
        width = features.shape[2] // 2
        mask = create_bidirectional_mask(
            config=tower.config,
            inputs_embeds=features.new_zeros(len(features), width, 1),
            attention_mask=torch.arange(width, device=lengths.device) < encoded[:, None],
        )
        hidden = self.model.model.multi_modal_projector(tower(features, attention_mask=mask).last_hidden_state)
        return [clip[:count] for clip, count in zip(hidden, heard.tolist(), strict=True)]

    def _positions(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Gives how many positions of the encoder's, and of the decoder's, so many samples take."""
        hop = self.extractor.hop_length
        frames = torch.div(lengths + hop - 1, hop, rounding_mode="floor").clamp(min=4)
        found: tuple[Tensor, Tensor] = self.model.model.audio_tower._get_feat_extract_output_lengths(frames)  # noqa: SLF001
        return found


class Qwen3Asr(AudioLlm):
    """Qwen3-ASR: an encoder of chunks of a second, a projector, and a Qwen3 that is told the language."""

    network_class: ClassVar[Any] = Qwen3ASRForConditionalGeneration

    def languages(self) -> Collection[str]:
        """Gives the ISO codes of the languages that the model can be told."""
        return tuple(LANGUAGE_CODE_TO_NAME)

    def conversation(self, language: str | None) -> tuple[list[dict[str, Any]], dict[str, bool]]:
        """Gives a turn of the user's, which is the clip, and the begin of the answer, which names the language."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "audio", "audio": _CLIP}]}]
        if language is None:
            return messages, {"add_generation_prompt": True}
        told = f"language {LANGUAGE_CODE_TO_NAME[language]}{_TEXT_MARK}"
        messages.append({"role": "assistant", "content": [{"type": "text", "text": told}]})
        return messages, {"continue_final_message": True}

    def features(self, audio: Sequence[Audio], seconds: float) -> Tensor:
        """Turns clips into log-mel features of shape (clips, mels, frames), of whole chunks."""
        chunk = self._chunk * self.extractor.hop_length
        samples = -(-round(seconds * SAMPLE_RATE) // chunk) * chunk
        return self.extract(audio, samples, "input_features", n_window=self.config.audio_config.n_window)

    def heard_positions(self, seconds: float) -> int:
        """Gives how many of the decoder's positions a clip takes."""
        samples = torch.tensor([round(seconds * SAMPLE_RATE)])
        chunks = -(-round(seconds * SAMPLE_RATE) // (self._chunk * self.extractor.hop_length))
        return int(self._positions(self._frames(samples, chunks * self._chunk)))

    def listen(self, features: Tensor, lengths: Tensor) -> list[Tensor]:
        """Gives what the decoder hears of each clip."""
        mask = self._frames(lengths, features.shape[2])
        heard = self.model.model.get_audio_features(features, mask.long(), return_dict=True).pooler_output
        return list(heard.split(self._positions(mask).tolist()))

    @property
    def _chunk(self) -> int:
        """Frames of a chunk."""
        return 2 * int(self.config.audio_config.n_window)

    def _frames(self, lengths: Tensor, width: int) -> Tensor:
        """Tells which frames are no padding, shape (clips, width); a short clip's silence is heard, too."""
        hop = self.extractor.hop_length
        frames = torch.div(lengths.clamp(min=self.extractor.min_length) + hop - 1, hop, rounding_mode="floor")
        return torch.arange(width, device=lengths.device) < frames[:, None]

    def _positions(self, frames: Tensor) -> Tensor:
        chunks = frames.view(len(frames), -1, self._chunk).sum(dim=2)
        positions: Tensor = self.model.model.audio_tower._post_cnn_length(chunks).sum(dim=1)  # noqa: SLF001 (no other way)
        return positions

    def _words(self, ids: list[int]) -> list[int]:
        """Gives what stands behind the name of the language, where the model was not told it."""
        mark = self.tokenizer.convert_tokens_to_ids(_TEXT_MARK)
        return ids[ids.index(mark) + 1 :] if mark in ids else ids

    def _suppressed(self, language: str | None) -> list[int]:
        """Lets the mark behind the language's name be said where no language was told."""
        mark = self.tokenizer.convert_tokens_to_ids(_TEXT_MARK)
        return [token for token in super()._suppressed(language) if language is not None or token != mark]
