"""Specs that people write, and results that recipes leave."""

from typing import Any

from attune.contract.measures import Decision
from attune.contract.result import (
    DatasetStatistics,
    Estimate,
    EvaluateResult,
    FailedCandidate,
    FinetuneResult,
    Hardware,
    LeaderboardRow,
    PrepareResult,
    Rejection,
    SliceGap,
    Splits,
    SplitStatistics,
    Verdict,
)
from attune.contract.training import Padding

DATASET: dict[str, Any] = {
    "sources": [{"s3": {"uri": "s3://internal/calls/"}, "format": "Manifest", "manifest": "transcripts.jsonl"}],
    "language": "en",
}
FINE_TUNE: dict[str, Any] = {"baseModel": {"uri": "s3://models/whisper-tiny.en"}, "datasets": [{"name": "calls"}]}
EVALUATION: dict[str, Any] = {
    "datasetRef": {"name": "calls"},
    "candidates": [
        {"name": "base", "model": {"uri": "s3://models/whisper-tiny.en"}},
        {"name": "tuned", "fineTuneRef": {"name": "lora"}},
    ],
    "baseline": "base",
}


def split(utterances: int) -> SplitStatistics:
    return SplitStatistics(utterances=utterances, hours="0.1", speakers=4, words=utterances * 9)


PREPARED = PrepareResult(
    revision="sha256:" + "a" * 64,
    uri="s3://attune/datasets/team/dataset/calls/1/aaaa",
    stats=DatasetStatistics(hours="0.4", utterances=300, speakers=12, words=2700, vocabulary=410, oov_rate="0.02"),
    splits=Splits(train=split(240), validation=split(30), holdout=split(30)),
    rejected=1,
    rejections=[Rejection(reason="NotJson", count=1, examples=["transcripts.jsonl:7"])],
)
TRAINED = FinetuneResult(
    model_id="ft:whisper-tiny.en:3f9c2a",
    model_uri="s3://attune/models/team/finetune/lora/1/u/merged",
    model_digest="sha256:" + "c" * 64,
    adapter_uri="s3://attune/models/team/finetune/lora/1/u/adapter",
    adapter_digest="sha256:" + "d" * 64,
    base_digest="sha256:" + "e" * 64,
    padding=Padding.BUCKETS,
    baseline_wer="0.196",
    wer="0.113",
    steps=120,
    epochs="3",
    training_seconds=82,
    gpu_seconds=0,
    audio_seconds_per_second="41.5",
)
ESTIMATE = Estimate(seconds=90, gpu_hours="0.2", memory_bytes=3_000_000_000)
# All that a trainer tells, of a run that its budget has ended.
TRAINED_ON_GPUS = TRAINED.model_copy(
    update={
        "weights_digest": "sha256:" + "9" * 64,
        "old_baseline_wer": "0.1",
        "old_wer": "0.11",
        "total_steps": 400,
        "training_seconds": 5400,
        "gpu_seconds": 43200,
        "budget_reached": True,
        "cost": "30",
        "peak_memory_bytes": 2_500_000_000,
        "estimate": ESTIMATE,
        "report_uri": "s3://attune/models/team/finetune/lora/1/u/report.html",
        "curve_uri": "s3://attune/models/team/finetune/lora/1/u/curve.json",
        "code_version": "0.1.0",
        "hardware": Hardware(device="A GPU", precision="bf16", processes=8, threads=4, torch="2.15.0"),
        "irreproducible": "its budget ended it by the clock, and another run may be faster or slower",
    }
)


def row(candidate: str, rank: int, wer: str) -> LeaderboardRow:
    return LeaderboardRow(
        candidate=candidate,
        rank=rank,
        model_digest="sha256:" + "c" * 64,
        padding=Padding.BUCKETS,
        utterances=30,
        words=270,
        hits=240,
        substitutions=20,
        deletions=10,
        insertions=3,
        wer=wer,
        wer_low="0.09",
        wer_high="0.14",
    )


EVALUATED = EvaluateResult(
    leaderboard=[row("tuned", 1, "0.113"), row("base", 2, "0.196")],
    winner="tuned",
    verdict=Verdict(
        decision=Decision.PROMOTE,
        reason="tuned is 42 % better than base. Not judged: vendor.",
        would_change="new holdout audio on which tuned's interval reaches base's errors",
    ),
    report_uri="s3://attune/evaluations/team/evaluation/holdout/1/report.html",
    normaliser="attune-unicode-1",
    gaps=[
        SliceGap(
            label="accent",
            candidate="tuned",
            best="us",
            best_wer="0.08",
            worst="scottish",
            worst_wer="0.19",
            gap="0.11",
            gap_low="0.03",
            gap_high="0.2",
            values=3,
            too_small=1,
        )
    ],
    failed=[
        FailedCandidate(
            candidate="vendor",
            reason="EndpointUnreachable",
            message="the endpoint http://asr.vendor.svc:8000/v1 cannot be reached (ConnectError) in 4 attempts",
        )
    ],
)
