"""Dataset: where the audio is, what is done to it, and what came out."""

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from attune.api.meta import (
    NAME_IS_A_LABEL,
    PRIORITY_NEEDS_A_QUEUE,
    PodResources,
    QueueableSpec,
    Resource,
    SecretRef,
    SpecModel,
    Status,
    StatusModel,
    cel,
)
from attune.contract.base import DecimalString, DnsLabel, S3Uri, Uri, between
from attune.contract.job import ChannelUse, PrepareRecipe, SourceFormat, SplitBy, WordsFormat

_DEFAULTS = PrepareRecipe.model_fields
_SHORTEST, _LONGEST = (float(_DEFAULTS[name].default) for name in ("min_seconds", "max_seconds"))


class S3Source(SpecModel):
    """A prefix in an S3 bucket."""

    uri: Uri = Field(
        description="s3://bucket/prefix; audio paths are relative to it.",
        json_schema_extra=cel(("self.startsWith('s3://')", "must start with s3://")),
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with endpoint, region, accessKey and secretKey, when the namespace's store does not serve.",
    )


class VolumeSource(SpecModel):
    """A folder on a PersistentVolumeClaim, which is mounted read-only."""

    claim_name: DnsLabel = Field(description="Name of the PersistentVolumeClaim, in the same namespace.")
    path: Annotated[str, Field(max_length=512, pattern=r"^([A-Za-z0-9_][A-Za-z0-9._@=+-]*(/|$))*$")] = Field(
        default="", description="Folder on the volume; all of it where absent. User 65532 must be able to read it."
    )


class Source(SpecModel):
    """Audio with transcripts."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "(self.format == 'Manifest') == has(self.manifest)",
                "manifest must be given with format Manifest, and only then",
            ),
            (
                "has(self.s3) != has(self.persistentVolumeClaim)",
                "exactly one of s3 and persistentVolumeClaim must be given",
            ),
            (
                "!(self.format == 'WebVtt' && has(self.channels) && self.channels == 'PerSpeaker')",
                "channels PerSpeaker needs a format that names channels: Manifest, Directory with .json, Kaldi or Stm",
            ),
        )
    )

    s3: S3Source | None = Field(default=None, description="Where the files are: below a prefix of a bucket.")
    persistent_volume_claim: VolumeSource | None = Field(
        default=None, description="Where the files are: on a volume of this namespace."
    )
    format: SourceFormat = Field(
        description=(
            "Manifest: a JSONL file lists audio and text, and may give speaker, group, start and end in seconds, "
            "channel (from 0) and labels. Directory: each audio file has a .txt beside it, or a .json with the fields "
            "of a manifest's line, or a list of such objects. Kaldi: wav.scp, text, utt2spk, and segments, "
            "reco2file_and_channel. Stm: .stm files beside their recordings. WebVtt: each recording has a .vtt or .srt "
            "beside it."
        )
    )
    manifest: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^/].*$")] | None = Field(
        default=None, description="Path of the JSONL file, relative to the source's folder."
    )
    tar_shards: bool = Field(
        default=False,
        description=(
            "Whether .tar, .tar.gz and .tgz files are read as folders: a.wav of shards/1.tar is shards/1.tar/a.wav."
        ),
    )
    channels: ChannelUse = Field(
        default=ChannelUse.MIX,
        description=(
            "Mix: a recording's channels are averaged. PerSpeaker: each utterance is taken from the channel that its "
            "transcript names, as calls with a channel for each party are."
        ),
    )


def _belongs(step: str, *names: str) -> tuple[str, str]:
    """Writes the rule that fields are given with one step only."""
    absent = " && ".join(f"!has(self.{name})" for name in names)
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"self.step == '{step}' || ({absent})", f"{listed} belong{'s' if len(names) == 1 else ''} to step {step}"


class ContradictionSpec(SpecModel):
    """A recogniser that transcripts are compared with."""

    model_uri: Uri = Field(description="Files of the model: s3://bucket/prefix or hf://organisation/name.")
    max_word_error_rate: Annotated[DecimalString, between("0.1", "10")] = Field(
        default="0.9",
        description=(
            "Utterances of which the model hears more of the words otherwise, as a fraction of the transcript's words, "
            "are left out. Too low a value leaves out what the model has yet to learn."
        ),
    )


class PipelineStep(SpecModel):
    """A step of preparation. Fields belong to the step that `step` names."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            _belongs("Normalize", "sampleRate"),
            _belongs("Normalize", "loudnessLufs", "keepSilenceSeconds"),
            _belongs("Filter", "minSeconds", "maxSeconds"),
            _belongs("Filter", "minCharactersPerSecond", "maxCharactersPerSecond"),
            _belongs("Filter", "maxClippedShare", "minLevelDb", "minSnrDb"),
            _belongs("Filter", "matchLanguage", "maxSameText", "similarAudio", "contradiction"),
            (
                (
                    f"(has(self.minSeconds) ? double(self.minSeconds) : {_SHORTEST})"
                    f" < (has(self.maxSeconds) ? double(self.maxSeconds) : {_LONGEST})"
                ),
                f"minSeconds ({_SHORTEST:g} where absent) must be less than maxSeconds ({_LONGEST:g} where absent)",
            ),
            (
                (
                    "!has(self.minCharactersPerSecond) || !has(self.maxCharactersPerSecond)"
                    " || double(self.minCharactersPerSecond) < double(self.maxCharactersPerSecond)"
                ),
                "minCharactersPerSecond must be less than maxCharactersPerSecond",
            ),
        )
    )

    step: Literal["Normalize", "Filter"] = Field(
        description=(
            "Normalize: decode, mix to mono, resample, and where asked for cut silence off and set the loudness. "
            "Filter: leave out what is not as it should be."
        )
    )
    sample_rate: Literal[16000] | None = Field(default=None, description="Normalize: sample rate in Hz.")
    loudness_lufs: Annotated[DecimalString, between("-50", "-10")] | None = Field(
        default=None,
        description=(
            "Normalize: integrated loudness (ITU-R BS.1770) that each utterance is brought to, in LUFS; -23 is usual. "
            "Less where its peaks would exceed -1 dB of full scale. Absent leaves levels as they are."
        ),
    )
    keep_silence_seconds: Annotated[DecimalString, between("0", "5")] | None = Field(
        default=None,
        description=(
            "Normalize: silence before and after the speech, as a voice activity detector finds it, is cut down to "
            "this many seconds. Absent cuts nothing."
        ),
    )
    min_seconds: Annotated[DecimalString, between("0", "30")] | None = Field(
        default=None,
        description=f"Filter: shortest utterance that is kept, in seconds; {_SHORTEST:g} where absent.",
    )
    max_seconds: Annotated[DecimalString, between("0", "30")] | None = Field(
        default=None,
        description=f"Filter: longest utterance that is kept, in seconds; {_LONGEST:g} where absent.",
    )
    min_characters_per_second: Annotated[DecimalString, between("0", "100")] | None = Field(
        default=None,
        description="Filter: slowest speech that is kept, in letters and digits a second.",
    )
    max_characters_per_second: Annotated[DecimalString, between("1", "100")] | None = Field(
        default=None,
        description=(
            "Filter: fastest speech that is kept, in letters and digits a second; English above 30 is a transcript of "
            "other audio."
        ),
    )
    max_clipped_share: Annotated[DecimalString, between("0", "1")] | None = Field(
        default=None,
        description="Filter: share of samples that may be cut off at full scale (three or more alike, or beyond it).",
    )
    min_level_db: Annotated[DecimalString, between("-90", "0")] | None = Field(
        default=None,
        description="Filter: lowest level (RMS) that is kept, of the recording as it came, in dB of full scale.",
    )
    min_snr_db: Annotated[DecimalString, between("-10", "60")] | None = Field(
        default=None,
        description=(
            "Filter: lowest signal-to-noise ratio that is kept, in dB; estimated from the levels of an utterance's "
            "loudest and quietest tenths of 20 ms frames."
        ),
    )
    match_language: bool | None = Field(
        default=None,
        description=(
            "Filter: whether transcripts that are surely in another language than spec.language are left out; those of "
            "fewer than 20 letters are never judged."
        ),
    )
    max_same_text: Annotated[int, Field(ge=1, le=1000000)] | None = Field(
        default=None, description="Filter: how many utterances of the same words are kept."
    )
    similar_audio: bool | None = Field(
        default=None,
        description=(
            "Filter: whether copies of a recording, with the same words, are left out that differ only by codec or "
            "level; those of the same samples always are."
        ),
    )
    contradiction: ContradictionSpec | None = Field(
        default=None, description="Filter: transcripts are compared with what a recogniser hears."
    )


class KnownWordsSpec(SpecModel):
    """Words that are known beforehand."""

    uri: S3Uri = Field(description="An object in the namespace's store, UTF-8: s3://bucket/words.txt.")
    format: WordsFormat = Field(
        description=(
            "Lexicon: a word a line, and what follows it is passed over. Text: running text, such as what a base model "
            "was trained on."
        )
    )


class SplitsSpec(SpecModel):
    """How utterances are divided. No speaker (or group) and no repeated sentence is in two splits."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "double(self.validation) + double(self.holdout) < 1.0",
                "validation and holdout must leave a share to train on: together less than 1",
            )
        )
    )

    by: SplitBy = Field(default=SplitBy.SPEAKER, description="The label that never crosses: Speaker or Group.")
    validation: Annotated[DecimalString, between("0.01", "0.5")] = Field(
        default="0.1",
        description="Share of utterances for validation.",
    )
    holdout: Annotated[DecimalString, between("0.01", "0.5")] = Field(
        default="0.1",
        description="Share of utterances kept for evaluation.",
    )
    seed: int = Field(default=7, ge=0, le=2147483647, description="Seed of the division.")


class DatasetSpec(QueueableSpec):
    """What is wanted: where the audio is, and how it is prepared and split."""

    sources: Annotated[list[Source], Field(min_length=1, max_length=16)] = Field(description="Where the audio is.")
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Z]{2})?$", max_length=6)] = Field(
        description="Language of the transcripts: en, de, pt-BR."
    )
    pipeline: Annotated[list[PipelineStep], Field(max_length=8)] = Field(
        default=[PipelineStep(step="Normalize", sample_rate=16000)],
        description="Steps of preparation, in order; each at most once.",
        json_schema_extra=cel(
            ("self.all(a, self.exists_one(b, b.step == a.step))", "each step may be given once"),
        ),
    )
    splits: SplitsSpec = Field(default_factory=SplitsSpec, description="How utterances are divided.")
    slices: Annotated[
        list[Annotated[str, Field(pattern=r"^[a-z][A-Za-z0-9_]*$", max_length=63)]],
        Field(max_length=8),
    ] = Field(
        default=[],
        description=(
            "Labels of the utterances that figures are told apart by, such as accent or channel: fields of a line of a "
            "manifest, or utt2NAME and spk2NAME of a Kaldi directory."
        ),
        json_schema_extra=cel(
            (
                "!self.exists(a, a in ['audio', 'text', 'speaker', 'group', 'start', 'end'])",
                "audio, text, speaker, group, start and end are no labels",
            ),
            ("self.all(a, self.exists_one(b, b == a))", "each label may be given once"),
        ),
    )
    known_words: KnownWordsSpec | None = Field(
        default=None,
        description="What out-of-vocabulary words are counted against; where absent, the train split's words.",
    )
    max_rejected_share: Annotated[DecimalString, between("0", "1")] = Field(
        default="0.05",
        description="Share of bad manifest lines or files above which the Dataset fails.",
    )
    resources: PodResources | None = Field(default=None, description="Resources of the preparation's pod.")
    suspend: bool = Field(default=False, description="Stops the work until it is false again.")


class StatisticsStatus(StatusModel):
    """Size over all splits."""

    hours: DecimalString = Field(description="Hours of audio.")
    utterances: int = Field(ge=0, description="Utterances.")
    speakers: int = Field(ge=0, description="Different speakers.")
    words: int = Field(ge=0, description="Words of the transcripts.")
    vocabulary: int = Field(ge=0, description="Different words.")
    oov_rate: DecimalString = Field(
        description="Share of holdout words that are not known: in spec.knownWords, else in the train split."
    )


class SplitStatus(StatusModel):
    """Size of one split."""

    utterances: int = Field(ge=0, description="Utterances.")
    hours: DecimalString = Field(description="Hours of audio.")
    speakers: int = Field(ge=0, description="Different speakers.")
    words: int = Field(ge=0, description="Words of the transcripts.")
    vocabulary: int | None = Field(default=None, ge=0, description="Different words.")
    oov_rate: DecimalString | None = Field(
        default=None, description="Share of its words that are not known; absent of the split that tells what is known."
    )


class SliceStatus(StatusModel):
    """A label that figures are told apart by; the report has those of each value."""

    name: str = Field(max_length=63, description="The label.")
    values: int = Field(ge=0, description="Different values.")
    unlabelled: int = Field(ge=0, description="Utterances without one.")


class SplitsStatus(StatusModel):
    """Size of each split."""

    train: SplitStatus = Field(description="What models are trained on.")
    validation: SplitStatus = Field(description="What training is watched with.")
    holdout: SplitStatus = Field(description="What models are judged on.")


class RejectionStatus(StatusModel):
    """Utterances that were left out for one reason."""

    reason: str = Field(max_length=63, description="CamelCase reason.")
    count: int = Field(ge=0, description="How many.")
    examples: list[Annotated[str, Field(max_length=128)]] = Field(
        default=[], max_length=3, description="The first places: manifest line or file."
    )


class QualityStatus(StatusModel):
    """What was left out."""

    rejected: int = Field(ge=0, description="Utterances left out.")
    rejections: list[RejectionStatus] = Field(default=[], max_length=16, description="By reason.")
    warnings: list[Annotated[str, Field(max_length=256)]] = Field(
        default=[], max_length=8, description="What is worth a look, though nothing is left out for it."
    )


class DatasetStatus(Status):
    """What came out: revision, sizes, what was left out, and how the work stands."""

    revision: str | None = Field(default=None, max_length=71, description="Digest of the content-addressed manifest.")
    uri: str | None = Field(default=None, max_length=1024, description="Folder of this revision in the store.")
    stats: StatisticsStatus | None = Field(default=None, description="Size over all splits.")
    splits: SplitsStatus | None = Field(default=None, description="Size of each split.")
    slices: Annotated[list[SliceStatus], Field(max_length=8)] = Field(
        default=[], description="The labels of spec.slices."
    )
    quality: QualityStatus | None = Field(default=None, description="What was left out and why.")
    report: str | None = Field(
        default=None,
        max_length=1024,
        description="Address of the report: figures by split and slice, and what was left out.",
    )
    job_name: str | None = Field(default=None, max_length=63, description="The preparation's Job.")


class Dataset(Resource):
    """Audio with transcripts, prepared for training and evaluation: normalised, filtered, split, counted."""

    KIND: ClassVar[str] = "Dataset"
    PLURAL: ClassVar[str] = "datasets"
    SHORT_NAME: ClassVar[str] = "ads"
    TERMINAL_CONDITION: ClassVar[str] = "Ready"
    COLUMNS: ClassVar[tuple[tuple[str, str, str, int], ...]] = (
        ("Phase", "string", ".status.phase", 0),
        ("Hours", "string", ".status.stats.hours", 0),
        ("Utterances", "integer", ".status.stats.utterances", 0),
        ("Holdout", "integer", ".status.splits.holdout.utterances", 0),
        ("Rejected", "integer", ".status.quality.rejected", 0),
        ("Reason", "string", ".status.conditions[?(@.type=='Ready')].reason", 0),
        ("Revision", "string", ".status.revision", 1),
        ("Age", "date", ".metadata.creationTimestamp", 0),
    )
    RULES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("size(self.metadata.name) <= 52", "the name must have at most 52 characters"),
        NAME_IS_A_LABEL,
        PRIORITY_NEEDS_A_QUEUE,
    )

    spec: DatasetSpec
    status: DatasetStatus = DatasetStatus()
