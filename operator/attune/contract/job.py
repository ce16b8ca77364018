"""JobSpec: everything that a recipe is told, as one mounted job.json."""

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from attune.contract.base import ContractModel, DecimalString
from attune.contract.costs import Budget, Economics
from attune.contract.measures import Gate, Metric
from attune.contract.training import (
    Augmentation,
    Checkpointing,
    Distributed,
    EarlyStopping,
    Ewc,
    Hyperparameters,
    Lora,
    Method,
    Padding,
    Replay,
)


class SourceFormat(StrEnum):
    """How utterances are listed in a source."""

    MANIFEST = "Manifest"  # a JSONL file: {"audio": "a/1.wav", "text": "...", "speaker": "...", "group": "..."}
    DIRECTORY = "Directory"  # audio files, each with a .txt or .json of the same name beside it
    KALDI = "Kaldi"  # a data directory: wav.scp, text, utt2spk, and segments for long recordings
    STM = "Stm"  # NIST's segment time marks
    WEB_VTT = "WebVtt"  # long recordings, each with a .vtt or .srt beside it


class ChannelUse(StrEnum):
    """What becomes of a recording's channels."""

    MIX = "Mix"  # all are averaged
    PER_SPEAKER = "PerSpeaker"  # each utterance is on the channel that its transcript names


class WordsFormat(StrEnum):
    """How a list of known words is written."""

    LEXICON = "Lexicon"  # a word a line; what follows it (its pronunciation) is passed over
    TEXT = "Text"  # running text


class SplitBy(StrEnum):
    """Which label never crosses from one split to another."""

    SPEAKER = "Speaker"
    GROUP = "Group"


class Split(StrEnum):
    """A part of a Dataset."""

    TRAIN = "Train"
    VALIDATION = "Validation"
    HOLDOUT = "Holdout"


class PrepareVolume(ContractModel):
    """Where a source's volume is mounted, and the folder in it."""

    mount: str
    path: str


class PrepareSource(ContractModel):
    """A place with audio and transcripts: s3://bucket/prefix, or pvc://claim/path, which volume then says more of."""

    uri: str
    format: SourceFormat
    manifest: str | None = None  # relative to uri; Manifest only
    volume: PrepareVolume | None = None
    tar_shards: bool = False  # .tar, .tar.gz and .tgz are folders
    channels: ChannelUse = ChannelUse.MIX
    # Where set, the source's own credentials are in ATTUNE_SOURCE_<index>_*; else the namespace's store's serve.
    credentials_index: int | None = None


class SplitRule(ContractModel):
    """Shares of the splits, as fractions of the utterances; train gets the rest."""

    by: SplitBy
    validation: DecimalString
    holdout: DecimalString
    seed: int


class ModelInput(ContractModel):
    """A model: where its files are, and their digest where it is known (verified after download)."""

    uri: str
    digest: str | None = None
    model_id: str | None = None


class Normalization(ContractModel):
    """What is done to each utterance's audio besides resampling; absent is not done."""

    loudness_lufs: DecimalString | None = None  # BS.1770, mono
    keep_silence_seconds: DecimalString | None = None  # silence beyond this is cut off at both ends


class Contradiction(ContractModel):
    """Leaves out transcripts that a model hears otherwise: at most this word error rate is kept."""

    model: ModelInput
    max_word_error_rate: DecimalString


class FilterRules(ContractModel):
    """What an utterance must be like, besides its duration; absent is not asked for."""

    min_characters_per_second: DecimalString | None = None
    max_characters_per_second: DecimalString | None = None
    max_clipped_share: DecimalString | None = None
    min_level_db: DecimalString | None = None  # of full scale
    min_snr_db: DecimalString | None = None
    match_language: bool = False
    max_same_text: int | None = None
    similar_audio: bool = False  # recordings that sound the same are duplicates
    contradiction: Contradiction | None = None


class KnownWords(ContractModel):
    """What out-of-vocabulary words are counted against, instead of the train split."""

    uri: str
    format: WordsFormat


class PrepareRecipe(ContractModel):
    """Sources -> normalised utterances in three splits, content-addressed."""

    recipe: Literal["prepare"] = "prepare"
    sources: list[PrepareSource]
    language: str
    sample_rate: int = 16000  # Hz
    min_seconds: DecimalString = "0.1"
    max_seconds: DecimalString = "30"
    normalization: Normalization | None = None
    rules: FilterRules | None = None
    slices: list[str] = []
    known_words: KnownWords | None = None
    splits: SplitRule
    max_rejected_share: DecimalString  # of the listed utterances; more fail the Job
    output_prefix: str  # key prefix inside the store's bucket


class DatasetInput(ContractModel):
    """A prepared Dataset at one revision. uri is the revision's folder."""

    name: str
    revision: str
    uri: str


class TrainingInput(DatasetInput):
    """A Dataset to be trained on. weight multiplies what its size, or the temperature, gives it; absent is 1."""

    weight: DecimalString | None = None


class Retention(ContractModel):
    """An old domain that is not to be forgotten, and by which means. At least one of replay and ewc is given."""

    dataset: DatasetInput
    replay: Replay | None = None
    ewc: Ewc | None = None


class FinetuneRecipe(ContractModel):
    """Base model + training splits -> a model, and the adapter that makes it of the base where there is one."""

    recipe: Literal["finetune"] = "finetune"
    base: ModelInput
    datasets: list[TrainingInput]
    dataset_temperature: DecimalString | None = None  # absent is 1: each Dataset by its size
    retention: Retention | None = None
    method: Method = Method.LORA
    lora: Lora = Field(default_factory=Lora)
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    padding: Padding = Padding.BUCKETS
    early_stopping: EarlyStopping | None = None
    augmentation: Augmentation | None = None
    checkpoint: Checkpointing = Field(default_factory=Checkpointing)
    distributed: Distributed = Field(default_factory=Distributed)
    model_id: str  # ft:<base>:<six hexadecimal digits>
    output_prefix: str  # key prefix; the model lands in <prefix>/<attempt uid>/{merged,adapter}
    checkpoint_prefix: str  # key prefix; shared by all attempts of this run
    budget: Budget | None = None
    economics: Economics | None = None  # for the report alone

    def config_digest(self) -> str:
        """Digest of all that is told to decide the model; where files go, checkpoints and prices do not."""
        told = self.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            exclude={"checkpoint", "model_id", "output_prefix", "checkpoint_prefix", "economics", "budget"},
        )
        told["distributed"] = self.distributed.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude=set(self.distributed.unsaid)
        )
        limits = self.budget.limits() if self.budget is not None else {}
        if limits:
            told["budget"] = limits
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


class EndpointInput(ContractModel):
    """A server that speaks OpenAI's transcription API. url ends before /audio/transcriptions."""

    url: str
    model: str = "whisper-1"
    # Where set, the key is in the variable that contract.environment.endpoint_variable names.
    key_index: int | None = None
    requests_per_minute: int | None = None  # absent: as fast as it answers
    timeout_seconds: int = 60  # for one answer
    max_attempts: int = 4  # for one utterance


class EvaluateCandidate(ContractModel):
    """Something named that is to be judged: exactly one of model and endpoint is given."""

    name: str
    model: ModelInput | None = None
    endpoint: EndpointInput | None = None


class Entities(ContractModel):
    """What must be heard word for word: terms, those of a file in the store, and numbers."""

    terms: list[str] = []
    terms_uri: str | None = None  # a text file, one term a line
    numbers: bool = False


class EvaluateRecipe(ContractModel):
    """Candidates x a split -> leaderboard, winner, verdict."""

    recipe: Literal["evaluate"] = "evaluate"
    dataset: DatasetInput
    split: Split = Split.HOLDOUT
    candidates: list[EvaluateCandidate]
    baseline: str
    metrics: list[Metric]
    gates: list[Gate] = []
    slices: list[str] = []  # labels of utterances
    entities: Entities | None = None
    confidence: DecimalString = "0.95"
    seed: int = 7
    output_prefix: str  # key prefix of the report and the full results


class ScoreRecipe(ContractModel):
    """Replays labelled utterances once to both arms and exports the counters that judge a rollout."""

    recipe: Literal["score"] = "score"
    dataset: DatasetInput
    split: Split = Split.HOLDOUT
    stable_url: str  # http://host:port, of the arm's own Service
    canary_url: str
    # Where set, answers that name another model in x-attune-model-id are not counted: pods of an earlier or a later
    # rollout may stand behind an arm's Service for a while.
    stable_model_id: str | None = None
    canary_model_id: str | None = None
    requests_per_minute: int  # utterances a minute; each goes to both arms
    canary: str  # values of the labels in contract.metrics
    namespace: str
    rollout: str
    max_errors_per_utterance: int = 30  # a hallucination loop counts as this many word errors at most
    seed: int = 7  # order of the replay


Recipe = Annotated[
    PrepareRecipe | FinetuneRecipe | EvaluateRecipe | ScoreRecipe,
    Field(discriminator="recipe"),
]


class Owner(ContractModel):
    """The custom resource that a Job works for."""

    kind: str
    namespace: str
    name: str
    uid: str


class JobSpec(ContractModel):
    """What a Job is to do. result_key names the object (in the store's bucket) that holds the full Result."""

    version: Literal["v1"] = "v1"
    owner: Owner
    result_key: str
    recipe: Recipe
