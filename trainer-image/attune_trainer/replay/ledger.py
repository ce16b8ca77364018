"""The counts that judge a rollout, exported so that every scrape sees all of them at one moment."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from attune.contract import metrics
from attune.contract.metrics import Track
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class ArmCounts:
    """Sums over an arm's scored utterances with errors e and reference words w."""

    errors: int = 0
    errors_squared: int = 0
    errors_times_words: int = 0
    failed_requests: int = 0


@dataclass(frozen=True)
class Counts:
    """Sums over pairs: utterances with s errors by stable, c errors by canary, and w words.

    Both arms have answered it, or were asked so often in vain that it counts as not heard. The frozen whole is replaced
    at once, so a reader never sees half of a pair.
    """

    utterances: int = 0
    words: int = 0
    words_squared: int = 0
    product: int = 0  # sum s c
    stable: ArmCounts = field(default_factory=ArmCounts)
    canary: ArmCounts = field(default_factory=ArmCounts)
    exhausted: bool = False

    def arm(self, track: Track) -> ArmCounts:
        """Gives one arm's sums."""
        return self.stable if track is Track.STABLE else self.canary

    def with_pair(self, words: int, stable_errors: int, canary_errors: int) -> "Counts":
        """Adds a pair: 10 words, 1 and 3 errors add 10 words, errors 1 and 3, squares 1 and 9, and the product 3."""
        return replace(
            self,
            utterances=self.utterances + 1,
            words=self.words + words,
            words_squared=self.words_squared + words**2,
            product=self.product + stable_errors * canary_errors,
            stable=_add(self.stable, stable_errors, words),
            canary=_add(self.canary, canary_errors, words),
        )

    def with_failure(self, track: Track) -> "Counts":
        """Adds a request that an arm did not answer."""
        arm = self.arm(track)
        failed = replace(arm, failed_requests=arm.failed_requests + 1)
        return replace(self, stable=failed) if track is Track.STABLE else replace(self, canary=failed)


def _add(arm: ArmCounts, errors: int, words: int) -> ArmCounts:
    return replace(
        arm,
        errors=arm.errors + errors,
        errors_squared=arm.errors_squared + errors**2,
        errors_times_words=arm.errors_times_words + errors * words,
    )


_HELP: Final = MappingProxyType(
    {
        metrics.UTTERANCES: "Utterances scored.",
        metrics.WORD_ERRORS: "Word errors, each utterance's capped.",
        metrics.REFERENCE_WORDS: "Words of the references.",
        metrics.ERRORS_SQUARED: "Sum over utterances of squared word errors.",
        metrics.WORDS_SQUARED: "Sum over utterances of squared reference words.",
        metrics.ERRORS_TIMES_WORDS: "Sum over utterances of word errors times reference words.",
        metrics.FAILED_REQUESTS: "Requests that an arm did not answer, after retries.",
        metrics.PAIRED_UTTERANCES: "Utterances that both arms answered, or that an arm never answered.",
        metrics.PAIRED_WORDS: "Reference words of pairs.",
        metrics.PAIRED_STABLE_ERRORS: "Word errors of the stable arm over pairs.",
        metrics.PAIRED_CANARY_ERRORS: "Word errors of the canary arm over pairs.",
        metrics.PAIRED_STABLE_SQUARED: "Sum over pairs of the stable arm's squared word errors.",
        metrics.PAIRED_CANARY_SQUARED: "Sum over pairs of the canary arm's squared word errors.",
        metrics.PAIRED_PRODUCT: "Sum over pairs of the product of both arms' word errors.",
        metrics.GOLDEN_UTTERANCES: "Utterances in the golden set.",
        metrics.GOLDEN_WORDS: "Reference words in the golden set.",
        metrics.GOLDEN_EXHAUSTED: "1 when no utterance of the golden set is left to replay.",
    }
)


class Ledger(Collector):
    """Holds the newest Counts and exports them under the names and labels of attune.contract.metrics."""

    def __init__(self, *, namespace: str, canary: str, rollout: str, utterances: int, words: int) -> None:
        """Starts at zero for every series: a series that appears late has no beginning to compute an increase from.

        Args:
            namespace: value of the label attune_namespace.
            canary: value of the label attune_canary.
            rollout: value of the label attune_rollout.
            utterances: how many the golden set holds.
            words: how many reference words it holds.
        """
        self._labels = {
            metrics.LABEL_NAMESPACE: namespace,
            metrics.LABEL_CANARY: canary,
            metrics.LABEL_ROLLOUT: rollout,
        }
        self._golden_utterances = utterances
        self._golden_words = words
        self._lock = threading.Lock()
        self._counts = Counts()

    @property
    def counts(self) -> Counts:
        """The newest sums."""
        with self._lock:
            return self._counts

    def add_pair(self, words: int, stable_errors: int, canary_errors: int) -> Counts:
        """Counts an utterance of both arms, and gives the new sums."""
        with self._lock:
            self._counts = self._counts.with_pair(words, stable_errors, canary_errors)
            return self._counts

    def add_failure(self, track: Track) -> None:
        """Counts a request that an arm did not answer."""
        with self._lock:
            self._counts = self._counts.with_failure(track)

    def exhaust(self) -> None:
        """Says that nothing is left to replay."""
        with self._lock:
            self._counts = replace(self._counts, exhausted=True)

    def describe(self) -> list[Metric]:
        """Names the series, so that the registry refuses a second ledger."""
        return [self._gauge(name, {}) if name in _GAUGES else self._counter(name, {}) for name in _HELP]

    def collect(self) -> Iterator[Metric]:
        """Yields every series from one snapshot."""
        counts = self.counts
        by_track: Mapping[str, tuple[int, int]] = {
            metrics.UTTERANCES: (counts.utterances, counts.utterances),
            metrics.WORD_ERRORS: (counts.stable.errors, counts.canary.errors),
            metrics.REFERENCE_WORDS: (counts.words, counts.words),
            metrics.ERRORS_SQUARED: (counts.stable.errors_squared, counts.canary.errors_squared),
            metrics.WORDS_SQUARED: (counts.words_squared, counts.words_squared),
            metrics.ERRORS_TIMES_WORDS: (counts.stable.errors_times_words, counts.canary.errors_times_words),
            metrics.FAILED_REQUESTS: (counts.stable.failed_requests, counts.canary.failed_requests),
        }
        for name, (stable, canary) in by_track.items():
            yield self._counter(name, {(Track.STABLE.value,): stable, (Track.CANARY.value,): canary})
        paired = {
            metrics.PAIRED_UTTERANCES: counts.utterances,
            metrics.PAIRED_WORDS: counts.words,
            metrics.PAIRED_STABLE_ERRORS: counts.stable.errors,
            metrics.PAIRED_CANARY_ERRORS: counts.canary.errors,
            metrics.PAIRED_STABLE_SQUARED: counts.stable.errors_squared,
            metrics.PAIRED_CANARY_SQUARED: counts.canary.errors_squared,
            metrics.PAIRED_PRODUCT: counts.product,
        }
        for name, value in paired.items():
            yield self._counter(name, {(): value})
        golden = {
            metrics.GOLDEN_UTTERANCES: self._golden_utterances,
            metrics.GOLDEN_WORDS: self._golden_words,
            metrics.GOLDEN_EXHAUSTED: int(counts.exhausted),
        }
        for name, value in golden.items():
            yield self._gauge(name, {(): value})

    def _counter(self, name: str, values: Mapping[tuple[str, ...], int]) -> CounterMetricFamily:
        family = CounterMetricFamily(name, _HELP[name], labels=[*self._labels, *_extra_labels(name)])
        for extra, value in values.items():
            family.add_metric([*self._labels.values(), *extra], value)
        return family

    def _gauge(self, name: str, values: Mapping[tuple[str, ...], int]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, _HELP[name], labels=[*self._labels])
        for extra, value in values.items():
            family.add_metric([*self._labels.values(), *extra], value)
        return family


_GAUGES: Final = frozenset({metrics.GOLDEN_UTTERANCES, metrics.GOLDEN_WORDS, metrics.GOLDEN_EXHAUSTED})
_BY_TRACK: Final = frozenset(
    {
        metrics.UTTERANCES,
        metrics.WORD_ERRORS,
        metrics.REFERENCE_WORDS,
        metrics.ERRORS_SQUARED,
        metrics.WORDS_SQUARED,
        metrics.ERRORS_TIMES_WORDS,
        metrics.FAILED_REQUESTS,
    }
)


def _extra_labels(name: str) -> list[str]:
    return [metrics.LABEL_TRACK] if name in _BY_TRACK else []
