"""Which families of models this image knows, and which one a folder is of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from attune_trainer.failures import InvalidInput, UnsupportedModel
from attune_trainer.modeling.audio_llm import Qwen2Audio, Qwen3Asr
from attune_trainer.modeling.ctc import Hubert, Parakeet, Wav2Vec2, WavLM
from attune_trainer.modeling.moonshine import Moonshine
from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.modeling.whisper import Whisper

FAMILIES: Final[tuple[type[SpeechModel], ...]] = (
    Whisper,
    Moonshine,
    Wav2Vec2,
    Hubert,
    WavLM,
    Parakeet,
    Qwen2Audio,
    Qwen3Asr,
)
ARCHITECTURES: Final[Mapping[str, type[SpeechModel]]] = {
    name: family for family in FAMILIES for name in family.architectures
}


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> SpeechModel:
    """Loads a model from a folder of safetensors; nothing is fetched and no code in the folder is run.

    Raises:
        UnsupportedModel: for an architecture that this image does not know.
        InvalidInput: for a folder in which something is missing or does not fit together.
    """
    return choose_family(folder).load(folder, device, dtype)


def choose_family(folder: Path) -> type[SpeechModel]:
    """Tells which family the model in a folder is of.

    Raises:
        UnsupportedModel: for an architecture that this image cannot load, naming it and the known ones.
        InvalidInput: InvalidModelFile, where config.json is missing or no JSON.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError as error:
        message = "the model's folder has no config.json; upload everything that save_pretrained writes"
        raise InvalidInput("InvalidModelFile", message) from error
    except ValueError as error:
        raise InvalidInput(
            "InvalidModelFile", "config.json of the model is not JSON; upload the model again"
        ) from error
    found = config.get("architectures") if isinstance(config, dict) else None
    names = [str(name) for name in found] if isinstance(found, list) else []
    if not names and isinstance(config, dict):
        stated = str(config.get("model_type"))
        names = [name for name, family in ARCHITECTURES.items() if family.architectures[name] == stated]
    known = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    if known is None:
        raise UnsupportedModel(
            f"the model's config.json names the architecture {(', '.join(names) or 'none')[:200]}; this image knows "
            f"{', '.join(ARCHITECTURES)}: choose a base model of one of these architectures"
        )
    return known
