"""What a finished run leaves: a model folder that says how it wants its audio."""

import json
from pathlib import Path
from typing import Any

import torch
from attune.contract.training import Padding

from attune_trainer.lineage import Generation
from attune_trainer.modeling.artifact import Artifact, write_artifact
from attune_trainer.modeling.buckets import BUCKETS, fit_buckets
from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.training.settings import MODEL_FOLDER


def write_model(network: Any, speech_model: SpeechModel, folder: Path, *, base: Path, artifact: Artifact) -> None:
    """Writes a network, without adapters, as a complete transformers checkpoint in the base's own precision."""
    target = folder / MODEL_FOLDER
    _clean_generation(network)
    network.to(_stored_dtype(base)).save_pretrained(target, safe_serialization=True)
    speech_model.save_companions(target)
    write_artifact(target, artifact)


def is_stored_in_fp32(folder: Path) -> bool:
    """Tells whether a checkpoint holds what was computed without rounding."""
    return _stored_dtype(folder) is torch.float32


def describe_artifact(
    speech_model: SpeechModel,
    padding: Padding,
    *,
    base_uri: str,
    model_id: str,
    language: str | None,
    history: tuple[Generation, ...] = (),
) -> Artifact:
    """Says how the tuned model wants its audio and where it comes from."""
    buckets = fit_buckets(BUCKETS, speech_model.window_seconds) if padding is Padding.BUCKETS else ()
    return Artifact(
        padding=padding, buckets=buckets, base_model=base_uri, model_id=model_id, language=language, history=history
    )


def clean_generation(speech_model: SpeechModel) -> None:
    """Makes decoding free of the base's habits that training overrides; training and serving then decode alike.

    Forced ids contradict the prompt, and the list of suppressed symbols bans characters that the training transcripts
    may hold. Special tokens stay suppressed all the same.
    """
    _clean_generation(speech_model.model)


def _clean_generation(network: Any) -> None:
    for config in (getattr(network, "generation_config", None), network.config):
        for name in ("forced_decoder_ids", "suppress_tokens"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)


def _stored_dtype(folder: Path) -> torch.dtype:
    config = json.loads((folder / "config.json").read_bytes())
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32
