"""Replays labelled utterances once to both arms of a rollout, and exports the counters that judge it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import NoReturn

import httpx
from attune.contract.job import ScoreRecipe
from attune.contract.metrics import Track

from attune_trainer.data.dataset import Utterance, load_manifest, load_split
from attune_trainer.failures import InvalidInput, Terminated
from attune_trainer.job import RecipeContext
from attune_trainer.replay.arm import Arm
from attune_trainer.replay.ledger import Counts, Ledger
from attune_trainer.replay.replay import GoldenUtterance, Replay, fix_order
from attune_trainer.scoring import count_errors, normalise
from attune_trainer.store import Store

_STOP_POLL_SECONDS = 0.2
_MAX_CONNECTIONS = 16


def run(recipe: ScoreRecipe, context: RecipeContext) -> NoReturn:
    """Replays the split, then stays up with its counters until it is asked to end.

    The counters are the result, and they live as long as this process does. So it never ends by itself, and it ends
    with 143 even when nothing is left to replay: a pod that is evicted before the rollout is decided must be replaced,
    whose replay then brings the same counters back. The operator deletes the Job when the rollout is over.

    Raises:
        Terminated: it was asked to end.
        RecipeFailure: the Dataset is missing or was changed, its split is empty, or the store is away.
    """
    context.reporter.update(stage="Loading")
    language = load_manifest(context.store, recipe.dataset).language
    utterances = load_split(context.store, recipe.dataset, recipe.split)
    golden = fix_order([_golden(context.store, one, language) for one in utterances], recipe.seed)
    if not golden:
        raise InvalidInput(
            "EmptySplit",
            f"the split {recipe.split.value} of dataset {recipe.dataset.name} holds no utterance; choose another one",
        )
    ledger = Ledger(
        namespace=recipe.namespace,
        canary=recipe.canary,
        rollout=recipe.rollout,
        utterances=len(golden),
        words=sum(one.words for one in golden),
    )
    context.reporter.registry.register(ledger)

    def report(counts: Counts) -> None:
        _report(context, counts, len(golden))

    try:
        asyncio.run(_replay(recipe, golden, ledger, language, report, context.stop))
    finally:
        context.reporter.registry.unregister(ledger)
    raise Terminated("the scorer was asked to end; a new one replays from the start")


async def _replay(
    recipe: ScoreRecipe,
    golden: list[GoldenUtterance],
    ledger: Ledger,
    language: str,
    report: Callable[[Counts], None],
    stop: threading.Event,
) -> None:
    """Replays, and returns once stop is set."""
    limits = httpx.Limits(max_connections=_MAX_CONNECTIONS)
    # The arms are in the cluster: proxies that the environment names are for the world outside.
    async with httpx.AsyncClient(limits=limits, trust_env=False) as client:
        spoken = language.partition("-")[0].lower()
        replay = Replay(
            utterances=golden,
            arms=(
                Arm(Track.STABLE, recipe.stable_url.rstrip("/"), recipe.stable_model_id, client, spoken),
                Arm(Track.CANARY, recipe.canary_url.rstrip("/"), recipe.canary_model_id, client, spoken),
            ),
            ledger=ledger,
            count_errors=lambda reference, hypothesis: count_errors(reference, normalise(hypothesis, language)).errors,
            max_errors=recipe.max_errors_per_utterance,
            per_minute=recipe.requests_per_minute,
            on_pair=report,
        )
        replaying = asyncio.create_task(replay.run())
        report(ledger.counts)
        try:
            while not stop.is_set():
                await asyncio.sleep(_STOP_POLL_SECONDS)
                if replaying.done():
                    replaying.result()
                    report(ledger.counts)
        finally:
            replaying.cancel()


def _golden(store: Store, utterance: Utterance, language: str) -> GoldenUtterance:
    def read_audio() -> Awaitable[bytes]:
        return asyncio.to_thread(store.read_bytes, utterance.audio_key)

    return GoldenUtterance(utterance.id, normalise(utterance.text, language), read_audio)


def _report(context: RecipeContext, counts: Counts, total: int) -> None:
    stage = "Exhausted" if counts.exhausted else "Replaying" if counts.utterances else "WaitingForArms"
    figures = {}
    if counts.words:
        figures = {"stableWer": counts.stable.errors / counts.words, "canaryWer": counts.canary.errors / counts.words}
    context.reporter.update(
        stage=stage,
        percent=100 * counts.utterances / total,
        step=counts.utterances,
        total_steps=total,
        metrics=figures,
    )
