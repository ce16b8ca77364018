"""Reading the scorer's counters: what Prometheus, and what is no Prometheus, may answer."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from attune.adapters.prometheus import UnusableAnswer, build_query, quote_label, read_paired
from attune.contract import metrics
from attune.errors import Unavailable

from tests.reconcile.canary_stage import serve

Answer = tuple[int, str, str]


@pytest.fixture
def ask() -> Iterator[Callable[[Answer], Any]]:
    """Reads from a server that gives one answer; its format is Prometheus's HTTP API, whose shape is the point."""
    answers: list[Answer] = []
    server, port = serve(lambda _: answers[-1])

    def read(answer: Answer) -> Any:
        answers.append(answer)
        return read_paired(f"http://127.0.0.1:{port}", "speech", "voice", "abc", 600)

    yield read
    server.shutdown()
    server.server_close()


def vector(*samples: tuple[dict[str, str], str], **more: Any) -> Answer:
    result = [{"metric": labels, "value": [1.0, value]} for labels, value in samples]
    body = {"status": "success", "data": {"resultType": "vector", "result": result}, **more}
    return 200, "application/json", json.dumps(body)


def series(pod: str, paired: str, words: str = "10") -> list[tuple[dict[str, str], str]]:
    return [
        ({"__name__": metrics.PAIRED_UTTERANCES, "pod": pod}, paired),
        ({"__name__": metrics.PAIRED_WORDS, "pod": pod}, words),
    ]


def test_the_series_of_one_scorer_are_read(ask: Callable[[Answer], Any]) -> None:
    reading = ask(vector(*series("one", "7", "31")))
    assert reading.instance == "one"
    assert reading.values == {metrics.PAIRED_UTTERANCES: 7.0, metrics.PAIRED_WORDS: 31.0}


def test_sums_of_two_scorers_are_never_added_the_longer_replay_counts(ask: Callable[[Answer], Any]) -> None:
    reading = ask(vector(*series("old", "40", "200"), *series("new", "12", "60")))
    assert reading.instance == "old"
    assert reading.values[metrics.PAIRED_WORDS] == 200.0


def test_nothing_scored_yet_is_none(ask: Callable[[Answer], Any]) -> None:
    assert ask(vector()) is None


def test_nan_reaches_the_verdict_as_nan(ask: Callable[[Answer], Any]) -> None:
    assert math.isnan(ask(vector(*series("one", "7", "NaN"))).values[metrics.PAIRED_WORDS])


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param((200, "text/html", "<html>log in</html>"), id="a login page"),
        pytest.param((200, "application/json", "[]"), id="another API"),
        pytest.param((200, "application/json", '{"status": "error", "error": "bad"}'), id="an error"),
        pytest.param(vector(warnings=["a store was away"]), id="a partial answer"),
        pytest.param(
            (200, "application/json", '{"status": "success", "data": {"resultType": "matrix", "result": []}}'),
            id="no vector",
        ),
        pytest.param(
            (200, "application/json", '{"status": "success", "data": {"resultType": "vector", "result": [{}]}}'),
            id="a broken sample",
        ),
        pytest.param((200, "application/json", " " * (2 * 1024 * 1024 + 1)), id="an endless answer"),
        pytest.param((200, "application/json", "[" * 1_000_000), id="an abyss"),
    ],
)
def test_answers_that_are_not_prometheuss_are_not_trusted(ask: Callable[[Answer], Any], answer: Answer) -> None:
    with pytest.raises(UnusableAnswer):
        ask(answer)


@pytest.mark.parametrize("status", [301, 302, 307, 401, 404, 422, 500, 503])
def test_any_other_status_is_unavailable_and_redirects_are_not_followed(
    ask: Callable[[Answer], Any], status: int
) -> None:
    with pytest.raises(Unavailable, match=f"status {status}"):
        ask((status, "text/plain", ""))


def test_a_closed_port_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="did not answer"):
        read_paired("http://127.0.0.1:9", "speech", "voice", "abc", 600)


def test_label_values_are_escaped() -> None:
    assert quote_label('a"b\\c\nd') == '"a\\"b\\\\c\\nd"'
    assert 'attune_canary="x\\"} or vector(1)"' in build_query("n", 'x"} or vector(1)', "r", 60)


@pytest.mark.parametrize(("asked", "window"), [(-5, "60s"), (600, "600s"), (10**9, "2592000s")])
def test_the_window_is_bounded(asked: int, window: str) -> None:
    assert build_query("n", "c", "r", asked).endswith(f"[{window}])")
