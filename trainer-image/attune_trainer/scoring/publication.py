"""Everything that an evaluation counted, for other programs: results.json, and a Parquet table of the utterances."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from attune.contract.job import EvaluateRecipe

from attune_trainer.data.dataset import Utterance
from attune_trainer.scoring.bootstrap import REPLICATIONS, BootstrapInterval
from attune_trainer.scoring.errors import histogram
from attune_trainer.scoring.figures import Judged
from attune_trainer.scoring.hearing import Heard
from attune_trainer.scoring.normaliser import NORMALISER
from attune_trainer.scoring.slices import Gap, SliceFigures
from attune_trainer.scoring.verdict import Judgement, Question


def build_results(
    recipe: EvaluateRecipe,
    utterances: Sequence[Utterance],
    judgement: Judgement,
    question: Question,
    heard: Mapping[str, Heard],
) -> dict[str, Any]:
    """Gives everything that was counted, with intervals and what they are shares of; no transcript.

    Args:
        recipe: what was asked.
        utterances: of the split.
        judgement: what came out.
        question: what it was judged by.
        heard: by candidate.
    """
    return {
        "version": 2,
        "dataset": recipe.dataset.model_dump(by_alias=True),
        "split": recipe.split.value,
        "baseline": recipe.baseline,
        "normaliser": NORMALISER,
        "confidence": recipe.confidence,
        "confidenceOfChanges": judgement.joint,
        "replications": REPLICATIONS,
        "seed": recipe.seed,
        "gates": [gate.model_dump(by_alias=True, exclude_none=True, mode="json") for gate in recipe.gates],
        "verdict": {
            "decision": judgement.decision.value,
            "reason": judgement.reason,
            "wouldChange": judgement.would_change,
            "winner": judgement.winner,
        },
        "failed": [{"candidate": one.name, "reason": one.reason, "message": one.message} for one in question.failed],
        "intervalsOverUtterances": judgement.over_utterances,
        "utterances": [one.id for one in utterances],
        "candidates": [_candidate(one, heard[one.name]) for one in judgement.leaderboard],
    }


def _candidate(one: Judged, heard: Heard) -> dict[str, Any]:
    measured = one.measured
    return {
        "candidate": one.name,
        "rank": one.rank,
        "modelDigest": measured.model_digest,
        "padding": None if measured.padding is None else measured.padding.value,
        "figures": {metric.value: _span(figure) for metric, figure in one.figures.items()},
        "changeFromBaseline": _span(one.change),
        "matchedPairs": (
            None
            if one.matched is None
            else {
                "segments": one.matched.segments,
                "meanDifference": one.matched.mean,
                # JSON knows no infinity; it stands for a difference that is the same in every segment.
                "z": one.matched.z if abs(one.matched.z) < float("inf") else None,
                "pValue": one.matched.p_value,
            }
        ),
        "detectableChange": one.detectable,
        "slices": [_slice(figures) for figures in one.slices],
        "gaps": [_gap(gap) for gap in one.gaps],
        "gates": [
            {"kept": outcome.is_kept, "broken": list(outcome.broken), "inDoubt": list(outcome.in_doubt)}
            for outcome in one.gates
        ],
        "workSeconds": measured.work_seconds,
        "audioSeconds": measured.audio_seconds,
        "utterancesByErrors": histogram(measured.words),
        "confusions": list(heard.confusion_counts),
        # Of each utterance: hits, substitutions, deletions, insertions.
        "counts": [list(utterance.row) for utterance in measured.words],
    }


def _slice(figures: SliceFigures) -> dict[str, Any]:
    return {
        "label": figures.slice.label,
        "value": figures.slice.value,
        "utterances": len(figures.slice.places),
        "words": figures.slice.words,
        "tooSmall": figures.slice.is_too_small,
        "wer": _span(figures.wer),
        "changeFromBaseline": _span(figures.change),
        "pValue": figures.p_value,
        "pValueCorrected": figures.p_adjusted,
    }


def _gap(gap: Gap) -> dict[str, Any]:
    return {
        "label": gap.label,
        "best": gap.best.slice.value,
        "worst": gap.worst.slice.value,
        "difference": _span(gap.difference),
        "values": gap.values,
        "tooSmall": gap.too_small,
    }


def _span(interval: BootstrapInterval | None) -> dict[str, float | int] | None:
    if interval is None:
        return None
    return {
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "blocks": interval.blocks,
        "n": interval.n,
    }


def build_table(
    utterances: Sequence[Utterance], judgement: Judgement, question: Question, noise: Sequence[float]
) -> bytes:
    """Gives a Parquet file with one row for each candidate and utterance, best candidate first; no transcript.

    Args:
        utterances: of the split.
        judgement: what came out.
        question: what it was judged by; its blocks and entities are columns.
        noise: estimated signal-to-noise ratio of each utterance in dB.
    """
    labels = list(dict.fromkeys(one.label for one in question.slices))
    values = {label: [""] * len(utterances) for label in labels}
    for one in question.slices:
        for place in one.places:
            values[one.label][place] = one.value
    count = len(judgement.leaderboard)
    rows = [row for judged in judgement.leaderboard for row in judged.measured.words]
    characters = [row for judged in judgement.leaderboard for row in judged.measured.characters]
    columns: dict[str, Any] = {
        "candidate": [judged.name for judged in judgement.leaderboard for _ in utterances],
        "utterance": [one.id for one in utterances] * count,
        "block": list(question.blocks) * count,
        "seconds": pa.array([one.seconds for one in utterances] * count, pa.float32()),
        "noise_ratio_db": pa.array(list(noise) * count, pa.float32()),
        "words": pa.array([row.words for row in rows], pa.int32()),
        "hits": pa.array([row.hits for row in rows], pa.int32()),
        "substitutions": pa.array([row.substitutions for row in rows], pa.int32()),
        "deletions": pa.array([row.deletions for row in rows], pa.int32()),
        "insertions": pa.array([row.insertions for row in rows], pa.int32()),
        "characters": pa.array([row.words for row in characters], pa.int32()),
        "character_errors": pa.array([row.errors for row in characters], pa.int32()),
        **{f"label_{label}": of_label * count for label, of_label in values.items()},
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()
