"""attune.json: what a model folder says of itself beside its weights, first of all how its audio is to be padded."""

from pathlib import Path

from attune.contract.training import Padding
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from attune_trainer.failures import InvalidInput
from attune_trainer.lineage import ARTIFACT_FILE, History


class Artifact(BaseModel):
    """How a model wants its audio, and where it comes from.

    Attributes:
        padding: Window for a pretrained model, Buckets for one that was tuned on sliced encoders.
        buckets: durations in seconds, ascending; Buckets only.
        base_model: address of the model that was tuned; None for a pretrained one.
        model_id: the name under which it is served.
        language: ISO 639-1 code that a multilingual model is prompted with; None lets it detect the language.
        history: how it came to be, the newest generation first; empty for a pretrained model.
    """

    # Unknown keys are kept out of the way, not refused: a newer image may have written the file.
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    padding: Padding = Padding.WINDOW
    buckets: tuple[float, ...] = Field(default=(), max_length=64)
    base_model: str | None = None
    model_id: str | None = None
    language: str | None = None
    history: History = ()


def read_artifact(folder: Path) -> Artifact:
    """Reads a model folder's attune.json; a folder without one holds a pretrained model.

    Raises:
        InvalidInput: InvalidModelFile, where the file is there and cannot be understood.
    """
    file = folder / ARTIFACT_FILE
    if not file.is_file():
        return Artifact()
    try:
        return Artifact.model_validate_json(file.read_bytes())
    except ValidationError as error:
        places = ", ".join(".".join(map(str, entry["loc"])) or "the whole" for entry in error.errors()[:3])
        message = f"{ARTIFACT_FILE} of the model is not valid ({places}); restore it as the FineTune wrote it"
        raise InvalidInput("InvalidModelFile", message) from error


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Writes attune.json into a model folder."""
    text = artifact.model_dump_json(by_alias=True, exclude_none=True, indent=1)
    (folder / ARTIFACT_FILE).write_text(f"{text}\n", encoding="utf-8")
