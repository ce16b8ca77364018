"""Checks what must hold before a rollout begins: the Gateway, Prometheus' address, the golden set, and stable."""

from collections.abc import Callable, Collection
from typing import Final
from urllib.parse import urlsplit

from attune.api.dataset import Dataset, SplitStatus
from attune.contract.job import Split
from attune.domain.canary.models import describe_unavailable
from attune.domain.canary.next import Problem
from attune.domain.canary.observed import ObservedCanary
from attune.domain.canary.reasons import GATEWAY_NOT_FOUND, GATEWAY_NOT_READY, GOLDEN_SET_TOO_SMALL, STABLE_NOT_READY
from attune.domain.canary.scorer import resolve_golden_input
from attune.domain.verdict import REASON_PROMETHEUS_NOT_ALLOWED


def check_gateway(o: ObservedCanary) -> Problem | None:
    """Says why no request could arrive through the Gateway; None when it may be relied on."""
    ref = o.spec.traffic.gateway_ref
    where = f"Gateway {ref.name} in namespace {ref.namespace or o.canary.metadata.namespace}"
    if o.gateway.state == "NotServed":
        return Problem(GATEWAY_NOT_FOUND, "the cluster does not serve the Gateway API; install its CRDs")
    if o.gateway.state == "NotFound":
        return Problem(GATEWAY_NOT_FOUND, f"there is no {where}; create it or correct spec.traffic.gatewayRef")
    if o.gateway.state == "NotProgrammed":
        detail = f" ({o.gateway.message})" if o.gateway.message else ""
        return Problem(GATEWAY_NOT_READY, f"{where} is not programmed yet{detail}; waiting for it", waits=True)
    return None


def refuse_prometheus(url: str, hosts: Collection[str]) -> str | None:
    """Says why a Prometheus may not be asked; None when it may. hosts: host or host:port; empty: any may be asked.

    The operator asks from where it stands: without a list, whoever may write a Canary can have it send requests to any
    address that it reaches.
    """
    parts = urlsplit(url)
    if not hosts or not {parts.hostname, parts.netloc.lower()}.isdisjoint(hosts):
        return None
    return (
        f"spec.analysis.prometheus.url names {parts.netloc}, which this installation does not let Canaries ask; name "
        f"{' or '.join(sorted(hosts))}, or have it added to the chart's settings.prometheusHosts"
    )


def _check_prometheus(o: ObservedCanary) -> Problem | None:
    refusal = refuse_prometheus(o.spec.analysis.prometheus.url, o.prometheus_hosts)
    return Problem(REASON_PROMETHEUS_NOT_ALLOWED, refusal) if refusal is not None else None


def _check_golden_set(o: ObservedCanary) -> Problem | None:
    name = o.spec.analysis.golden.dataset_ref.name
    if resolve_golden_input(o) is None or o.dataset_state != "Ready":
        return describe_unavailable(Dataset.KIND, name, o.dataset_state)
    split = _golden_split(o)
    needed = o.spec.analysis.wer.min_words
    if split is not None and split.words < needed:
        utterances = -(-needed * split.utterances // split.words) if split.words else needed
        return Problem(
            GOLDEN_SET_TOO_SMALL,
            f"the {o.spec.analysis.golden.split} split of Dataset {name} holds {split.utterances} utterances with "
            f"{split.words} words, and spec.analysis.wer.minWords asks for {needed}: no rollout could ever pass; use "
            f"about {utterances} utterances, or lower minWords",
        )
    return None


def _golden_split(o: ObservedCanary) -> SplitStatus | None:
    if o.dataset is None or o.dataset.status.splits is None:
        return None
    splits = o.dataset.status.splits
    return splits.holdout if o.spec.analysis.golden.split == Split.HOLDOUT.value else splits.validation


def _check_stable(o: ObservedCanary) -> Problem | None:
    if o.stable is not None and o.stable.rolled_out:
        return None
    ailment = o.stable.problem if o.stable is not None else None
    why = f" ({ailment.message})" if ailment is not None else ""
    message = f"stable's pods are not all ready{why}; the rollout begins when they are"
    return Problem(STABLE_NOT_READY, message, waits=True)


PREFLIGHT: Final[tuple[Callable[[ObservedCanary], Problem | None], ...]] = (
    check_gateway,
    _check_prometheus,
    _check_golden_set,
    _check_stable,
)
