"""Parameters of a training run: part of the FineTune API and of the Job alike."""

from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from attune.contract.base import ContractModel, DecimalString, S3Uri, ScientificString, between


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
    tuned that way. Models that are told what is padding hear the same either way, and get buckets.
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
            "Names of the layers that get adapters, in every block; all linear layers where absent, of an audio-LLM "
            "those of the language model. Of a Whisper: q_proj, k_proj, v_proj, out_proj, fc1, fc2."
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
    dropout: Annotated[DecimalString, between("0", "0.9")] | None = Field(
        default=None,
        description=(
            "Dropout of the base network while it trains, 0 to 0.9: of hidden states, attention weights and "
            "feed-forward activations; the base model's own where absent."
        ),
    )


class NoiseKind(StrEnum):
    """Noise that is made, not recorded: of a colour, or other training utterances that speak at once."""

    WHITE = "White"
    PINK = "Pink"
    BROWN = "Brown"
    BABBLE = "Babble"


class CodecKind(StrEnum):
    """A telephone or network codec."""

    GSM = "Gsm"
    MULAW = "Mulaw"
    OPUS = "Opus"


# Of simulated rooms; where absent they are no defaults of the API, because they have no meaning beside a uri.
RT60_MIN_SECONDS: Final = "0.15"
RT60_MAX_SECONDS: Final = "0.6"

_Probability = Annotated[DecimalString, between("0.01", "1")]
_PROBABILITY: Final = "Share of utterances, drawn anew each epoch."


class Speed(ContractModel):
    """Utterances played faster or slower; pitch changes with the tempo."""

    min: Annotated[DecimalString, between("0.5", "2")] = Field(
        default="0.9", description="Slowest: 0.9 makes 10 s into 11.1 s. Never slower than the model's window allows."
    )
    max: Annotated[DecimalString, between("0.5", "2")] = Field(default="1.1", description="Fastest.")
    probability: _Probability = Field(default="1", description=_PROBABILITY)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if Decimal(self.min) > Decimal(self.max):
            raise ValueError("speed.min must be at most speed.max")
        return self


class Noise(ContractModel):
    """Noise mixed into utterances, its level drawn anew each time."""

    snr_db_min: int = Field(default=5, ge=-20, le=60, description="Loudest noise: signal-to-noise ratio in dB.")
    snr_db_max: int = Field(default=25, ge=-20, le=60, description="Softest noise: signal-to-noise ratio in dB.")
    kinds: Annotated[list[NoiseKind], Field(max_length=4)] = Field(
        default=[NoiseKind.WHITE, NoiseKind.PINK, NoiseKind.BROWN],
        description="White, Pink (-3 dB an octave), Brown (-6 dB), Babble (other training utterances at once).",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    uri: S3Uri | None = Field(
        default=None,
        description=(
            "Own recordings of noise, s3://bucket/prefix in the namespace's store: one more kind, or with kinds [] the "
            "only one. Each at most 10 minutes; in all at most 10000 files, 2 GiB and 10 hours."
        ),
    )
    probability: _Probability = Field(default="0.5", description=_PROBABILITY)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.snr_db_min > self.snr_db_max:
            raise ValueError("noise.snrDbMin must be at most noise.snrDbMax")
        if not self.kinds and self.uri is None:
            raise ValueError("noise needs kinds, or a uri with recordings")
        return self


class RoomImpulseResponse(ContractModel):
    """Utterances heard in a room: a simulated one, or one whose impulse response was recorded."""

    rt60_min_seconds: Annotated[DecimalString, between("0.05", "3")] | None = Field(
        default=None,
        description=f"Driest simulated room: seconds in which an echo falls by 60 dB; {RT60_MIN_SECONDS} where absent.",
    )
    rt60_max_seconds: Annotated[DecimalString, between("0.05", "3")] | None = Field(
        default=None, description=f"Most reverberant simulated room; {RT60_MAX_SECONDS} where absent."
    )
    uri: S3Uri | None = Field(
        default=None,
        description=(
            "Own impulse responses instead of simulated rooms, s3://bucket/prefix in the namespace's store. Each at "
            "most 10 s; in all at most 10000 files, 2 GiB and 10 hours."
        ),
    )
    probability: _Probability = Field(default="0.5", description=_PROBABILITY)

    @property
    def rt60_seconds(self) -> tuple[float, float]:
        """The bounds of simulated rooms."""
        return float(self.rt60_min_seconds or RT60_MIN_SECONDS), float(self.rt60_max_seconds or RT60_MAX_SECONDS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.rt60_seconds
        if low > high:
            raise ValueError(
                f"roomImpulseResponse.rt60MinSeconds ({RT60_MIN_SECONDS} where absent) must be at most "
                f"rt60MaxSeconds ({RT60_MAX_SECONDS} where absent)"
            )
        if self.uri is not None and (self.rt60_min_seconds or self.rt60_max_seconds):
            raise ValueError("roomImpulseResponse takes a uri, or bounds of simulated rooms, not both")
        return self


class Codec(ContractModel):
    """Utterances sent through a codec and back."""

    kinds: Annotated[list[CodecKind], Field(min_length=1, max_length=3)] = Field(
        default=[CodecKind.GSM, CodecKind.MULAW, CodecKind.OPUS],
        description="Gsm (06.10 full rate) and Mulaw (G.711), both at 8 kHz; Opus at a rate from 6 to 16 kbit/s.",
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    probability: _Probability = Field(default="0.5", description=_PROBABILITY)


class SpecAugment(ContractModel):
    """Stretches of time and bands of frequency blanked out in the log-mel features (Park et al., arXiv 1904.08779)."""

    time_masks: int = Field(default=2, ge=0, le=16, description="Stretches of time in an utterance.")
    time_mask_seconds: Annotated[DecimalString, between("0.01", "5")] = Field(
        default="0.4", description="Longest stretch."
    )
    time_mask_share: Annotated[DecimalString, between("0.01", "0.9")] = Field(
        default="0.15", description="Longest stretch as a share of the utterance, for short ones."
    )
    frequency_masks: int = Field(default=2, ge=0, le=16, description="Bands of frequency in an utterance.")
    frequency_mask_share: Annotated[DecimalString, between("0.01", "0.9")] = Field(
        default="0.2", description="Widest band as a share of the mel bins."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.time_masks and not self.frequency_masks:
            raise ValueError("specAugment needs timeMasks or frequencyMasks")
        return self


class Augmentation(ContractModel):
    """What is done to training audio, in this order; validation always hears what was recorded. All off by default."""

    speed: Speed | None = Field(default=None, description="Plays utterances faster or slower.")
    room_impulse_response: RoomImpulseResponse | None = Field(default=None, description="Lets them sound in rooms.")
    noise: Noise | None = Field(default=None, description="Mixes noise into them.")
    codec: Codec | None = Field(default=None, description="Sends them through codecs.")
    spec_augment: SpecAugment | None = Field(default=None, description="Blanks out parts of their log-mel features.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if all(effect is None for _, effect in self):
            raise ValueError(
                "augmentation needs at least one of speed, roomImpulseResponse, noise, codec and specAugment"
            )
        return self


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


class Offload(StrEnum):
    """What the host's memory keeps for the GPU. Optimizer: its state, in fp32, and its steps are made there."""

    OPTIMIZER = "Optimizer"


class DeepSpeed(ContractModel):
    """DeepSpeed's part of a run."""

    zero_stage: int = Field(
        default=0,
        ge=0,
        le=3,
        description="What processes share out: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too.",
    )
    offload: Offload | None = Field(
        default=None,
        description=(
            "Optimizer: the host's memory keeps the optimiser's state, and its processor makes the steps, which frees "
            "memory of the GPU and takes longer. Absent: all stays on the device."
        ),
    )


class Distributed(ContractModel):
    """Processes that train together."""

    nodes: int = Field(
        default=1,
        ge=1,
        le=64,
        description=(
            "Pods that train together, each with all of spec.resources. They start, go on and end as one. Without a "
            "queue each takes the first place that it finds, and waits there for the others."
        ),
    )
    processes_per_node: int = Field(default=1, ge=1, le=16, description="Training processes in each pod, one per GPU.")
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed, description="DeepSpeed's settings.")

    @property
    def unsaid(self) -> frozenset[str]:
        """What has no part in a digest: a run in one pod keeps that of a release which knew no other."""
        return frozenset({"nodes"}) if self.nodes == 1 else frozenset()
