"""prepare: sources with audio and transcripts -> utterances in three splits, content-addressed."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attune.contract.job import PrepareRecipe, Split, SplitBy
from attune.contract.result import DatasetStatistics, PrepareResult, Splits, SplitStatistics

from attune_trainer.data.audio import FILE_BYTES, decode_audio
from attune_trainer.data.dataset import (
    MANIFEST_FILE,
    SAMPLE_RATE,
    Utterance,
    audio_name,
    digest_samples,
    encode_audio,
    split_file,
    total_seconds,
    utterance_id,
    write_utterance_line,
)
from attune_trainer.data.rejections import DUPLICATE, REPEATED_ACROSS_SPLITS, RejectedLine, Rejections
from attune_trainer.data.sources import ListedUtterance, OpenSource, list_utterances, open_source, read_text
from attune_trainer.data.splitting import SplitItem, count_labels, divide, missing_splits
from attune_trainer.decimals import decimal_string
from attune_trainer.failures import InvalidInput, NotFound
from attune_trainer.job import RecipeContext
from attune_trainer.scoring.normaliser import NORMALISER, normalise

_log = logging.getLogger(__name__)

# Listed utterances in flight: enough to keep the threads busy, few enough to stop soon.
_THREADS = min(16, max(4, 2 * (os.cpu_count() or 1)))
_IN_FLIGHT = 4 * _THREADS


@dataclass(frozen=True)
class _Prepared:
    """An utterance whose audio is in the store."""

    listed: ListedUtterance
    utterance: Utterance
    sentence: str  # normalised


def run(recipe: PrepareRecipe, context: RecipeContext) -> PrepareResult:
    """Prepares a Dataset's revision; the same sources and parameters give the same revision.

    A bad line or file is left out, counted, and listed with its place. What is left out on purpose (too short, too
    long, listed twice, a sentence that belongs to another split) is listed too but does not count towards
    max_rejected_share.

    Raises:
        RecipeFailure: SourceEmpty, ManifestNotFound, TooManyRejected, NothingLeft, TooSmallToSplit,
            UnsupportedSampleRate, and the store's failures.
    """
    if recipe.sample_rate != SAMPLE_RATE:
        raise InvalidInput("UnsupportedSampleRate", f"sampleRate must be {SAMPLE_RATE}, is {recipe.sample_rate}")
    context.reporter.update(stage="Listing", percent=1)
    rejections = Rejections()
    sources = [open_source(index, source, context.store) for index, source in enumerate(recipe.sources)]
    listed = [one for opened in sources for one in list_utterances(opened, recipe.splits.by, rejections)]
    in_all = len(listed) + rejections.count
    context.raise_if_stopped()

    context.reporter.update(stage="Decoding", percent=5, step=0, total_steps=max(1, len(listed)))
    prepared = _decode_all(recipe, context, sources, listed, rejections)
    prepared = list(_without_duplicates(prepared, rejections))
    _check_rejected(recipe, rejections, in_all, len(prepared))

    context.reporter.update(stage="Splitting", percent=95)
    splits = _split(recipe, prepared, rejections)
    context.raise_if_stopped()

    context.reporter.update(stage="Publishing", percent=97)
    return _publish(recipe, context, splits, rejections)


def _decode_all(
    recipe: PrepareRecipe,
    context: RecipeContext,
    sources: Sequence[OpenSource],
    listed: Sequence[ListedUtterance],
    rejections: Rejections,
) -> list[_Prepared]:
    """Downloads, decodes and stores the audio of all utterances, in the order of the sources."""
    folder = recipe.output_prefix.rstrip("/")
    # One listing answers for all utterances of an attempt before this one; a request for each would cost more.
    present = {key.removeprefix(f"{folder}/") for key in context.store.list(f"{folder}/audio/")}
    scratch = context.directory("decode")

    def prepare(one: ListedUtterance) -> _Prepared | None:
        try:
            return _prepare_one(recipe, context, sources[one.source], one, present, scratch)
        except RejectedLine as rejected:
            rejections.add(rejected.reason, one.source, one.number, one.place)
            return None

    results: dict[int, _Prepared | None] = {}
    waiting: dict[Future[_Prepared | None], int] = {}
    todo = iter(enumerate(listed))
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")
    try:
        while True:
            while len(waiting) < _IN_FLIGHT and (following := next(todo, None)) is not None:
                waiting[pool.submit(prepare, following[1])] = following[0]
            if not waiting:
                break
            done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                results[waiting.pop(future)] = future.result()
            context.raise_if_stopped()
            context.reporter.update(step=len(results), percent=5 + 90 * len(results) / len(listed))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(scratch, ignore_errors=True)
    return [one for _, one in sorted(results.items()) if one is not None]


def _prepare_one(
    recipe: PrepareRecipe,
    context: RecipeContext,
    source: OpenSource,
    listed: ListedUtterance,
    present: set[str],
    scratch: Path,
) -> _Prepared:
    text = read_text(source, listed)
    sentence = normalise(text, recipe.language)
    if not sentence:
        raise RejectedLine("LacksText")
    if listed.audio.size > FILE_BYTES:
        raise RejectedLine("AudioFileTooLarge")
    if listed.audio.size == 0:
        raise RejectedLine("AudioEmpty")
    path = scratch / f"{listed.source}-{listed.number}"
    try:
        source.store.download_file(listed.audio.uri, path)
        samples = decode_audio(path, SAMPLE_RATE, float(recipe.min_seconds), float(recipe.max_seconds))
    except NotFound:  # gone since the listing
        raise RejectedLine("AudioNotFound") from None
    finally:
        path.unlink(missing_ok=True)
    digest = digest_samples(samples)
    name = audio_name(digest)
    key = f"{recipe.output_prefix.rstrip('/')}/{name}"
    if name not in present:
        context.store.write_bytes(key, encode_audio(samples), content_type="audio/flac")
        present.add(name)
    utterance = Utterance(
        id=utterance_id(digest, text),
        text=text,
        speaker=listed.speaker,
        group=listed.group,
        seconds=len(samples) / SAMPLE_RATE,
        audio_key=context.store.uri(key),
        audio_digest=digest,
    )
    return _Prepared(listed, utterance, sentence)


def _without_duplicates(prepared: Iterable[_Prepared], rejections: Rejections) -> Iterator[_Prepared]:
    """Keeps the first of what has the same samples: twice, it would count twice, or be heard in two splits."""
    sentences: dict[str, str] = {}
    for one in prepared:
        digest = one.utterance.audio_digest
        if digest not in sentences:
            sentences[digest] = one.sentence
            yield one
            continue
        reason = DUPLICATE if sentences[digest] == one.sentence else "TextsDiffer"
        rejections.add(reason, one.listed.source, one.listed.number, one.listed.place)


def _check_rejected(recipe: PrepareRecipe, rejections: Rejections, in_all: int, left: int) -> None:
    allowed = float(recipe.max_rejected_share)
    bad = rejections.bad
    if bad > allowed * in_all or (bad and not left):
        raise InvalidInput(
            "TooManyRejected",
            f"{bad} of {in_all} utterances cannot be used, more than spec.maxRejectedShare allows "
            f"({allowed:.4g}): {rejections.describe_bad()}; mend these, or allow more",
            rejections.listed(),
        )
    if not left:
        raise InvalidInput(
            "NothingLeft",
            f"none of {in_all} utterances is between {recipe.min_seconds} s and {recipe.max_seconds} s long; "
            "widen the Filter step or cut the recordings into utterances",
            rejections.listed(),
        )


def _split(
    recipe: PrepareRecipe, prepared: Sequence[_Prepared], rejections: Rejections
) -> dict[Split, list[_Prepared]]:
    shares = {Split.VALIDATION: float(recipe.splits.validation), Split.HOLDOUT: float(recipe.splits.holdout)}
    items = [SplitItem(one.utterance.block(recipe.splits.by), one.sentence) for one in prepared]
    division = divide(items, shares, recipe.splits.seed)
    missing = missing_splits(division, shares)
    if missing:
        raise _too_small(recipe, items, shares, missing)
    splits: dict[Split, list[_Prepared]] = {split: [] for split in Split}
    for one, split in zip(prepared, division.splits, strict=True):
        if split is None:
            rejections.add(REPEATED_ACROSS_SPLITS, one.listed.source, one.listed.number, one.listed.place)
        else:
            splits[split].append(one)
    for part in splits.values():
        part.sort(key=lambda one: one.utterance.id)
    return splits


def _too_small(
    recipe: PrepareRecipe, items: Sequence[SplitItem], shares: dict[Split, float], missing: Sequence[Split]
) -> InvalidInput:
    label = "speaker" if recipe.splits.by is SplitBy.SPEAKER else "group"
    needed = 1 + sum(share > 0 for share in shares.values())
    have = count_labels(items)
    if have < needed:
        other = " or, where one speaker is meant, set spec.splits.by to Group" if label == "speaker" else ""
        return InvalidInput(
            "TooSmallToSplit",
            f"{len(items)} usable utterances of {have} {label}{'s' if have != 1 else ''} cannot be split: "
            f"at least {needed} {label}s are needed, one for each split; add recordings of more {label}s{other}",
        )
    empty = " and ".join(split.value for split in missing)
    return InvalidInput(
        "TooSmallToSplit",
        f"{empty} would be empty: the {have} {label}s say too many of the same sentences "
        f"({len({item.sentence for item in items})} different ones), and no sentence may be in two splits; "
        f"at least {needed} {label}s with sentences of their own are needed",
    )


def _publish(
    recipe: PrepareRecipe, context: RecipeContext, splits: dict[Split, list[_Prepared]], rejections: Rejections
) -> PrepareResult:
    statistics = {split: _measure(part) for split, part in splits.items()}
    whole = _measure_all(splits)
    files = {split: "".join(write_utterance_line(one.utterance) for one in part) for split, part in splits.items()}
    # No address, time or count of rejected lines: the same utterances, divided alike, are the same revision.
    manifest: dict[str, Any] = {
        "version": 1,
        "language": recipe.language,
        "sampleRate": recipe.sample_rate,
        "minSeconds": recipe.min_seconds,
        "maxSeconds": recipe.max_seconds,
        "splitBy": recipe.splits.by.value,
        "splitSeed": recipe.splits.seed,
        "normaliser": NORMALISER,
        "statistics": whole.model_dump(by_alias=True),
        "splits": {
            split.value.lower(): {
                "digest": hashlib.sha256(files[split].encode()).hexdigest(),
                **statistics[split].model_dump(by_alias=True),
            }
            for split in Split
        },
    }
    raw = json.dumps(manifest, ensure_ascii=False, sort_keys=True, indent=1).encode()
    digits = hashlib.sha256(raw).hexdigest()
    folder = f"{recipe.output_prefix.rstrip('/')}/{digits}"
    for split in Split:
        context.publish(f"{folder}/{split_file(split)}", files[split], "application/x-ndjson")
    places = [json.dumps({"reason": reason, "place": place}) for reason, place in rejections.places()]
    context.publish(f"{folder}/rejected.jsonl", "".join(f"{line}\n" for line in places), "application/x-ndjson")
    context.publish(f"{folder}/{MANIFEST_FILE}", raw, "application/json")
    _log.info("revision published", extra={"revision": f"sha256:{digits}", "rejected": rejections.count})
    return PrepareResult(
        revision=f"sha256:{digits}",
        uri=context.store.uri(folder),
        stats=whole,
        splits=Splits(
            train=statistics[Split.TRAIN],
            validation=statistics[Split.VALIDATION],
            holdout=statistics[Split.HOLDOUT],
        ),
        rejected=rejections.count,
        rejections=rejections.listed(),
    )


def _hours(part: Iterable[_Prepared]) -> str:
    return decimal_string(total_seconds(one.utterance for one in part) / 3600, 4)


def _measure(part: Sequence[_Prepared]) -> SplitStatistics:
    return SplitStatistics(
        utterances=len(part),
        hours=_hours(part),
        speakers=len({one.utterance.speaker for one in part}),
        words=sum(len(one.sentence.split()) for one in part),
    )


def _measure_all(splits: dict[Split, list[_Prepared]]) -> DatasetStatistics:
    everything = [one for part in splits.values() for one in part]
    known = {word for one in splits[Split.TRAIN] for word in one.sentence.split()}
    holdout = [word for one in splits[Split.HOLDOUT] for word in one.sentence.split()]
    unknown = sum(word not in known for word in holdout)
    return DatasetStatistics(
        hours=_hours(everything),
        utterances=len(everything),
        speakers=len({one.utterance.speaker for one in everything}),
        words=sum(len(one.sentence.split()) for one in everything),
        vocabulary=len({word for one in everything for word in one.sentence.split()}),
        oov_rate=decimal_string(unknown / len(holdout) if holdout else 0.0, 4),
    )
