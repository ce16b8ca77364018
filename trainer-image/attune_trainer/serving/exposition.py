"""Prometheus metrics of the inference server; every series carries the arm it belongs to."""

from typing import Final

from attune.contract.metrics import LABEL_TRACK, Track
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

_LATENCY_BUCKETS: Final = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 60.0)
_BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)
_FACTOR_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)


class ServeMetrics:
    """Records requests, batches and the queue of one server, in a registry of its own."""

    def __init__(self, track: Track, model_id: str) -> None:
        self.registry = CollectorRegistry()
        labels = {LABEL_TRACK: track.value}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, [LABEL_TRACK], buckets=buckets, registry=self.registry).labels(**labels)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, [LABEL_TRACK], registry=self.registry).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, [LABEL_TRACK], registry=self.registry).labels(**labels)

        self._track = track.value
        self.latency = histogram(
            "attune_serve_request_seconds", "Seconds from a request's first byte to its answer.", _LATENCY_BUCKETS
        )
        self._requests = Counter(
            "attune_serve_requests", "Transcription requests by HTTP status.", [LABEL_TRACK, "status"],
            registry=self.registry,
        )  # fmt: skip
        self._errors = Counter(
            "attune_serve_errors", "Transcription requests that failed, by error code.", [LABEL_TRACK, "code"],
            registry=self.registry,
        )  # fmt: skip
        self._batch_size = histogram("attune_serve_batch_utterances", "Utterances in a batch.", _BATCH_BUCKETS)
        self._factor = histogram(
            "attune_serve_real_time_factor", "Seconds of work for a second of audio, by batch.", _FACTOR_BUCKETS
        )
        self._accepted = gauge("attune_serve_requests_accepted", "Requests accepted and not yet answered.")
        self._queue_depth = gauge("attune_serve_queue_utterances", "Utterances that wait for a batch.")
        self._queue_seconds = gauge("attune_serve_queue_audio_seconds", "Seconds of audio that wait for a batch.")
        self._audio = counter("attune_serve_audio_seconds", "Seconds of audio transcribed.")
        self._busy = counter("attune_serve_busy_seconds", "Seconds spent transcribing.")
        self.ready = gauge("attune_serve_ready", "1 while the server wants requests.")
        Gauge(
            "attune_serve_model_info", "The model that is served.", [LABEL_TRACK, "model_id"], registry=self.registry
        ).labels(track.value, model_id).set(1)

    def observe_batch(self, utterances: int, audio_seconds: float, busy_seconds: float) -> None:
        """Records a batch of utterances that took busy_seconds."""
        self._batch_size.observe(utterances)
        self._audio.inc(audio_seconds)
        self._busy.inc(busy_seconds)
        if audio_seconds > 0:
            self._factor.observe(busy_seconds / audio_seconds)

    def observe_queue(self, utterances: int, audio_seconds: float) -> None:
        """Records what waits now."""
        self._queue_depth.set(utterances)
        self._queue_seconds.set(audio_seconds)

    def observe_requests(self, accepted: int) -> None:
        """Records how many requests are accepted and not yet answered."""
        self._accepted.set(accepted)

    def observe_request(self, status: int, seconds: float, error_code: str | None) -> None:
        """Records an answered transcription request; error_code is one of this module's fixed codes, or None."""
        self._requests.labels(self._track, str(status)).inc()
        self.latency.observe(seconds)
        if error_code is not None:
            self._errors.labels(self._track, error_code).inc()

    def render(self) -> bytes:
        """Gives the text exposition."""
        return generate_latest(self.registry)
