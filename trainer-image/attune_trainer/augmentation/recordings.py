"""Own recordings of noise and rooms: fetched from the store, decoded, and kept on the disk as FLAC."""

import posixpath
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from attune_trainer.data.audio import decode_audio
from attune_trainer.data.dataset import SAMPLE_RATE, digest_samples, encode_audio
from attune_trainer.data.rejections import RejectedLine
from attune_trainer.data.sources import AUDIO_SUFFIXES
from attune_trainer.failures import InvalidInput, NotFound
from attune_trainer.store import Store, StoredObject

MAX_FILES: Final = 10_000
MAX_BYTES: Final = 2 * 1024**3
MAX_SECONDS: Final = 36_000.0
LONGEST_NOISE_SECONDS: Final = 600.0
LONGEST_ROOM_SECONDS: Final = 10.0
_THREADS: Final = 4  # each holds a whole recording as floats


def fetch_recordings(
    store: Store,
    uri: str,
    folder: Path,
    *,
    field: str,
    longest_seconds: float,
    raise_if_stopped: Callable[[], None] = lambda: None,
) -> tuple[Path, ...]:
    """Brings the audio files below an address to the disk, mono at 16 kHz; gives them sorted by what they hold.

    A file's name is the SHA-256 of its samples, so equal folders give equal names wherever they lie. Files that are no
    audio by their name are passed over.

    Args:
        store: serves the address.
        uri: s3://bucket/prefix.
        folder: where the files go.
        field: of the FineTune, for messages.
        longest_seconds: bound of a single recording.
        raise_if_stopped: called before each file.

    Raises:
        RecipeFailure: RecordingsNotFound, TooManyRecordings, RecordingNotUsable, or the store's.
    """
    prefix = f"{uri.rstrip('/')}/"
    listed = [entry for entry in store.list_objects(prefix) if entry.key.lower().endswith(AUDIO_SUFFIXES)]
    if not listed:
        message = f"{field}: there is no audio file below {uri} ({' '.join(AUDIO_SUFFIXES)}); correct the address"
        raise NotFound("RecordingsNotFound", message)
    if len(listed) > MAX_FILES or sum(entry.size for entry in listed) > MAX_BYTES:
        raise _too_many(field, uri)
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(numbered: tuple[int, StoredObject]) -> tuple[Path, float]:
        number, entry = numbered
        raise_if_stopped()
        scratch = folder / f".{number}.part"
        try:
            samples = decode_audio(store.download_file(entry.uri, scratch), SAMPLE_RATE, 0.0, longest_seconds)
        except RejectedLine as rejected:
            message = (
                f"{field}: {posixpath.basename(entry.key)} below {uri} cannot be used ({rejected.reason}; at most "
                f"{longest_seconds:g} s of sound are); mend or remove it"
            )
            raise InvalidInput("RecordingNotUsable", message) from None
        finally:
            scratch.unlink(missing_ok=True)
        file = folder / f"{digest_samples(samples)}.flac"
        file.write_bytes(encode_audio(samples))
        return file, len(samples) / SAMPLE_RATE

    files: set[Path] = set()
    seconds = 0.0
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="recordings")
    try:
        for file, duration in pool.map(fetch, enumerate(listed)):
            files.add(file)
            seconds += duration
            if seconds > MAX_SECONDS:
                raise _too_many(field, uri)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return tuple(sorted(files))


def _too_many(field: str, uri: str) -> InvalidInput:
    return InvalidInput(
        "TooManyRecordings",
        f"{field}: below {uri} there may be at most {MAX_FILES} audio files, {MAX_BYTES // 1024**3} GiB and "
        f"{MAX_SECONDS / 3600:g} hours; give a folder with a part of them",
    )
