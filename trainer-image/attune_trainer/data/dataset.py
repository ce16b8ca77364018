"""A prepared Dataset in the store: its layout, and reading it back.

Below a Dataset's folder:

    <revision digits>/manifest.json                                what was prepared, how much, digests of the splits
    <revision digits>/{train,validation,holdout}.jsonl             one utterance a line
    audio/<first two digits>/<sha256>.flac                         16-bit mono, named by the SHA-256 of its samples

The revision is the SHA-256 of manifest.json, which names the digests of the splits, which name those of the audio: a
revision never changes, and audio that several revisions share is stored once. Samples are digested as little-endian
16-bit integers, so that another FLAC encoder gives the same name.
"""

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from attune.contract.job import DatasetInput, Split, SplitBy
from numpy.typing import NDArray

from attune_trainer.failures import InvalidInput, NotFound
from attune_trainer.store import Store

MANIFEST_FILE = "manifest.json"
SAMPLE_RATE = 16000  # Hz
_THREADS = 8


@dataclass(frozen=True)
class Utterance:
    """A piece of speech and what was said in it.

    Attributes:
        id: 16 hexadecimal digits, the same in every revision that holds this audio with this text.
        text: the transcript as it was given.
        speaker: who speaks.
        group: what it was recorded with (a call, a session); the speaker where nothing else was given.
        seconds: duration.
        audio_key: s3:// address of the FLAC file.
        audio_digest: 64 hexadecimal digits, the SHA-256 of the samples.
        labels: values of the Dataset's slices by name; one that it lacks is not there.
    """

    id: str
    text: str
    speaker: str
    group: str
    seconds: float
    audio_key: str
    audio_digest: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def block(self, by: SplitBy) -> str:
        """Gives the label that never crosses splits, over which utterances are not independent."""
        return self.group if by is SplitBy.GROUP else self.speaker


@dataclass(frozen=True)
class DatasetManifest:
    """What manifest.json says.

    Attributes:
        language: ISO 639 code of the speech.
        by: the label that never crosses splits.
        split_digests: SHA-256 (64 hexadecimal digits) of each split's file.
        content: all of it.
    """

    language: str
    by: SplitBy
    split_digests: dict[Split, str]
    content: dict[str, Any]


def split_file(split: Split) -> str:
    """Names a split's file: train.jsonl, validation.jsonl or holdout.jsonl."""
    return f"{split.value.lower()}.jsonl"


def audio_name(digest: str) -> str:
    """Names an audio file below the Dataset's folder: "ab12..." -> "audio/ab/ab12....flac"."""
    return f"audio/{digest[:2]}/{digest}.flac"


def load_manifest(store: Store, dataset: DatasetInput) -> DatasetManifest:
    """Reads a revision's manifest.

    Raises:
        RecipeFailure: RevisionNotFound, DatasetChanged (it does not have the revision's digest), or the store's.
    """
    raw = _read(store, dataset, MANIFEST_FILE)
    if f"sha256:{hashlib.sha256(raw).hexdigest()}" != dataset.revision:
        raise _changed(dataset, MANIFEST_FILE)
    content = json.loads(raw)
    return DatasetManifest(
        language=content["language"],
        by=SplitBy(content["splitBy"]),
        split_digests={split: content["splits"][split.value.lower()]["digest"] for split in Split},
        content=content,
    )


def load_split(store: Store, dataset: DatasetInput, split: Split) -> list[Utterance]:
    """Reads the utterances of a split, in the order of the file.

    Raises:
        RecipeFailure: RevisionNotFound, DatasetChanged, or the store's.
    """
    manifest = load_manifest(store, dataset)
    raw = _read(store, dataset, split_file(split))
    if hashlib.sha256(raw).hexdigest() != manifest.split_digests[split]:
        raise _changed(dataset, split_file(split))
    folder = dataset.uri.rstrip("/").rpartition("/")[0]
    utterances = []
    for line in raw.decode().split("\n"):
        if line:
            fields = json.loads(line)
            utterances.append(
                Utterance(
                    id=fields["id"],
                    text=fields["text"],
                    speaker=fields["speaker"],
                    group=fields["group"],
                    seconds=float(fields["seconds"]),
                    audio_key=f"{folder}/{audio_name(fields['audio'])}",
                    audio_digest=fields["audio"],
                    labels=fields.get("labels", {}),
                )
            )
    return utterances


def write_utterance_line(utterance: Utterance) -> str:
    """Writes an utterance as its line of a split's file, newline included."""
    fields: dict[str, Any] = {
        "id": utterance.id,
        "text": utterance.text,
        "speaker": utterance.speaker,
        "group": utterance.group,
        "seconds": f"{utterance.seconds:.4f}",
        "audio": utterance.audio_digest,
    }
    if utterance.labels:
        fields["labels"] = dict(utterance.labels)
    return json.dumps(fields, ensure_ascii=False, sort_keys=True) + "\n"


def read_audio(store: Store, utterance: Utterance, cache_directory: Path) -> NDArray[np.float32]:
    """Gives an utterance's samples: mono float32 in [-1, 1) at 16 kHz, shape (samples,).

    The file is downloaded and verified once, and kept in the cache directory.

    Raises:
        RecipeFailure: AudioDamaged, or the store's.
    """
    audio: NDArray[np.float32] = soundfile.read(_fetch(store, utterance, cache_directory), dtype="float32")[0]
    return audio


def fetch_audio(
    store: Store,
    utterances: Sequence[Utterance],
    cache_directory: Path,
    on_fetched: Callable[[int], None] | None = None,
) -> None:
    """Downloads and verifies what the cache directory lacks, several files at a time.

    Args:
        store: where the audio is.
        utterances: whose audio is wanted.
        cache_directory: what read_audio is given as well.
        on_fetched: told how many are there, after each.

    Raises:
        RecipeFailure: AudioDamaged, or the store's.
    """
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="audio") as pool:
        for done, _ in enumerate(pool.map(lambda one: _fetch(store, one, cache_directory), utterances), start=1):
            if on_fetched is not None:
                on_fetched(done)


def encode_audio(samples: NDArray[np.int16]) -> bytes:
    """Writes mono samples at 16 kHz as FLAC."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def digest_samples(samples: NDArray[np.int16]) -> str:
    """Gives the SHA-256 of mono samples as 64 hexadecimal digits."""
    return hashlib.sha256(samples.astype("<i2", copy=False).tobytes()).hexdigest()


def utterance_id(audio_digest: str, text: str) -> str:
    """Names an utterance by what it is: 16 hexadecimal digits over its audio and its text."""
    return hashlib.sha256(f"{audio_digest}\0{text}".encode()).hexdigest()[:16]


def total_seconds(utterances: Iterable[Utterance]) -> float:
    """Adds durations up."""
    return sum(utterance.seconds for utterance in utterances)


def _fetch(store: Store, utterance: Utterance, cache_directory: Path) -> Path:
    path = cache_directory / audio_name(utterance.audio_digest)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{uuid.uuid4().hex}.part")
        content = store.read_bytes(utterance.audio_key)
        _verify(content, utterance)
        partial.write_bytes(content)
        partial.replace(path)
    return path


def _verify(content: bytes, utterance: Utterance) -> None:
    """Compares audio with the digest that it is named by.

    Raises:
        InvalidInput: AudioDamaged.
    """
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="int16")
    except soundfile.LibsndfileError:
        samples, rate = np.empty(0, dtype=np.int16), 0
    if rate != SAMPLE_RATE or samples.ndim != 1 or digest_samples(samples) != utterance.audio_digest:
        raise InvalidInput(
            "AudioDamaged",
            f"{utterance.audio_key} was changed or cut off since it was prepared; remove it and prepare the Dataset "
            "anew",
        )


def _read(store: Store, dataset: DatasetInput, name: str) -> bytes:
    try:
        return store.read_bytes(f"{dataset.uri.rstrip('/')}/{name}")
    except NotFound as error:
        if error.reason != "ObjectNotFound":
            raise
        raise NotFound(
            "RevisionNotFound",
            f"dataset {dataset.name} has no revision at {dataset.uri}; let its Dataset resource prepare it again",
        ) from error


def _changed(dataset: DatasetInput, name: str) -> InvalidInput:
    return InvalidInput(
        "DatasetChanged", f"{name} of dataset {dataset.name} is not what its revision says; prepare the Dataset anew"
    )
