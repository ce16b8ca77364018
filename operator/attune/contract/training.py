"""Parameters of a training run: part of the FineTune API and of the Job alike."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from attune.contract.base import ContractModel, DecimalString, ScientificString, between


class Method(StrEnum):
    """How the base model's weights are adapted."""

    LORA = "Lora"


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass. Auto is bf16 where the device computes in it, else fp32."""

    AUTO = "Auto"
    BF16 = "Bf16"
    FP32 = "Fp32"


class Padding(StrEnum):
    """How audio is padded before the encoder, in training and in serving alike.

    Window pads every clip to the model's full window (30 s for Whisper), which is what a pretrained Whisper expects.
    Buckets slices the encoder to the next length bucket: several times faster, and only right for a model that was
    tuned that way.
    """

    WINDOW = "Window"
    BUCKETS = "Buckets"


class Lora(ContractModel):
    """Low-rank adapters on the attention and feed-forward projections of encoder and decoder."""

    rank: int = Field(default=16, ge=1, le=256, description="Rank of the update matrices.")
    alpha: int = Field(default=32, ge=1, le=1024, description="Scale: the update is multiplied by alpha / rank.")
    dropout: Annotated[DecimalString, between("0", "0.9")] = Field(
        default="0", description="Dropout on the adapter's input, 0 to 0.9."
    )


class Hyperparameters(ContractModel):
    """What an optimiser run is made of. Defaults suit LoRA on a Whisper with minutes to hours of audio."""

    learning_rate: Annotated[ScientificString, between("1e-9", "1")] = Field(
        default="1e-3", description="Peak learning rate of AdamW."
    )
    epochs: int = Field(default=3, ge=1, le=1000, description="Passes over the training split.")
    batch_size: int = Field(default=16, ge=1, le=1024, description="Utterances in a batch, at most, per process.")
    max_batch_seconds: int = Field(
        default=48, ge=1, le=36000, description="Seconds of audio in a batch, at most, per process."
    )
    weight_decay: Annotated[DecimalString, between("0", "1")] = Field(default="0.01", description="AdamW weight decay.")
    warmup_ratio: Annotated[DecimalString, between("0", "1")] = Field(
        default="0.1", description="Share of all steps in which the learning rate rises from 0."
    )
    max_grad_norm: Annotated[DecimalString, between("0", "1000")] = Field(
        default="1.0", description="Gradients are clipped to this norm; 0 turns clipping off."
    )
    precision: Precision = Field(default=Precision.AUTO, description="Auto, Bf16 or Fp32.")
    seed: int = Field(default=7, ge=0, le=2147483647, description="Seed of everything that is drawn.")


class EarlyStopping(ContractModel):
    """Ends the run when validation WER has not improved for some epochs; the best checkpoint is kept."""

    patience: int = Field(default=3, ge=1, le=100, description="Epochs without improvement before the run ends.")
    min_delta: Annotated[DecimalString, between("0", "1")] = Field(
        default="0.001", description="Smallest fall of WER that counts as improvement, as a fraction."
    )


class Replay(ContractModel):
    """Utterances of an old domain that are trained on beside the new ones, so that it is not forgotten."""

    ratio: Annotated[DecimalString, between("0.01", "0.9")] = Field(
        default="0.25", description="Share of each epoch's audio that is drawn from the old Dataset's train split."
    )


class Ewc(ContractModel):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): holds on to what the old domain depends on."""

    strength: Annotated[DecimalString, between("0.001", "1000000")] = Field(
        alias="lambda",
        description=(
            "Weight of the penalty on changed weights. What is penalised is relative to the weights themselves, so "
            "that one value suits models of any size."
        ),
    )
    samples: int = Field(
        default=200,
        ge=1,
        le=10000,
        description="Utterances of the old Dataset's train split from which it is estimated what it depends on.",
    )


class Checkpointing(ContractModel):
    """When the state of a run is saved, so that a lost pod costs little."""

    every_steps: int = Field(default=500, ge=1, le=1000000, description="Optimiser steps between checkpoints.")
    keep: int = Field(default=2, ge=1, le=20, description="Newest checkpoints that are kept.")


class DeepSpeed(ContractModel):
    """DeepSpeed's part of a run."""

    zero_stage: int = Field(
        default=0, ge=0, le=2, description="ZeRO stage: 0 none, 1 optimiser state, 2 gradients too."
    )


class Distributed(ContractModel):
    """Processes that train together."""

    processes_per_node: int = Field(default=1, ge=1, le=16, description="Training processes in the pod, one per GPU.")
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed, description="DeepSpeed's settings.")
