"""Reads the scorer's counters from Prometheus: one bounded question, one checked answer."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import requests

from attune.adapters.answer import read_bounded
from attune.contract import metrics
from attune.errors import Unavailable

TIMEOUT_SECONDS: Final = 5.0
MOST_BYTES: Final = 2 * 1024 * 1024
LONGEST_WINDOW_SECONDS: Final = 30 * 24 * 3600


@dataclass(frozen=True)
class PairedReading:
    """The latest values of contract.metrics.PAIRED_SERIES, by series, of one scorer. instance: which one."""

    instance: str
    values: Mapping[str, float]


class UnusableAnswer(Unavailable):
    """Prometheus answered, but not with what was asked for."""


def read_paired(url: str, namespace: str, canary: str, rollout: str, window_seconds: int) -> PairedReading | None:
    """Reads the paired sums of a rollout; None when nobody has scored anything in it.

    window_seconds: how far back a series may have ended; the rollout's age, so that a scorer that has gone still
    counts. Where several scorers have run (a pod was replaced), the one that has paired most utterances is taken and
    the others are left out: each replays the same utterances from the start, so their sums must not be added.

    Raises:
        Unavailable: Prometheus did not answer in time, or not like Prometheus.
    """
    answer = _query(url, build_query(namespace, canary, rollout, window_seconds))
    readings: dict[str, dict[str, float]] = {}
    for sample in answer:
        labels, value = _read_sample(sample)
        name = labels.get("__name__")
        if name is None:
            raise UnusableAnswer("Prometheus's answer has a series without a name")
        instance = labels.get("pod") or labels.get("instance") or ""
        known = readings.setdefault(instance, {})
        # The same scorer scraped by two jobs: its counters only grow, so the larger value is the later one.
        known[name] = value if math.isnan(value) else max(known.get(name, value), value)
    if not readings:
        return None

    def rank(instance: str) -> tuple[float, str]:
        paired = readings[instance].get(metrics.PAIRED_UTTERANCES, 0.0)
        return (-1.0 if math.isnan(paired) else paired, instance)

    chosen = max(readings, key=rank)
    return PairedReading(chosen, readings[chosen])


def build_query(namespace: str, canary: str, rollout: str, window_seconds: int) -> str:
    """Builds the PromQL for all paired series of a rollout.

    last_over_time keeps the names of the series, and keeps the last value of a scorer that is no longer scraped.
    """
    window = max(60, min(window_seconds, LONGEST_WINDOW_SECONDS))
    selector = ",".join(
        [
            f'__name__=~"{"|".join(metrics.PAIRED_SERIES)}"',
            f"{metrics.LABEL_NAMESPACE}={quote_label(namespace)}",
            f"{metrics.LABEL_CANARY}={quote_label(canary)}",
            f"{metrics.LABEL_ROLLOUT}={quote_label(rollout)}",
        ]
    )
    return f"last_over_time({{{selector}}}[{window}s])"


def quote_label(value: str) -> str:
    r"""Quotes a label value for PromQL: a"b -> "a\"b"."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _query(url: str, query: str) -> list[Any]:
    where = f"Prometheus at {url}"
    try:
        # No proxies of the environment, no credentials of a .netrc, and no redirects: the address is the one given.
        with requests.Session() as session:
            session.trust_env = False
            with session.post(
                f"{url.rstrip('/')}/api/v1/query",
                data={"query": query, "timeout": f"{int(TIMEOUT_SECONDS)}s"},
                timeout=TIMEOUT_SECONDS,
                allow_redirects=False,
                stream=True,
                headers={"Accept": "application/json", "User-Agent": "attune-operator"},
            ) as response:
                status = response.status_code
                body = read_bounded(response, most_bytes=MOST_BYTES, seconds=TIMEOUT_SECONDS)
    except Unavailable as error:
        raise Unavailable(f"{where}: {error}") from error
    except requests.RequestException as error:
        raise Unavailable(f"{where} did not answer ({type(error).__name__})") from error
    if status != requests.codes.ok:
        raise Unavailable(f"{where} answered with HTTP status {status}")
    if len(body) > MOST_BYTES:
        raise UnusableAnswer(f"the answer of {where} is longer than {MOST_BYTES} bytes")
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UnusableAnswer(f"{where} answered with something that is no JSON; check the URL") from error
    return _read_result(decoded, where)


def _read_result(decoded: Any, where: str) -> list[Any]:
    if not isinstance(decoded, dict) or decoded.get("status") != "success":
        raise UnusableAnswer(f"{where} could not answer the query")
    if decoded.get("warnings"):
        # Thanos and its like warn when a store was away: the answer is partial, and partial sums are wrong sums.
        raise UnusableAnswer(f"{where} says that its answer is partial")
    data = decoded.get("data")
    if not isinstance(data, dict) or data.get("resultType") != "vector" or not isinstance(data.get("result"), list):
        raise UnusableAnswer(f"{where} answered with something that is no vector")
    return list(data["result"])


def _read_sample(sample: Any) -> tuple[dict[str, str], float]:
    try:
        labels = {str(name): str(value) for name, value in sample["metric"].items()}
        _, value = sample["value"]
        return labels, float(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnusableAnswer("Prometheus's answer has a sample that cannot be read") from error
