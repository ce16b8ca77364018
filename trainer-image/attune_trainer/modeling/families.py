"""Which families of models this image knows, and which one a folder is of."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch

from attune_trainer.failures import InvalidInput, UnsupportedModel
from attune_trainer.modeling.speech_model import SpeechModel


class Family(NamedTuple):
    """Where the class of a family is, and the `model_type` that stands for it where config.json names no architecture.

    The module is imported when a model of the family is loaded: each brings some seconds of transformers' own modules.
    """

    model_type: str
    module: str
    name: str


FAMILIES: Final[Mapping[str, Family]] = {
    "WhisperForConditionalGeneration": Family("whisper", "whisper", "Whisper"),
    "MoonshineForConditionalGeneration": Family("moonshine", "moonshine", "Moonshine"),
    "Wav2Vec2ForCTC": Family("wav2vec2", "ctc", "Wav2Vec2"),
    "HubertForCTC": Family("hubert", "ctc", "Hubert"),
    "WavLMForCTC": Family("wavlm", "ctc", "WavLM"),
    "ParakeetForCTC": Family("parakeet_ctc", "ctc", "Parakeet"),
    "Qwen2AudioForConditionalGeneration": Family("qwen2_audio", "audio_llm", "Qwen2Audio"),
    "Qwen3ASRForConditionalGeneration": Family("qwen3_asr", "audio_llm", "Qwen3Asr"),
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
        names = [name for name, family in FAMILIES.items() if family.model_type == stated]
    known = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if known is None:
        raise UnsupportedModel(
            f"the model's config.json names the architecture {(', '.join(names) or 'none')[:200]}; this image knows "
            f"{', '.join(FAMILIES)}: choose a base model of one of these architectures"
        )
    module = importlib.import_module(f"attune_trainer.modeling.{known.module}")
    chosen: type[SpeechModel] = getattr(module, known.name)
    return chosen
