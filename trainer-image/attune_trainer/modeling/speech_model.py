"""What training and serving ask of a model, whatever family it is of."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from attune_trainer.failures import InvalidInput, RecipeFailure, is_out_of_memory

# Bars drawn over themselves are noise in a Job's log.
disable_progress_bar()

Audio = npt.NDArray[np.float32]

SAMPLE_RATE: Final = 16000  # Hz
IGNORED: Final = -100  # cross entropy's own default
# Where the architecture sets no bound, memory does: attention grows with the square of a clip's length.
LONGEST_SECONDS: Final = 30.0


@dataclass(frozen=True)
class TokenBatch:
    """What is read and what is to be said, of shape (utterances, tokens); targets are IGNORED outside the transcript.

    A model that reads no tokens has inputs of shape (utterances, 0).
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class SpeechModel(ABC):
    """A loaded recogniser with everything that belongs to it; one subclass for each family.

    The five methods in which families differ are load, features, write, loss and decode.

    Attributes:
        model: the network, in evaluation mode.
        tokenizer: text to token ids and back.
        extractor: samples to what the network takes.
    """

    # Whether padding changes what is heard; a model that is told what is padding hears the same however long it is.
    hears_padding: ClassVar[bool] = False
    # Whether the network takes samples, and not log-mel features.
    reads_samples: ClassVar[bool] = False
    # The part of the network that adapters go on; empty for all of it.
    adapted_part: ClassVar[str] = ""

    model: Any
    tokenizer: Any
    extractor: Any

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Loads a model from a folder of safetensors; nothing is fetched and no code in the folder is run.

        Raises:
            InvalidInput: for a folder in which something is missing or does not fit together.
        """

    @abstractmethod
    def features(self, audio: Sequence[Audio], seconds: float) -> Tensor:
        """Turns clips into what the network takes, shape (clips, ...), each padded to a duration.

        Args:
            audio: samples at 16 kHz; what exceeds `seconds` is cut off.
            seconds: duration to pad to.
        """

    def extract(self, audio: Sequence[Audio], samples: int, name: str, **options: Any) -> Tensor:
        """Turns clips into what the extractor makes of them, each cut or padded to a number of samples.

        Args:
            audio: samples at 16 kHz.
            samples: of each clip.
            name: what the extractor calls its features.
            options: of the extractor.
        """
        batch = self.extractor(
            list(audio),
            padding="max_length",
            max_length=samples,
            truncation=True,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            **options,
        )
        features: Tensor = batch[name]
        return features

    @abstractmethod
    def write(self, transcripts: Sequence[Sequence[int]], language: str | None) -> TokenBatch:
        """Puts transcripts side by side, as the loss takes them.

        Args:
            transcripts: token ids, without prompt and end.
            language: ISO 639-1 code, one of languages(); None for a model that is told none.
        """

    @abstractmethod
    def loss(self, features: Tensor, inputs: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """Gives the mean loss of a batch over the tokens of its transcripts, as a scalar.

        Args:
            features: as features() gives them.
            inputs: as write() gives them.
            targets: likewise.
            lengths: as lengths() gives them.
        """

    @abstractmethod
    def decode(
        self, features: Tensor, lengths: Tensor, language: str | None = None, limit: int | None = None
    ) -> list[str]:
        """Transcribes a batch greedily; it always ends.

        Args:
            features: as features() gives them.
            lengths: as lengths() gives them.
            language: ISO 639-1 code, one of languages(); None detects it, or is all that a model can be told.
            limit: tokens of a transcript, at most.
        """

    @abstractmethod
    def logits(self, features: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Gives what the network says of a batch, as numbers by which two networks can be compared."""

    @property
    @abstractmethod
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the layers that adapters can go on, the same in every block."""

    @property
    def config(self) -> Any:
        """The network's shape."""
        return self.model.config

    @property
    def vocabulary(self) -> int:
        """How many token ids the network knows."""
        return int(self.config.vocab_size)

    @property
    def window_seconds(self) -> float:
        """The longest audio that one pass takes."""
        return LONGEST_SECONDS

    @property
    def first_space(self) -> str:
        """What stands before the first word of a transcript."""
        return ""

    def languages(self) -> Collection[str]:
        """Gives the ISO 639-1 codes of the languages that the model can be told; nothing where it is told none."""
        return ()

    def room(self, language: str | None) -> int:  # noqa: ARG002 (a prompt may depend on it)
        """Gives how many tokens a transcript may have."""
        return sys.maxsize

    def describe_room(self) -> str:
        """Says which transcripts the model has no room for: "have transcripts longer than ..."."""
        return "have transcripts that it has no room for"

    def has_time_for(self, ids: Sequence[int], seconds: float) -> bool:  # noqa: ARG002 (few families need it)
        """Tells whether a clip of a duration is long enough for a transcript."""
        return True

    def tokenise(self, text: str) -> list[int]:
        """Gives the token ids of a text."""
        # Split: a marker such as <|endoftext|> that somebody wrote into a transcript is text, and no token.
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [int(token) for token in found.input_ids]

    def lengths(self, audio: Sequence[Audio], seconds: float) -> Tensor:
        """Gives how many samples of each clip are heard, shape (clips,): those behind `seconds` are not."""
        most = round(seconds * SAMPLE_RATE)
        return torch.tensor([min(len(clip), most) for clip in audio], dtype=torch.long)

    def log_mel(self, features: Tensor) -> Tensor:
        """Gives a view of features in the shape (clips, mels, frames), 100 frames a second."""
        return features

    def set_dropout(self, share: float) -> None:
        """Sets the dropout of hidden states, attention weights and feed-forward activations, for training alone.

        The configuration, which is saved with a tuned model, keeps the base's.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
            for name in ("dropout", "activation_dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), (int, float)):
                    setattr(module, name, share)

    def save_companions(self, folder: Path) -> None:
        """Writes what a model folder needs beside the network: the vocabulary, and how audio becomes features."""
        self.tokenizer.save_pretrained(folder)
        self.extractor.save_pretrained(folder)


def load_network(
    model_class: Any,
    folder: Path,
    dtype: torch.dtype,
    companions: Callable[[Any], tuple[Any, ...]],
    *,
    files: str,
    optional: Collection[str] = (),
) -> tuple[Any, ...]:
    """Loads a network, and with its configuration what belongs to it.

    Args:
        model_class: of transformers.
        folder: where the files are.
        dtype: of the weights.
        companions: loads tokenizer and feature extractor.
        files: what the folder needs beside config.json and *.safetensors, for the message.
        optional: last names of tensors that are not used, and may be missing.

    Returns:
        The network, and what `companions` gives.

    Raises:
        InvalidInput: for a folder in which something is missing or does not fit together.
    """
    try:
        network, report = model_class.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa" if model_class._supports_sdpa else "eager",  # noqa: SLF001 (its public flag)
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        found = companions(network.config)
    except RecipeFailure:
        raise
    except Exception as error:
        # Whatever the readers of weights and vocabularies raise (some of it plain Exception), the files are at fault.
        if is_out_of_memory(error):
            raise
        message = (
            f"the model cannot be loaded ({type(error).__name__}); its folder needs config.json, *.safetensors, "
            f"{files} as save_pretrained writes them"
        )
        raise InvalidInput("InvalidModelFile", message) from error
    for name in report["missing_keys"]:
        if name.rpartition(".")[2] in optional:
            network.get_parameter(name).data.zero_()  # what is written must not depend on chance
    missing = sorted(name for name in report["missing_keys"] if name.rpartition(".")[2] not in optional)
    if missing:
        message = f"the weights of the model lack {len(missing)} tensors, the first is {missing[0]}; upload it again"
        raise InvalidInput("InvalidModelFile", message)
    return network, *found


def load_tokenizer(folder: Path) -> Any:
    """Loads a folder's tokenizer, and nothing from elsewhere."""
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_sampling_rate(extractor: Any) -> None:
    """Lets a feature extractor pass that takes the audio as it is prepared.

    Raises:
        InvalidInput: SampleRateMismatch.
    """
    if extractor.sampling_rate != SAMPLE_RATE:
        message = (
            f"the feature extractor asks for {extractor.sampling_rate} Hz, the audio has {SAMPLE_RATE} Hz; choose a "
            f"base model of {SAMPLE_RATE} Hz"
        )
        raise InvalidInput("SampleRateMismatch", message)


def check_mels(made: int, taken: int) -> None:
    """Lets features pass that have the mel bins that the network takes.

    Raises:
        InvalidInput: MelMismatch.
    """
    if made != taken:
        message = (
            f"preprocessor_config.json makes {made} mel bins, the network takes {taken}; use the "
            "preprocessor_config.json that belongs to this model"
        )
        raise InvalidInput("MelMismatch", message)
