"""What a training process is told: one JSON file, written by the Job's own process when all inputs are on disk."""

import hashlib
from pathlib import Path

from attune.contract.costs import Budget
from attune.contract.training import Checkpointing, Distributed, EarlyStopping, Hyperparameters, Lora, Padding
from pydantic import BaseModel, ConfigDict


class TrainingUtterance(BaseModel):
    """One utterance on the local disk.

    Attributes:
        audio: FLAC or WAV file, mono at 16 kHz.
        text: its transcript, as the model is to write it.
        seconds: duration.
        block: speaker, call or group; utterances of one are not independent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    audio: Path
    text: str
    seconds: float
    block: str = ""


class TrainingSettings(BaseModel):
    """Everything that a training process needs; paths are on the disk that all processes of the pod share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Path
    base_uri: str
    model_id: str
    language: str
    train: tuple[TrainingUtterance, ...]
    validation: tuple[TrainingUtterance, ...]
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
    output: Path  # gets merged/, adapter/ and the last TrainingState
    stop_file: Path  # exists once the run is to end after the current step


def fingerprint(*parts: str) -> str:
    """Gives 64 hexadecimal digits over texts that together fix the course of a run."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(f"{len(part.encode())}:{part}".encode())
    return whole.hexdigest()
