"""What a training process is told: one JSON file, written by the Job's own process when all inputs are on disk."""

import hashlib
from pathlib import Path
from typing import Final

from attune.contract.costs import Budget
from attune.contract.training import (
    Augmentation,
    Checkpointing,
    Distributed,
    EarlyStopping,
    Ewc,
    Hyperparameters,
    Lora,
    Method,
    Padding,
)
from pydantic import BaseModel, ConfigDict

from attune_trainer.lineage import Generation
from attune_trainer.training.mixture import Mixture

# Below TrainingSettings.output.
MODEL_FOLDER: Final = "merged"
ADAPTER_FOLDER: Final = "adapter"


class TrainingUtterance(BaseModel):
    """One utterance on the local disk.

    Attributes:
        audio: FLAC or WAV file, mono at 16 kHz.
        text: its transcript, as the model is to write it.
        seconds: duration.
        part: what it is in a mixture: the number of its Dataset, or the number after the last one for the old domain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    audio: Path
    text: str
    seconds: float
    part: int = 0


class Keeping(BaseModel):
    """What is known of an old domain that is not to be forgotten.

    Attributes:
        validation: transcribed after each epoch too.
        ewc: how strongly weights are held; None not at all.
        sample: what the old domain's need of the weights is estimated on; empty without ewc.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    validation: tuple[TrainingUtterance, ...]
    ewc: Ewc | None = None
    sample: tuple[TrainingUtterance, ...] = ()


class TrainingSettings(BaseModel):
    """Everything that a training process needs; paths are on the disk that the processes of its pod share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Path
    base_uri: str
    model_id: str
    language: str
    train: tuple[TrainingUtterance, ...]
    validation: tuple[TrainingUtterance, ...]
    method: Method
    lora: Lora
    hyperparameters: Hyperparameters
    padding: Padding
    early_stopping: EarlyStopping | None
    budget: Budget | None = None
    checkpoint: Checkpointing
    distributed: Distributed
    fingerprint: str  # of all that must be the same for a checkpoint to be continued
    checkpoints: Path  # where checkpoints are written, one folder each
    resume: Path | None  # a verified checkpoint to go on from
    output: Path  # gets MODEL_FOLDER, ADAPTER_FOLDER where there is an adapter, and the last TrainingState
    stop_file: Path  # exists once the run is to end after the current step
    mark: str = ""  # of this attempt's checkpoints, where several pods upload a part of each
    augmentation: Augmentation | None = None
    noises: tuple[Path, ...] = ()  # own recordings for augmentation, mono at 16 kHz
    rooms: tuple[Path, ...] = ()  # own impulse responses, likewise
    mixture: Mixture | None = None  # None trains on every utterance once an epoch
    keeping: Keeping | None = None
    history: tuple[Generation, ...] = ()  # of the model that comes out, itself first


def fingerprint(*parts: str) -> str:
    """Gives 64 hexadecimal digits over texts that together fix the course of a run."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(f"{len(part.encode())}:{part}".encode())
    return whole.hexdigest()
