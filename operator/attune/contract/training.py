"""Parameters of a training run: part of the FineTune API and of the Job alike."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from attune.contract.base import ContractModel, DecimalString, ScientificString, between


class Method(StrEnum):
    """How the base model's weights are adapted.

    Lora trains low-rank adapters beside frozen weights, QLora the same beside weights that are rounded to 4 bits, and
    Full every weight.
    """

    LORA = "Lora"
    QLORA = "QLora"
    FULL = "Full"


class LoraVariant(StrEnum):
    """How an adapter's update enters the weights.

    Standard scales it by alpha / rank, RsLora by alpha / sqrt(rank) (arXiv 2312.03732), so that a higher rank learns as
    fast as a low one. Dora scales as Standard, and trains the length of each weight vector apart from its direction
    (arXiv 2402.09353).
    """

    STANDARD = "Standard"
    RSLORA = "RsLora"
    DORA = "Dora"


class Precision(StrEnum):
    """Arithmetic of the forward and backward pass. Auto is bf16 where the device computes in it, else fp32."""

    AUTO = "Auto"
    BF16 = "Bf16"
    FP16 = "Fp16"
    FP32 = "Fp32"


class Padding(StrEnum):
    """How audio is padded before the encoder, in training and in serving alike.

    Window pads every clip to the model's full window (30 s for Whisper), which is what a pretrained Whisper expects.
    Buckets slices the encoder to the next length bucket: several times faster, and only right for a model that was
    tuned that way.
    """

    WINDOW = "Window"
    BUCKETS = "Buckets"


LayerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", min_length=1, max_length=63)]


class Lora(ContractModel):
    """Low-rank adapters on the attention and feed-forward projections of encoder and decoder."""

    rank: int = Field(default=16, ge=1, le=256, description="Rank of the update matrices.")
    alpha: int = Field(default=32, ge=1, le=1024, description="Scale: the update is multiplied by alpha / rank.")
    dropout: Annotated[DecimalString, between("0", "0.9")] = Field(
        default="0", description="Dropout on the adapter's input, 0 to 0.9."
    )
    variant: LoraVariant | None = Field(
        default=None,
        description=(
            "Standard (where absent); RsLora, which scales by alpha / sqrt(rank) and suits ranks above 32; or Dora, "
            "which also trains the length of each weight vector, and takes longer."
        ),
    )
    target_modules: Annotated[list[LayerName], Field(min_length=1, max_length=16)] | None = Field(
        default=None,
        description=(
            "Names of the layers that get adapters, in every block; all linear layers where absent. Of a Whisper: "
            "q_proj, k_proj, v_proj, out_proj, fc1, fc2."
        ),
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )


class Hyperparameters(ContractModel):
    """What an optimiser run is made of. Defaults suit LoRA on a Whisper with minutes to hours of audio."""

    learning_rate: Annotated[ScientificString, between("1e-9", "1")] = Field(
        default="1e-3", description="Peak learning rate of AdamW. The default suits adapters; Full wants about 1e-5."
    )
    epochs: int = Field(default=3, ge=1, le=1000, description="Passes over the training split.")
    batch_size: int = Field(default=16, ge=1, le=1024, description="Utterances in a batch, at most, per process.")
    max_batch_seconds: int = Field(
        default=48, ge=1, le=36000, description="Seconds of audio in a batch, at most, per process."
    )
    gradient_accumulation: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Batches per process whose gradients are averaged before each optimiser step; 1 where absent.",
    )
    weight_decay: Annotated[DecimalString, between("0", "1")] = Field(default="0.01", description="AdamW weight decay.")
    warmup_ratio: Annotated[DecimalString, between("0", "1")] = Field(
        default="0.1", description="Share of all steps in which the learning rate rises from 0."
    )
    max_grad_norm: Annotated[DecimalString, between("0", "1000")] = Field(
        default="1.0", description="Gradients are clipped to this norm; 0 turns clipping off."
    )
    precision: Precision = Field(default=Precision.AUTO, description="Auto, Bf16, Fp16 or Fp32.")
    seed: int = Field(default=7, ge=0, le=2147483647, description="Seed of everything that is drawn.")


class EarlyStopping(ContractModel):
    """Ends the run when validation WER has not improved for some epochs; the best checkpoint is kept."""

    patience: int = Field(default=3, ge=1, le=100, description="Epochs without improvement before the run ends.")
    min_delta: Annotated[DecimalString, between("0", "1")] = Field(
        default="0.001", description="Smallest fall of WER that counts as improvement, as a fraction."
    )


class Checkpointing(ContractModel):
    """When the state of a run is saved, so that a lost pod costs little."""

    every_steps: int = Field(default=500, ge=1, le=1000000, description="Optimiser steps between checkpoints.")
    keep: int = Field(default=2, ge=1, le=20, description="Newest checkpoints that are kept.")


class DeepSpeed(ContractModel):
    """DeepSpeed's part of a run."""

    zero_stage: int = Field(
        default=0,
        ge=0,
        le=3,
        description="What processes share out: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too.",
    )


class Distributed(ContractModel):
    """Processes that train together."""

    processes_per_node: int = Field(default=1, ge=1, le=16, description="Training processes in the pod, one per GPU.")
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed, description="DeepSpeed's settings.")
