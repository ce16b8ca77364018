"""prepare: sources with audio and transcripts -> utterances in three splits, content-addressed."""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attune.contract.job import PrepareRecipe, Split, SplitBy
from attune.contract.result import PrepareResult, Splits

from attune_trainer.data.audio import FILE_BYTES, Bounds
from attune_trainer.data.conditioning import Conditions
from attune_trainer.data.contradiction import find_contradicted
from attune_trainer.data.dataset import (
    MANIFEST_FILE,
    SAMPLE_RATE,
    Utterance,
    audio_name,
    digest_samples,
    encode_audio,
    split_file,
    utterance_id,
    write_utterance_line,
)
from attune_trainer.data.decoder import Decoders
from attune_trainer.data.files import SourceFile, StoreOrigin
from attune_trainer.data.rejections import (
    CONTRADICTED,
    DUPLICATE,
    REPEATED_ACROSS_SPLITS,
    SOUNDS_THE_SAME,
    TEXT_REPEATED,
    RejectedLine,
    Rejections,
)
from attune_trainer.data.similarity import Fingerprint, Recordings, fingerprint
from attune_trainer.data.sources import ListedUtterance, list_utterances, open_source, read_text
from attune_trainer.data.splitting import SplitItem, count_labels, divide, missing_splits
from attune_trainer.data.statistics import Counted, Statistics, measure, read_known_words
from attune_trainer.failures import InvalidInput, NotFound
from attune_trainer.job import RecipeContext
from attune_trainer.pages import render_page
from attune_trainer.scoring.normaliser import NORMALISER, normalise

_log = logging.getLogger(__name__)

# Recordings in flight: enough to keep the threads busy, few enough to stop soon.
_THREADS = min(16, max(4, 2 * (os.cpu_count() or 1)))
_IN_FLIGHT = 4 * _THREADS
# The operator tells a container's CPU limit by OMP_NUM_THREADS.
_DECODERS = min(8, max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)))
_UTTERANCES = 4_000_000
_REPORTED_PLACES = 20


@dataclass(frozen=True, slots=True)
class _Recording:
    """An audio file and the utterances that are in it."""

    audio: SourceFile
    listed: list[tuple[int, ListedUtterance]]  # with the utterance's place in the order of the sources


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An utterance whose audio is in the store."""

    listed: ListedUtterance
    utterance: Utterance
    sentence: str  # normalised
    fingerprint: Fingerprint | None


def run(recipe: PrepareRecipe, context: RecipeContext) -> PrepareResult:
    """Prepares a Dataset's revision; the same sources and parameters give the same revision.

    A bad line or file is left out, counted, and listed with its place. What is left out on purpose (by the Filter step,
    listed twice, a sentence that belongs to another split) is listed too but does not count towards
    max_rejected_share.

    Raises:
        RecipeFailure: SourceEmpty, ManifestNotFound, TooManyFiles, TooManyUtterances, TooManyRejected, NothingLeft,
            TooSmallToSplit, UnsupportedSampleRate, KnownWordsUnusable, and the store's failures.
    """
    if recipe.sample_rate != SAMPLE_RATE:
        raise InvalidInput("UnsupportedSampleRate", f"sampleRate must be {SAMPLE_RATE}, is {recipe.sample_rate}")
    context.reporter.update(stage="Listing", percent=1)
    known = _read_known_words(recipe, context)
    rejections = Rejections()
    with ExitStack() as clean_up:
        shards = context.directory("shards")
        clean_up.callback(shutil.rmtree, shards, ignore_errors=True)
        listed = _list_all(recipe, context, shards, rejections)
        in_all = len(listed) + rejections.count
        context.raise_if_stopped()

        context.reporter.update(stage="Decoding", percent=5, step=0, total_steps=max(1, len(listed)))
        prepared = _decode_all(recipe, context, listed, rejections)
    prepared = list(_without_copies(recipe, prepared, rejections))
    _check_rejected(recipe, rejections, in_all, len(prepared))
    prepared = _without_contradicted(recipe, context, prepared, rejections)

    context.reporter.update(stage="Splitting", percent=95)
    splits = _split(recipe, prepared, rejections)
    context.raise_if_stopped()

    context.reporter.update(stage="Publishing", percent=97)
    return _publish(recipe, context, splits, known, rejections)


def _read_known_words(recipe: PrepareRecipe, context: RecipeContext) -> set[str] | None:
    words = recipe.known_words
    if words is None:
        return None
    bucket, key = context.store.locate(words.uri)
    folder, _, name = key.rpartition("/")
    origin = StoreOrigin(context.store.for_bucket(bucket), f"{folder}/" if folder else "")
    file = next((one for one in origin.list_files() if one.name == name), None)
    if file is None:
        raise NotFound("KnownWordsNotFound", f"there is no {words.uri}; upload it or correct spec.knownWords.uri")
    return read_known_words(file, words.format, recipe.language)


def _list_all(
    recipe: PrepareRecipe, context: RecipeContext, shards: Path, rejections: Rejections
) -> list[ListedUtterance]:
    listed: list[ListedUtterance] = []
    for index, source in enumerate(recipe.sources):
        opened = open_source(index, source, context.store)
        for one in list_utterances(opened, recipe.splits.by, tuple(recipe.slices), shards, rejections):
            if len(listed) >= _UTTERANCES:
                raise InvalidInput(
                    "TooManyUtterances",
                    f"the sources list more than {_UTTERANCES} utterances; divide them among several Datasets",
                )
            if len(listed) % 1000 == 0:
                context.raise_if_stopped()
            listed.append(one)
    return listed


def _decode_all(
    recipe: PrepareRecipe, context: RecipeContext, listed: Sequence[ListedUtterance], rejections: Rejections
) -> list[_Prepared]:
    """Downloads each recording once, decodes it, and stores its utterances; gives them in the order of the sources."""
    work = _Work(recipe, context, rejections)
    results: dict[int, _Prepared] = {}
    waiting: dict[Future[list[tuple[int, _Prepared]]], int] = {}
    todo = iter(_group(listed))
    done_count = 0
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")
    try:
        while True:
            while len(waiting) < _IN_FLIGHT and (following := next(todo, None)) is not None:
                waiting[pool.submit(work.prepare, following)] = len(following.listed)
            if not waiting:
                break
            done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                done_count += waiting.pop(future)
                results.update(future.result())
            context.raise_if_stopped()
            context.reporter.update(step=done_count, percent=5 + work.share * done_count / len(listed))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        work.close()
    return [one for _, one in sorted(results.items(), key=lambda entry: entry[0])]


def _group(listed: Sequence[ListedUtterance]) -> list[_Recording]:
    """Puts the utterances of a recording together, in the order of their first ones."""
    recordings: dict[tuple[int, str], _Recording] = {}
    for index, one in enumerate(listed):
        found = recordings.setdefault((one.source, one.audio.name), _Recording(one.audio, []))
        found.listed.append((index, one))
    return list(recordings.values())


class _Work:
    """What the threads share that decode recordings."""

    def __init__(self, recipe: PrepareRecipe, context: RecipeContext, rejections: Rejections) -> None:
        self._recipe = recipe
        self._context = context
        self._rejections = rejections
        self._conditions = Conditions.of(recipe)
        self._bounds = Bounds(SAMPLE_RATE, self._conditions.min_seconds, self._conditions.decode_seconds)
        self._folder = recipe.output_prefix.rstrip("/")
        # One listing answers for all utterances of an attempt before this one; a request for each would cost more.
        self._present = {key.removeprefix(f"{self._folder}/") for key in context.store.list(f"{self._folder}/audio/")}
        self._scratch = context.directory("decode")
        self._decoders = Decoders(_DECODERS)
        # A recogniser that hears it all afterwards takes most of the time.
        self.share = 30 if self._conditions.rules.contradiction is not None else 90

    def close(self) -> None:
        """Ends the decoders and frees the disk."""
        self._decoders.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def prepare(self, recording: _Recording) -> list[tuple[int, _Prepared]]:
        """Prepares the utterances of a recording; those that cannot be used are among the rejections."""
        texts = list(self._read_texts(recording))
        if not texts:
            return []
        _, first, _, _ = texts[0]
        path = self._scratch / f"{first.source}-{first.number}{Path(recording.audio.name).suffix}"
        prepared = []
        try:
            self._download(recording.audio, path)
            cuts = self._decoders.cut_spans(path, [one.span for _, one, _, _ in texts], self._bounds)
            with closing(cuts):  # whatever happens here, its decoder goes back
                for cut in cuts:
                    if self._context.stop.is_set():
                        break
                    index, listed, text, sentence = texts[cut.index]
                    try:
                        samples = self._conditions.apply(cut.unwrap(), cut.clipped, sentence)
                        prepared.append((index, self._store(listed, text, sentence, samples)))
                    except RejectedLine as rejected:
                        self._reject(rejected.reason, listed)
        except RejectedLine as rejected:
            for _, listed, _, _ in texts:
                self._reject(rejected.reason, listed)
        finally:
            path.unlink(missing_ok=True)
        return prepared

    def _reject(self, reason: str, listed: ListedUtterance) -> None:
        self._rejections.add(reason, listed.source, listed.number, listed.place)

    def _read_texts(self, recording: _Recording) -> Iterator[tuple[int, ListedUtterance, str, str]]:
        """Yields (order, utterance, text, normalised text) of those that have one."""
        for index, listed in recording.listed:
            try:
                text, sentence = self._read_text(listed)
            except RejectedLine as rejected:
                self._reject(rejected.reason, listed)
            else:
                yield index, listed, text, sentence

    def _read_text(self, listed: ListedUtterance) -> tuple[str, str]:
        text = read_text(listed)
        sentence = normalise(text, self._recipe.language)
        if not sentence:
            raise RejectedLine("LacksText")
        return text, sentence

    @staticmethod
    def _download(audio: SourceFile, path: Path) -> None:
        if audio.size > FILE_BYTES:
            raise RejectedLine("AudioFileTooLarge")
        if audio.size == 0:
            raise RejectedLine("AudioEmpty")
        try:
            audio.download(path)
        except NotFound:  # gone since the listing
            raise RejectedLine("AudioNotFound") from None

    def _store(self, listed: ListedUtterance, text: str, sentence: str, samples: Any) -> _Prepared:
        digest = digest_samples(samples)
        name = audio_name(digest)
        key = f"{self._folder}/{name}"
        if name not in self._present:
            self._context.store.write_bytes(key, encode_audio(samples), content_type="audio/flac")
            self._present.add(name)
        labels = {label: value for label, value in zip(self._recipe.slices, listed.labels, strict=True) if value}
        utterance = Utterance(
            id=utterance_id(digest, text),
            text=text,
            speaker=listed.speaker,
            group=listed.group,
            seconds=len(samples) / SAMPLE_RATE,
            audio_key=self._context.store.uri(key),
            audio_digest=digest,
            labels=labels,
        )
        print_ = fingerprint(samples) if self._conditions.rules.similar_audio else None
        return _Prepared(listed, utterance, sentence, print_)


def _without_copies(
    recipe: PrepareRecipe, prepared: Iterable[_Prepared], rejections: Rejections
) -> Iterator[_Prepared]:
    """Keeps the first of what has the same samples: twice, it would count twice, or be heard in two splits.

    By the recipe's rules likewise of what sounds the same, and so many of what says the same.
    """
    most = recipe.rules.max_same_text if recipe.rules is not None else None
    recordings = Recordings()
    sentences: dict[str, str] = {}
    said: Counter[str] = Counter()
    for one in prepared:
        digest = one.utterance.audio_digest
        reason = None
        if digest in sentences:
            reason = DUPLICATE if sentences[digest] == one.sentence else "TextsDiffer"
        elif one.fingerprint is not None and recordings.add(one.fingerprint, one.sentence):
            reason = SOUNDS_THE_SAME
        elif most is not None and said[one.sentence] >= most:
            reason = TEXT_REPEATED
        if reason is not None:
            rejections.add(reason, one.listed.source, one.listed.number, one.listed.place)
            continue
        sentences[digest] = one.sentence
        said[one.sentence] += 1
        yield one


def _without_contradicted(
    recipe: PrepareRecipe, context: RecipeContext, prepared: list[_Prepared], rejections: Rejections
) -> list[_Prepared]:
    rule = recipe.rules.contradiction if recipe.rules is not None else None
    if rule is None:
        return prepared
    context.reporter.update(stage="Listening", percent=35, step=0, total_steps=len(prepared))

    def report(heard: int) -> None:
        context.reporter.update(step=heard, percent=35 + 60 * heard / len(prepared))

    utterances = [one.utterance for one in prepared]
    out = set(find_contradicted(rule, utterances, recipe.language, context, report))
    for index in out:
        listed = prepared[index].listed
        rejections.add(CONTRADICTED, listed.source, listed.number, listed.place)
    left = [one for index, one in enumerate(prepared) if index not in out]
    if not left:
        raise InvalidInput(
            "NothingLeft",
            f"the model at {rule.model.uri} hears all {len(prepared)} utterances otherwise than their transcripts; "
            "give one that knows the language, or take contradiction out of the Filter step",
            rejections.listed(),
        )
    return left


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
            _describe_nothing(recipe, rejections, in_all),
            rejections.listed(),
        )


def _describe_nothing(recipe: PrepareRecipe, rejections: Rejections, in_all: int) -> str:
    if recipe.rules is None and recipe.normalization is None:
        return (
            f"none of {in_all} utterances is between {recipe.min_seconds} s and {recipe.max_seconds} s long; "
            "widen the Filter step or cut the recordings into utterances"
        )
    reasons = ", ".join(f"{one.count} {one.reason}" for one in rejections.listed())
    return f"the Filter step leaves none of {in_all} utterances ({reasons}); widen it"


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
    recipe: PrepareRecipe,
    context: RecipeContext,
    splits: dict[Split, list[_Prepared]],
    known: set[str] | None,
    rejections: Rejections,
) -> PrepareResult:
    statistics = _measure(recipe, splits, known)
    files = {split: "".join(write_utterance_line(one.utterance) for one in part) for split, part in splits.items()}
    raw = _write_manifest(recipe, statistics, files)
    digits = hashlib.sha256(raw).hexdigest()
    folder = f"{recipe.output_prefix.rstrip('/')}/{digits}"
    for split in Split:
        context.publish(f"{folder}/{split_file(split)}", files[split], "application/x-ndjson")
    places = [json.dumps({"reason": reason, "place": place}) for reason, place in rejections.places()]
    context.publish(f"{folder}/rejected.jsonl", "".join(f"{line}\n" for line in places), "application/x-ndjson")
    context.publish(f"{folder}/statistics.json", _describe(statistics))
    report = _render(recipe, context, statistics, rejections, f"sha256:{digits}")
    report_uri = context.publish(f"{folder}/report.html", report, "text/html; charset=utf-8")
    context.publish(f"{folder}/{MANIFEST_FILE}", raw, "application/json")
    _log.info("revision published", extra={"revision": f"sha256:{digits}", "rejected": rejections.count})
    return PrepareResult(
        revision=f"sha256:{digits}",
        uri=context.store.uri(folder),
        stats=statistics.dataset(),
        splits=Splits(
            train=statistics.split(Split.TRAIN),
            validation=statistics.split(Split.VALIDATION),
            holdout=statistics.split(Split.HOLDOUT),
        ),
        slices=[one.summary() for one in statistics.slices],
        rejected=rejections.count,
        rejections=rejections.listed(),
        warnings=statistics.warnings(),
        report_uri=report_uri,
    )


def _measure(recipe: PrepareRecipe, splits: dict[Split, list[_Prepared]], known: set[str] | None) -> Statistics:
    counted = {
        split: [Counted(one.sentence, one.utterance.speaker, one.utterance.seconds, one.listed.labels) for one in part]
        for split, part in splits.items()
    }
    return measure(counted, recipe.slices, known)


def _write_manifest(recipe: PrepareRecipe, statistics: Statistics, files: dict[Split, str]) -> bytes:
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
        "statistics": statistics.dataset().model_dump(by_alias=True),
        "splits": {
            split.value.lower(): {
                "digest": hashlib.sha256(files[split].encode()).hexdigest(),
                **statistics.split(split).model_dump(by_alias=True, exclude={"vocabulary", "oov_rate"}),
            }
            for split in Split
        },
    }
    # What was not asked for is not named, so that a revision of an earlier release stays the same.
    if recipe.slices:
        manifest["slices"] = recipe.slices
    for name, part in (("normalization", recipe.normalization), ("rules", recipe.rules)):
        if part is not None:
            manifest[name] = part.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return json.dumps(manifest, ensure_ascii=False, sort_keys=True, indent=1).encode()


def _describe(statistics: Statistics) -> dict[str, Any]:
    """Gives statistics.json: figures over all, of each split, and of each value of each slice in it."""
    return {
        "whole": statistics.whole.describe(),
        "splits": {split.value: statistics.splits[split].describe() for split in Split},
        "slices": {
            one.name: {
                value: {
                    split.value: one.tallies[value, split].describe()
                    for split in Split
                    if (value, split) in one.tallies
                }
                for value in one.values()
            }
            for one in statistics.slices
        },
    }


def _render(
    recipe: PrepareRecipe, context: RecipeContext, statistics: Statistics, rejections: Rejections, revision: str
) -> str:
    owner = context.spec.owner
    figures = _describe(statistics)
    places: dict[str, list[str]] = {}
    for reason, place in rejections.places():
        found = places.setdefault(reason, [])
        if len(found) < _REPORTED_PLACES:
            found.append(place)
    slices = [
        {
            "name": one.name,
            "count": one.summary().values,
            "unlabelled": one.summary().unlabelled,
            "rows": [
                {"value": value, "splits": list(by_split.items())}
                for value, by_split in figures["slices"][one.name].items()
            ],
        }
        for one in statistics.slices
    ]
    return render_page(
        "data/report.html.j2",
        title=f"{owner.namespace}/{owner.name}",
        revision=revision,
        language=recipe.language,
        normaliser=NORMALISER,
        own_words=statistics.own_words,
        splits=[*figures["splits"].items(), ("All", figures["whole"])],
        slices=slices,
        rejections=[
            {"reason": one.reason, "count": one.count, "places": places.get(one.reason, [])}
            for one in rejections.listed()
        ],
        warnings=statistics.warnings(),
    )
