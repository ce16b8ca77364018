"""Low-rank adapters: attaching, saving, and melting them into the weights."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from attune.contract.training import Lora, LoraVariant
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from attune_trainer.failures import InvalidInput
from attune_trainer.modeling.artifact import Artifact, write_artifact
from attune_trainer.modeling.speech_model import SpeechModel
from attune_trainer.training.export import write_model
from attune_trainer.training.settings import ADAPTER_FOLDER
from attune_trainer.training.weights import check_shapes, copy_to_host


class Adapters:
    """LoRA and its variants: adapters beside frozen linear layers."""

    def __init__(self, lora: Lora) -> None:
        self._lora = lora

    def attach(self, speech_model: SpeechModel) -> PeftModel:
        """Puts adapters on linear layers; all other weights are frozen.

        peft's task type stays unset: its wrappers pass input_ids, which most recognisers do not take.

        Raises:
            InvalidInput: UnknownTargetModule, where the model has no layer of a name that is given; RankTooLarge, where
                the rank exceeds the narrowest of the layers.
        """
        lora = self._lora
        targets = lora.target_modules or list(speech_model.linear_layers)
        self._check(speech_model, targets)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=float(lora.dropout),
            use_rslora=lora.variant is LoraVariant.RSLORA,
            use_dora=lora.variant is LoraVariant.DORA,
            target_modules=_name_layers(speech_model, targets),
            bias="none",
        )
        with warnings.catch_warnings():
            # peft asks transformers by a name that transformers has renamed; the answer is the same.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return get_peft_model(speech_model.model, config)

    def state(self, model: PeftModel) -> dict[str, Tensor]:
        """Copies the adapters' weights to the host, under peft's names."""
        return copy_to_host(_weights(model))

    def load(self, model: PeftModel, state: Mapping[str, Tensor]) -> None:
        """Puts adapters' weights back.

        Raises:
            ValueError: when names or shapes are not those of the model.
        """
        check_shapes(_weights(model), state)
        set_peft_model_state_dict(model, dict(state))

    def export(
        self, model: PeftModel, speech_model: SpeechModel, folder: Path, *, base: Path, artifact: Artifact
    ) -> None:
        """Writes adapter/ and merged/; afterwards `model` is the merged one and has no adapters."""
        adapter = folder / ADAPTER_FOLDER
        model.peft_config["default"].base_model_name_or_path = artifact.base_model
        # Stated, or peft looks for the base at its address to see whether the vocabulary was changed.
        model.save_pretrained(adapter, safe_serialization=True, save_embedding_layers=False)
        _sort_lists(adapter / "adapter_config.json")
        (adapter / "README.md").unlink(missing_ok=True)  # peft's model card: a form with nothing filled in
        write_artifact(adapter, artifact)
        write_model(model.merge_and_unload(), speech_model, folder, base=base, artifact=artifact)

    def _check(self, speech_model: SpeechModel, targets: list[str]) -> None:
        unknown = sorted(set(targets) - set(speech_model.linear_layers))
        if unknown:
            message = (
                f"spec.lora.targetModules names {', '.join(unknown)}, which no layer of the base model is called; it "
                f"has {', '.join(speech_model.linear_layers)}"
            )
            raise InvalidInput("UnknownTargetModule", message)
        narrowest = min(
            min(layer.in_features, layer.out_features)
            for name, layer in linear_layers(speech_model)
            if name.rpartition(".")[2] in targets
        )
        if self._lora.rank > narrowest:
            message = (
                f"spec.lora.rank is {self._lora.rank}, but the narrowest layer that it goes on has {narrowest} units; "
                f"lower it to {narrowest} or less"
            )
            raise InvalidInput("RankTooLarge", message)


def linear_layers(speech_model: SpeechModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yields the linear layers that adapters can go on with their paths; the vocabulary's projection is none."""
    for name, module in speech_model.model.named_modules():
        if (
            isinstance(module, nn.Linear)
            and name.rpartition(".")[2] in speech_model.linear_layers
            and name.startswith(speech_model.adapted_part)
        ):
            yield name, module


def _name_layers(speech_model: SpeechModel, targets: list[str]) -> list[str] | str:
    """Says to peft which layers it is to adapt: by their last names, or by an expression for whole paths."""
    if not speech_model.adapted_part:
        return targets
    return rf"{re.escape(speech_model.adapted_part)}\.(.+\.)?({'|'.join(targets)})"


def _weights(model: PeftModel) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


def _sort_lists(file: Path) -> None:
    """Orders what peft keeps as sets, so that equal adapters have equal digests."""
    config = json.loads(file.read_bytes())
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    file.write_text(json.dumps(ordered, indent=2, sort_keys=True), encoding="utf-8")
