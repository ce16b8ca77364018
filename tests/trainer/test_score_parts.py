"""The scorer's parts: what is exported, in which order utterances count, and what becomes of arms that fail."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from attune.contract import metrics
from attune.contract.metrics import Track
from attune_trainer.failures import StoreUnavailable
from attune_trainer.replay.arm import Arm
from attune_trainer.replay.ledger import Counts, Ledger
from attune_trainer.replay.replay import GoldenUtterance, Replay, fix_order
from attune_trainer.scoring import count_errors, normalise
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

LABELS = {"attune_namespace": "speech", "attune_canary": "prod-voice", "attune_rollout": "r-7"}
NAMES = {
    value
    for name, value in vars(metrics).items()
    if name.isupper() and isinstance(value, str) and value.startswith("attune_") and not name.startswith("LABEL")
}


def new_ledger(utterances: int = 3, words: int = 9) -> Ledger:
    return Ledger(namespace="speech", canary="prod-voice", rollout="r-7", utterances=utterances, words=words)


def scrape(ledger: Ledger) -> dict[tuple[str, str | None], float]:
    """Gives the samples as Prometheus sees them, by name and track; every one must carry the rollout's labels."""
    registry = CollectorRegistry()
    registry.register(ledger)
    found: dict[tuple[str, str | None], float] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            track = labels.pop("track", None)
            assert labels == LABELS
            found[sample.name, track] = sample.value
    return found


def test_every_series_of_the_contract_is_there_from_the_first_scrape() -> None:
    samples = scrape(new_ledger())
    assert {name for name, _ in samples} == NAMES
    assert samples.pop((metrics.GOLDEN_UTTERANCES, None)) == 3
    assert samples.pop((metrics.GOLDEN_WORDS, None)) == 9
    assert set(samples.values()) == {0.0}


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(0, 30)), max_size=30), st.integers(0, 1))
def test_the_series_are_the_sums_that_the_contract_says(pairs: list[tuple[int, int, int]], finished: int) -> None:
    ledger = new_ledger()
    for words, stable, canary in pairs:
        ledger.add_pair(words, stable, canary)
    ledger.add_failure(Track.CANARY)
    if finished:
        ledger.exhaust()
    expected: dict[tuple[str, str | None], float] = {
        (metrics.PAIRED_UTTERANCES, None): len(pairs),
        (metrics.PAIRED_WORDS, None): sum(w for w, _, _ in pairs),
        (metrics.PAIRED_STABLE_ERRORS, None): sum(s for _, s, _ in pairs),
        (metrics.PAIRED_CANARY_ERRORS, None): sum(c for _, _, c in pairs),
        (metrics.PAIRED_STABLE_SQUARED, None): sum(s * s for _, s, _ in pairs),
        (metrics.PAIRED_CANARY_SQUARED, None): sum(c * c for _, _, c in pairs),
        (metrics.PAIRED_PRODUCT, None): sum(s * c for _, s, c in pairs),
        (metrics.GOLDEN_UTTERANCES, None): 3,
        (metrics.GOLDEN_WORDS, None): 9,
        (metrics.GOLDEN_EXHAUSTED, None): finished,
        (metrics.FAILED_REQUESTS, "stable"): 0,
        (metrics.FAILED_REQUESTS, "canary"): 1,
    }
    for track, place in (("stable", 1), ("canary", 2)):
        expected |= {
            (metrics.UTTERANCES, track): len(pairs),
            (metrics.REFERENCE_WORDS, track): sum(pair[0] for pair in pairs),
            (metrics.WORDS_SQUARED, track): sum(pair[0] ** 2 for pair in pairs),
            (metrics.WORD_ERRORS, track): sum(pair[place] for pair in pairs),
            (metrics.ERRORS_SQUARED, track): sum(pair[place] ** 2 for pair in pairs),
            (metrics.ERRORS_TIMES_WORDS, track): sum(pair[place] * pair[0] for pair in pairs),
        }
    assert scrape(ledger) == expected


def test_no_scrape_sees_half_of_a_pair() -> None:
    ledger = new_ledger()
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            ledger.add_pair(5, 1, 1)

    counting = threading.Thread(target=count)
    counting.start()
    try:
        for _ in range(200):
            samples = scrape(ledger)
            pairs = samples[metrics.PAIRED_UTTERANCES, None]
            assert samples[metrics.PAIRED_WORDS, None] == 5 * pairs
            assert samples[metrics.PAIRED_PRODUCT, None] == pairs
            assert samples[metrics.WORD_ERRORS, "canary"] == pairs
    finally:
        stop.set()
        counting.join()


def golden(name: str, reference: str, outages: int = 0) -> GoldenUtterance:
    """Gives an utterance whose audio cannot be read so many times at first."""
    left = outages

    async def read_audio() -> bytes:
        nonlocal left
        if left:
            left -= 1
            raise StoreUnavailable("StoreUnavailable", "the store did not answer")
        return name.encode()

    return GoldenUtterance(name, reference, read_audio)


@given(st.permutations([f"u{number}" for number in range(12)]), st.integers(0, 2**31))
def test_the_order_depends_on_the_set_and_the_seed_alone(names: list[str], seed: int) -> None:
    given_order = fix_order([golden(name, "a") for name in [*names, *names[:3]]], seed)
    sorted_order = fix_order([golden(name, "a") for name in sorted(names)], seed)
    assert [one.id for one in given_order] == [one.id for one in sorted_order]
    assert sorted(one.id for one in given_order) == sorted(names)


def test_another_seed_is_another_order() -> None:
    utterances = [golden(f"u{number}", "a") for number in range(12)]
    orders = {tuple(one.id for one in fix_order(utterances, seed)) for seed in range(5)}
    assert len(orders) == 5


@dataclass(eq=False)
class ScriptedArm:
    """An HTTP server that answers as the test says; real servers do not fail on demand.

    Attributes:
        answer: (utterance, how often it was asked before) -> status and text.
        first_model_id: which model answers an utterance's first request, where that is another one.
    """

    answer: Callable[[str, int], tuple[int, str]]
    model_id: str = "m1"
    first_model_id: str | None = None
    ready: bool = True
    asked: Counter[str] = field(default_factory=Counter)
    fields: list[bytes] = field(default_factory=list)
    url: str = ""

    @contextmanager
    def running(self) -> Iterator["ScriptedArm"]:
        arm = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200 if arm.ready else 503, {}, arm.model_id)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                arm.fields.append(body)
                name = body.partition(b'filename="')[2].partition(b".flac")[0].decode()
                before = arm.asked[name]
                arm.asked[name] += 1
                status, text = arm.answer(name, before)
                error = {"error": {"param": text}}
                model_id = (arm.first_model_id if before == 0 else None) or arm.model_id
                self._send(status, {"text": text} if status == 200 else error, model_id)

            def _send(self, status: int, content: dict[str, Any], model_id: str) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.send_header("x-attune-model-id", model_id)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


REFERENCES = {f"u{number}": " ".join(["word"] * (number + 1)) for number in range(8)}


def right(name: str, _before: int) -> tuple[int, str]:
    return 200, REFERENCES[name].title() + "."  # counted after normalisation, these are no errors


@dataclass
class Run:
    ledger: Ledger
    order: list[int]  # words of each pair, which name the utterance, in the order of counting


def replay(
    stable: ScriptedArm,
    canary: ScriptedArm,
    names: list[str],
    *,
    canary_model_id: str | None = None,
    meanwhile: Callable[[Ledger], bool] | None = None,
    outages: int = 0,
) -> Run:
    """Replays utterances to scripted arms; meanwhile is called now and then until it returns True."""
    ledger = new_ledger(len(names), sum(len(REFERENCES[name].split()) for name in names))
    run = Run(ledger, [])
    last = 0

    def on_pair(counts: Counts) -> None:
        nonlocal last
        run.order.append(counts.words - last)
        last = counts.words

    async def main() -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            subject = Replay(
                utterances=[golden(name, REFERENCES[name], outages) for name in names],
                arms=(
                    Arm(Track.STABLE, stable.url, None, client, "en", first_pause_seconds=0.001),
                    Arm(Track.CANARY, canary.url, canary_model_id, client, "en", first_pause_seconds=0.001),
                ),
                ledger=ledger,
                count_errors=lambda reference, hypothesis: count_errors(reference, normalise(hypothesis, "en")).errors,
                max_errors=30,
                per_minute=60_000,
                on_pair=on_pair,
                ready_poll_seconds=0.01,
            )
            async with asyncio.timeout(60):
                replaying = asyncio.create_task(subject.run())
                while meanwhile is not None and not meanwhile(ledger):
                    await asyncio.wait({replaying}, timeout=0.01)
                await replaying

    asyncio.run(main())
    return run


def test_each_utterance_goes_once_to_each_arm_and_counts_in_the_order_of_asking() -> None:
    first_may_answer = threading.Event()

    def slow_start(name: str, before: int) -> tuple[int, str]:
        if name == "u5":
            assert first_may_answer.wait(30)
        return right(name, before)

    names = ["u5", "u2", "u7", "u0", "u1"]
    with ScriptedArm(right).running() as stable, ScriptedArm(slow_start).running() as canary:

        def release(ledger: Ledger) -> bool:
            others_are_asked = canary.asked["u0"] == 1
            if others_are_asked:
                assert ledger.counts.utterances == 0  # later ones have answered, and do not overtake
                first_may_answer.set()
            return others_are_asked

        run = replay(stable, canary, names, meanwhile=release)
    assert run.order == [6, 3, 8, 1, 2]
    assert set(stable.asked.values()) == set(canary.asked.values()) == {1}
    assert run.ledger.counts.stable.errors == run.ledger.counts.canary.errors == 0
    assert run.ledger.counts.exhausted
    assert all(b'name="language"\r\n\r\nen' in body for body in stable.fields)


def test_an_utterance_counts_at_most_the_cap() -> None:
    def loops(_name: str, _before: int) -> tuple[int, str]:
        return 200, "no " * 400

    with ScriptedArm(right).running() as stable, ScriptedArm(loops).running() as canary:
        counts = replay(stable, canary, ["u0", "u3"]).ledger.counts
    assert (counts.canary.errors, counts.canary.errors_squared) == (60, 1800)


def test_a_hiccup_is_tried_again_and_is_no_failure() -> None:
    def hiccup(name: str, before: int) -> tuple[int, str]:
        return (503, "") if before < 2 else right(name, before)

    with ScriptedArm(right).running() as stable, ScriptedArm(hiccup).running() as canary:
        counts = replay(stable, canary, ["u0", "u1", "u2"]).ledger.counts
    assert (counts.utterances, counts.stable.failed_requests, counts.canary.failed_requests) == (3, 0, 0)
    assert set(canary.asked.values()) == {3}


def test_what_one_arm_failed_to_answer_comes_again_at_the_end_and_the_other_arm_hears_it_once() -> None:
    def fails_a_round(name: str, before: int) -> tuple[int, str]:
        return (500, "") if name == "u1" and before < 4 else right(name, before)

    with ScriptedArm(right).running() as stable, ScriptedArm(fails_a_round).running() as canary:
        run = replay(stable, canary, ["u1", *(f"u{number}" for number in range(2, 8))])
    assert run.order == [3, 4, 5, 6, 7, 8, 2]
    assert (run.ledger.counts.stable.failed_requests, run.ledger.counts.canary.failed_requests) == (0, 1)
    assert stable.asked["u1"] == 1
    assert canary.asked["u1"] == 5


def test_what_is_never_answered_is_given_up_and_counts_as_not_heard() -> None:
    def refuses(name: str, before: int) -> tuple[int, str]:
        return (400, "file") if name == "u2" else right(name, before)

    with ScriptedArm(right).running() as stable, ScriptedArm(refuses).running() as canary:
        counts = replay(stable, canary, ["u2", "u3", "u4"]).ledger.counts
    assert (counts.utterances, counts.words, counts.exhausted) == (3, 12, True)
    assert (counts.stable.errors, counts.canary.errors) == (0, 3)
    assert counts.canary.failed_requests == canary.asked["u2"] == 5


def test_a_store_that_is_away_for_a_while_loses_no_count() -> None:
    with ScriptedArm(right).running() as stable, ScriptedArm(right).running() as canary:
        counts = replay(stable, canary, ["u0", "u1", "u2"], outages=6).ledger.counts
    assert (counts.utterances, counts.exhausted) == (3, True)
    assert (counts.stable.errors, counts.canary.errors, counts.canary.failed_requests) == (0, 0, 0)


def test_an_arm_that_is_away_is_waited_for() -> None:
    def away(name: str, before: int) -> tuple[int, str]:
        if canary.asked["u0"] and not canary.ready:
            return 503, ""
        return right(name, before)

    canary = ScriptedArm(away, ready=False)
    with ScriptedArm(right).running() as stable, canary.running():

        def come_back(_ledger: Ledger) -> bool:
            assert not canary.asked
            assert not stable.asked
            canary.ready = True
            return True

        counts = replay(stable, canary, ["u0", "u1"], meanwhile=come_back).ledger.counts
    assert (counts.utterances, counts.canary.failed_requests) == (2, 0)


def test_answers_of_another_model_are_not_counted() -> None:
    def nonsense_first(name: str, before: int) -> tuple[int, str]:
        return (200, "nonsense") if before == 0 else right(name, before)

    # A pod of the rollout before still stands behind the Service, though the new one is ready.
    canary = ScriptedArm(nonsense_first, model_id="new", first_model_id="old")
    with ScriptedArm(right).running() as stable, canary.running():
        counts = replay(stable, canary, ["u3", "u4", "u5"], canary_model_id="new").ledger.counts
    assert (counts.utterances, counts.canary.errors, counts.canary.failed_requests) == (3, 0, 0)
    assert set(canary.asked.values()) == {2}
    assert set(stable.asked.values()) == {1}


def test_an_arm_with_the_wrong_model_is_not_ready() -> None:
    canary = ScriptedArm(right, model_id="old")
    with ScriptedArm(right).running() as stable, canary.running():
        polls = 0

        def replace_pods(_ledger: Ledger) -> bool:
            nonlocal polls
            polls += 1
            if polls == 5:
                assert not canary.asked
                canary.model_id = "new"
            return polls == 5

        counts = replay(stable, canary, ["u3"], canary_model_id="new", meanwhile=replace_pods).ledger.counts
    assert counts.utterances == 1


def test_a_model_that_does_not_know_the_language_is_asked_without_it() -> None:
    def english_only(name: str, before: int) -> tuple[int, str]:
        if b'name="language"' in canary.fields[-1]:
            return 400, "language"
        return right(name, before)

    canary = ScriptedArm(english_only)
    with ScriptedArm(right).running() as stable, canary.running():
        counts = replay(stable, canary, ["u3"]).ledger.counts
    assert (counts.utterances, counts.canary.failed_requests) == (1, 0)
    assert b'name="language"' in stable.fields[-1]


@pytest.mark.parametrize("body", [b"no json", b"{}", b'{"text": 3}', b"[]"])
def test_an_answer_without_a_text_is_no_answer(body: bytes) -> None:
    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=body)

    async def ask() -> str:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await Arm(Track.STABLE, "http://arm", None, client).transcribe(b"", "u0.flac")

    with pytest.raises(Exception, match="without a text"):
        asyncio.run(ask())
