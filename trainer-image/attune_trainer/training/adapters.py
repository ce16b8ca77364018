"""Low-rank adapters: attaching, saving, and melting them into the weights."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from attune.contract.training import Lora, Padding
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attune_trainer.failures import InvalidInput
from attune_trainer.lineage import Generation
from attune_trainer.modeling.artifact import Artifact, write_artifact
from attune_trainer.modeling.buckets import BUCKETS, fit_buckets
from attune_trainer.modeling.whisper import LINEAR_LAYERS, Whisper

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def attach_adapters(whisper: Whisper, lora: Lora) -> PeftModel:
    """Puts adapters on every linear layer of encoder and decoder; all other weights are frozen.

    peft's task type stays unset: its sequence-to-sequence wrapper passes input_ids, which Whisper does not take.

    Raises:
        InvalidInput: RankTooLarge, where the rank exceeds the narrowest of those layers.
    """
    narrowest = min(
        min(module.in_features, module.out_features)
        for name, module in whisper.model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEAR_LAYERS
    )
    if lora.rank > narrowest:
        message = (
            f"spec.lora.rank is {lora.rank}, but the narrowest layer of the base model has {narrowest} units; "
            f"lower it to {narrowest} or less"
        )
        raise InvalidInput("RankTooLarge", message)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=float(lora.dropout),
        target_modules=list(LINEAR_LAYERS),
        bias="none",
    )
    with warnings.catch_warnings():
        # peft asks transformers by a name that transformers has renamed; the answer is the same.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(whisper.model, config)


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Copies the adapters' weights to the host."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in get_peft_model_state_dict(model).items()
    }


def save_adapter_state(state: dict[str, Tensor], file: Path) -> None:
    """Writes adapters' weights as safetensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={"format": "pt"})


def load_adapter_state(model: PeftModel, file: Path) -> None:
    """Reads adapters' weights back.

    Raises:
        ValueError: when names or shapes are not those of the model.
    """
    state = load_file(file)
    expected = {name: value.shape for name, value in get_peft_model_state_dict(model).items()}
    found = {name: value.shape for name, value in state.items()}
    if found != expected:
        differing = sorted(set(expected) ^ set(found)) or sorted(n for n in expected if expected[n] != found[n])
        raise ValueError(f"{file.name} does not hold the adapters of this model; {differing[0]} differs")
    set_peft_model_state_dict(model, state)


def export(model: PeftModel, whisper: Whisper, folder: Path, *, base: Path, artifact: Artifact) -> tuple[Path, Path]:
    """Writes adapter/ and merged/ below a folder; afterwards `model` is the merged one and has no adapters.

    merged/ is a complete transformers checkpoint in the base's own precision, with attune.json beside it.
    """
    adapter, merged = folder / "adapter", folder / "merged"
    model.peft_config["default"].base_model_name_or_path = artifact.base_model
    # Stated, or peft looks for the base at its address to see whether the vocabulary was changed.
    model.save_pretrained(adapter, safe_serialization=True, save_embedding_layers=False)
    _sort_lists(adapter / "adapter_config.json")
    (adapter / "README.md").unlink(missing_ok=True)  # peft's model card: a form with nothing filled in
    write_artifact(adapter, artifact)
    network = model.merge_and_unload()
    _clean_generation(network)
    network.to(_stored_dtype(base)).save_pretrained(merged, safe_serialization=True)
    whisper.tokenizer.save_pretrained(merged)
    whisper.extractor.save_pretrained(merged)
    write_artifact(merged, artifact)
    return adapter, merged


def describe_artifact(
    whisper: Whisper,
    padding: Padding,
    *,
    base_uri: str,
    model_id: str,
    language: str | None,
    history: tuple[Generation, ...] = (),
) -> Artifact:
    """Says how the tuned model wants its audio and where it comes from."""
    buckets = fit_buckets(BUCKETS, whisper.window_seconds) if padding is Padding.BUCKETS else ()
    return Artifact(
        padding=padding, buckets=buckets, base_model=base_uri, model_id=model_id, language=language, history=history
    )


def clean_generation(whisper: Whisper) -> None:
    """Makes decoding free of the base's habits that training overrides; training and serving then decode alike.

    Forced ids contradict the prompt, and the list of suppressed symbols bans characters that the training transcripts
    may hold. Special tokens stay suppressed all the same.
    """
    _clean_generation(whisper.model)


def _clean_generation(network: Any) -> None:
    for config in (network.generation_config, network.config):
        for name in ("forced_decoder_ids", "suppress_tokens"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)


def _sort_lists(file: Path) -> None:
    """Orders what peft keeps as sets, so that equal adapters have equal digests."""
    config = json.loads(file.read_bytes())
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    file.write_text(json.dumps(ordered, indent=2, sort_keys=True), encoding="utf-8")


def _stored_dtype(base: Path) -> torch.dtype:
    config = json.loads((base / "config.json").read_bytes())
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32
