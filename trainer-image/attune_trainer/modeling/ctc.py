"""Models that say a character or a blank for each stretch of audio (CTC, Graves et al. 2006)."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoFeatureExtractor,
    HubertForCTC,
    ParakeetForCTC,
    Wav2Vec2ForCTC,
    WavLMForCTC,
)
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.convolutions import Kernels, convolved_length, shortest_input
from attune_trainer.modeling.speech_model import (
    IGNORED,
    SAMPLE_RATE,
    Audio,
    SpeechModel,
    TokenBatch,
    check_mels,
    check_sampling_rate,
    load_network,
    load_tokenizer,
)

_VOCABULARY_FILES: Final = ("vocab.json", "tokenizer.json")
_SHORTEST_PARAKEET: Final = SAMPLE_RATE // 10  # one frame has no variance to divide by


class FixedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation whose statistics stay what they were in pre-training, while its weights may train.

    Those of small batches are poor, padding would count in them, and no adapter could carry them.
    """

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's own)
        """Stays in evaluation mode."""
        del mode
        return super().train(mode=False)


class Ctc(SpeechModel):
    """A network that gives logits for each frame, and a vocabulary of which one token is the blank."""

    network_class: ClassVar[Any]

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Loads a model from a folder of safetensors.

        Raises:
            InvalidInput: VocabularyMissing, or for a folder in which something else is missing or does not fit.
        """
        if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
            message = (
                f"the model's folder has neither {' nor '.join(_VOCABULARY_FILES)}, and a CTC model has no words "
                "without a vocabulary; upload its tokenizer, or choose a base model that was tuned to transcribe"
            )
            raise InvalidInput("VocabularyMissing", message)
        network, tokenizer, extractor = load_network(
            cls.network_class,
            folder,
            dtype,
            lambda config: (load_tokenizer(folder), cls._load_extractor(folder, config)),
            files="preprocessor_config.json, tokenizer_config.json and vocab.json or tokenizer.json",
            optional=("masked_spec_embed",),
        )
        if network.config.pad_token_id is None:
            message = (
                "config.json of the model has no pad_token_id, which names the blank of a CTC model; set it to the "
                "id of the vocabulary's padding token"
            )
            raise InvalidInput("VocabularyMissing", message)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.__class__ = FixedBatchNorm
        cls._prepare(network)
        return cls(model=network.to(device).eval(), tokenizer=tokenizer, extractor=extractor)

    @classmethod
    @abstractmethod
    def _prepare(cls, network: Any) -> None:
        """Settles what is not to train, and that no layer is left out at random."""

    @classmethod
    def _load_extractor(cls, folder: Path, config: Any) -> Any:
        del config
        extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_sampling_rate(extractor)
        return extractor

    @abstractmethod
    def frames(self, lengths: Tensor) -> Tensor:
        """Gives how many frames of logits clips of so many samples have."""

    @property
    def blank(self) -> int:
        """The token id that says nothing."""
        return int(self.config.pad_token_id)

    def describe_room(self) -> str:
        """Says which transcripts the model has no room for."""
        return "have transcripts of more tokens than a CTC model has frames of their audio"

    def has_time_for(self, ids: Sequence[int], seconds: float) -> bool:
        """Tells whether there is a frame for each token, and one for a blank between any two that are the same."""
        needed = len(ids) + sum(one == other for one, other in pairwise(ids))
        return needed <= int(self.frames(torch.tensor([round(seconds * SAMPLE_RATE)])))

    def tokenise(self, text: str) -> list[int]:
        """Gives the token ids of a text; a vocabulary of capitals alone spells it in capitals."""
        return super().tokenise(self._fold(text))

    @cached_property
    def _fold(self) -> Callable[[str], str]:
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        letters = "".join(token for token, number in self.tokenizer.get_vocab().items() if number not in special)
        if letters.upper() != letters.lower():
            if not any(letter.islower() for letter in letters):
                return str.upper
            if not any(letter.isupper() for letter in letters):
                return str.lower
        return str

    def write(self, transcripts: Sequence[Sequence[int]], language: str | None) -> TokenBatch:
        """Puts transcripts side by side; nothing is read, and the loss finds out by itself when which is said."""
        del language
        rows = len(transcripts)
        targets = torch.full((rows, max(1, *(len(ids) for ids in transcripts))), IGNORED, dtype=torch.long)
        for row, ids in enumerate(transcripts):
            targets[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return TokenBatch(torch.empty((rows, 0), dtype=torch.long), targets)

    def loss(self, features: Tensor, inputs: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """Gives the negative log likelihood of the transcripts, divided by the number of their tokens.

        A transcript for which augmentation has left too few frames counts for nothing.
        """
        likelihoods = self.logits(features, inputs, lengths).log_softmax(dim=-1)
        counted = targets != IGNORED
        said = counted.sum(dim=1)
        total = nn.functional.ctc_loss(
            likelihoods.transpose(0, 1),
            targets.masked_fill(~counted, self.blank),
            self.frames(lengths),
            said,
            blank=self.blank,
            reduction="sum",
            zero_infinity=True,
        )
        return total / said.sum().clamp(min=1)

    @torch.inference_mode()
    def decode(
        self, features: Tensor, lengths: Tensor, language: str | None = None, limit: int | None = None
    ) -> list[str]:
        """Takes each frame's likeliest token, then one of each run of the same, then leaves out blanks."""
        del language
        device = self.model.device
        lengths = lengths.to(device)
        nothing = torch.empty((len(features), 0), dtype=torch.long, device=device)
        likeliest = self.logits(features.to(device, self.model.dtype), nothing, lengths).argmax(dim=-1)
        texts = []
        for row, frames in zip(likeliest.tolist(), self.frames(lengths).tolist(), strict=True):
            ids = [token for token, _ in groupby(row[:frames]) if token != self.blank][:limit]
            # The runs are gone already: what is left twice was said twice.
            text: str = self.tokenizer.decode(ids, skip_special_tokens=True, group_tokens=False)
            texts.append(" ".join(text.split()))
        return texts


class Wav2Vec2(Ctc):
    """wav2vec 2.0 (arXiv 2006.11477): convolutions over samples, then a transformer.

    Some of its kind normalise over the whole clip in the first convolution, so padding would change what they hear:
    they hear clips one by one there, and batches behind it. The convolutions never train, as in the paper.
    """

    network_class: ClassVar[Any] = Wav2Vec2ForCTC
    reads_samples: ClassVar[bool] = True

    @classmethod
    def _prepare(cls, network: Any) -> None:
        network.freeze_feature_encoder()
        # What stands for masked frames in pre-training; here no frame is masked.
        mask = getattr(network.base_model, "masked_spec_embed", None)
        if mask is not None:
            mask.requires_grad_(False)  # noqa: FBT003 (torch's own)
        # Processes that train together would leave out different layers.
        network.config.layerdrop = 0.0

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the layers that adapters can go on, the same in every block."""
        return ("q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense")

    def features(self, audio: Sequence[Audio], seconds: float) -> Tensor:
        """Gives samples, normalised clip by clip where the model wants that, shape (clips, samples)."""
        # The mask: or silence behind a clip would count in its mean and variance.
        samples = round(seconds * SAMPLE_RATE)
        return self.extract(audio, samples, "input_values", return_attention_mask=True)

    def frames(self, lengths: Tensor) -> Tensor:
        """Gives how many frames of logits clips of so many samples have."""
        found: Tensor = self.model._get_feat_extract_output_lengths(self._audible(lengths))  # noqa: SLF001 (no other way)
        return found.to(torch.long)

    def logits(self, features: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Gives logits of shape (clips, frames, vocabulary)."""
        del inputs
        base = self.model.base_model
        heard, frames = self._convolve(features, lengths)
        projected = base.feature_projection(heard)
        hidden = projected[0] if isinstance(projected, tuple) else projected
        mask = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]
        hidden = base.encoder(hidden, attention_mask=mask).last_hidden_state
        adapter = getattr(base, "adapter", None)
        if adapter is not None:
            hidden = adapter(hidden.masked_fill(~mask[..., None], 0.0))
        logits: Tensor = self.model.lm_head(self.model.dropout(hidden))
        return logits.float()

    @torch.no_grad()
    def _convolve(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Gives what the convolutions hear, shape (clips, frames, channels), and how many frames of each clip."""
        convolutions = self.model.base_model.feature_extractor
        lengths = self._audible(lengths)
        frames = convolved_length(lengths, self._kernels)
        if self.config.feat_extract_norm != "group":
            return convolutions(features).transpose(1, 2), frames
        clips = [
            convolutions(clip[None, :samples])[0].transpose(0, 1)
            for clip, samples in zip(features, lengths.tolist(), strict=True)
        ]
        return pad_sequence(clips, batch_first=True), frames

    @property
    def _kernels(self) -> Kernels:
        return list(zip(self.config.conv_kernel, self.config.conv_stride, strict=True))

    def _audible(self, lengths: Tensor) -> Tensor:
        """Counts as much of the padding as a frame needs, where a clip is shorter."""
        return lengths.clamp(min=shortest_input(self._kernels))


class Hubert(Wav2Vec2):
    """HuBERT (arXiv 2106.07447)."""

    network_class: ClassVar[Any] = HubertForCTC


class MaskedWavLMAttention(WavLMAttention):  # type: ignore[misc]
    """WavLM's attention, with padding told in the mask that it has already: torch is to give up taking two kinds."""

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attends to positions that are no padding.

        Args:
            hidden_states: shape (clips, positions, units).
            attention_mask: True where a position is no padding, shape (clips, positions).
            gated_position_bias: added to the scores, shape (clips x heads, positions, positions).
        """
        if attention_mask is not None:
            padding = ~attention_mask.repeat_interleave(self.num_heads, dim=0)[:, None]
            gated_position_bias = gated_position_bias.masked_fill(padding, -torch.inf)
        found: tuple[Tensor, Tensor] = super().torch_multi_head_self_attention(hidden_states, None, gated_position_bias)
        return found


class WavLM(Wav2Vec2):
    """WavLM (arXiv 2110.13900)."""

    network_class: ClassVar[Any] = WavLMForCTC

    @classmethod
    def _prepare(cls, network: Any) -> None:
        super()._prepare(network)
        for module in network.modules():
            if isinstance(module, WavLMAttention):
                module.__class__ = MaskedWavLMAttention

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the layers that adapters can go on: its attention multiplies by the weights, past any adapter."""
        return ("intermediate_dense", "output_dense")


class Parakeet(Ctc):
    """Parakeet: a FastConformer (arXiv 2305.05084) over log-mel features, with a CTC head."""

    network_class: ClassVar[Any] = ParakeetForCTC

    @classmethod
    def _prepare(cls, network: Any) -> None:
        network.encoder.layerdrop = 0.0

    @classmethod
    def _load_extractor(cls, folder: Path, config: Any) -> Any:
        extractor = super()._load_extractor(folder, config)
        check_mels(extractor.feature_size, config.encoder_config.num_mel_bins)
        return extractor

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the layers that adapters can go on, the same in every block."""
        return ("q_proj", "k_proj", "v_proj", "o_proj", "linear1", "linear2")

    def features(self, audio: Sequence[Audio], seconds: float) -> Tensor:
        """Turns clips into log-mel features of shape (clips, frames, mels), each normalised without its padding."""
        samples = round(seconds * SAMPLE_RATE)
        batch = self.extractor(
            [_fill_up(clip[:samples]) for clip in audio],
            padding="max_length",
            max_length=samples,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
        )
        features: Tensor = batch["input_features"]
        return features

    def log_mel(self, features: Tensor) -> Tensor:
        """Gives a view of features in the shape (clips, mels, frames)."""
        return features.transpose(1, 2)

    def frames(self, lengths: Tensor) -> Tensor:
        """Gives how many frames of logits clips of so many samples have."""
        found: Tensor = self.model._get_subsampling_output_length(self._mel_frames(lengths))  # noqa: SLF001 (no other way)
        return found.to(torch.long)

    def logits(self, features: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Gives logits of shape (clips, frames, vocabulary)."""
        del inputs
        mask = torch.arange(features.shape[1], device=features.device) < self._mel_frames(lengths)[:, None]
        logits: Tensor = self.model(input_features=features, attention_mask=mask).logits
        return logits.float()

    def _mel_frames(self, lengths: Tensor) -> Tensor:
        frames: Tensor = lengths.clamp(min=_SHORTEST_PARAKEET) // self.extractor.hop_length
        return frames


def _fill_up(clip: Audio) -> Audio:
    return np.pad(clip, (0, max(0, _SHORTEST_PARAKEET - len(clip))))
