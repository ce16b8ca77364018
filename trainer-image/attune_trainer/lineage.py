"""What a model folder says of how the model came to be: part of its attune.json, and read without loading the model."""

from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from attune_trainer.failures import InvalidInput

ARTIFACT_FILE: Final = "attune.json"
MAX_GENERATIONS: Final = 64


class TrainedOn(BaseModel):
    """A Dataset, at one revision, that a generation heard. uri is the revision's folder."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    revision: str
    uri: str


class Generation(BaseModel):
    """One tuning in a model's history.

    Attributes:
        model_id: what came of it.
        base_model: address of the model that it began with.
        base_digest: digest of that model's files.
        datasets: what it was trained on, a replayed Dataset included.
    """

    # Unknown keys are kept out of the way, not refused: a newer image may have written the file.
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    model_id: str
    base_model: str
    base_digest: str
    datasets: Annotated[tuple[TrainedOn, ...], Field(max_length=16)] = ()


# The newest generation first.
History = Annotated[tuple[Generation, ...], Field(max_length=MAX_GENERATIONS)]


class _Described(BaseModel):
    model_config = ConfigDict(extra="ignore")

    history: History = ()


def read_history(folder: Path) -> tuple[Generation, ...]:
    """Reads the generations of the model in a folder, the newest first; a pretrained model has none.

    Raises:
        InvalidInput: InvalidModelFile, where attune.json is there and cannot be understood.
    """
    file = folder / ARTIFACT_FILE
    if not file.is_file():
        return ()
    try:
        return _Described.model_validate_json(file.read_bytes()).history
    except ValidationError as error:
        message = f"{ARTIFACT_FILE} of the model is not valid at its history; restore it as the FineTune wrote it"
        raise InvalidInput("InvalidModelFile", message) from error
