"""Whatever a Dataset, FineTune or Evaluation is at, its deletion leaves nothing; a Canary's is in test_canary."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from attune.adapters.cluster import Cluster
from attune.contract.result import Summary

from tests.reconcile.conftest import OperatorProcess, lend_namespace
from tests.reconcile.kubelet import Namespace, wait_for
from tests.reconcile.samples import DATASET, EVALUATION, FINE_TUNE, PREPARED, TRAINED

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def place(cluster: Cluster) -> Iterator[Namespace]:
    """One namespace for all: each test names its resources anew."""
    yield from lend_namespace(cluster, "deletion")


@pytest.fixture(scope="module")
def running(place: Namespace, start_operator: Callable[..., OperatorProcess]) -> Iterator[OperatorProcess]:
    """One operator for all."""
    operator = start_operator(place)
    operator.wait_leading()
    yield operator
    operator.stop()


def preparing(place: Namespace, name: str) -> None:
    place.apply("Dataset", name, DATASET)
    place.start(place.wait_job(name))
    place.wait_reason("Dataset", name, "Preparing")


def prepared(place: Namespace, name: str) -> None:
    place.apply("Dataset", name, DATASET)
    place.finish(place.wait_job(name), Summary(result=PREPARED))
    place.wait_reason("Dataset", name, "Prepared")


def pending(place: Namespace, name: str, **changes: Any) -> None:
    """Waits for a Dataset that there is none of, unless there is."""
    place.apply("FineTune", name, {**FINE_TUNE, "datasets": [{"name": f"{name}-data"}], **changes})
    place.wait("FineTune", name, lambda one: "status" in one)


def training(place: Namespace, name: str) -> None:
    prepared(place, f"{name}-data")
    pending(place, name)
    place.start(place.wait_job(name))
    place.wait_reason("FineTune", name, "Training")


def suspended(place: Namespace, name: str) -> None:
    training(place, name)
    pending(place, name, suspend=True)
    place.wait_reason("FineTune", name, "Suspended")
    wait_for(lambda: not place.pods(place.wait_job(name)), "the end of the suspended Job's pod")


def trained(place: Namespace, name: str) -> None:
    training(place, name)
    place.finish(place.wait_job(name), Summary(result=TRAINED))
    place.wait_reason("FineTune", name, "Trained")


def evaluating(place: Namespace, name: str) -> None:
    prepared(place, f"{name}-data")
    base = EVALUATION["candidates"][0]
    other = {"name": "other", "model": {"uri": "s3://models/other"}}
    spec = {**EVALUATION, "datasetRef": {"name": f"{name}-data"}, "candidates": [base, other]}
    place.apply("Evaluation", name, spec)
    place.start(place.wait_job(name))
    place.wait_reason("Evaluation", name, "Evaluating")


@pytest.mark.parametrize(
    ("kind", "bring"),
    [
        ("Dataset", preparing),
        ("Dataset", prepared),
        ("FineTune", pending),
        ("FineTune", training),
        ("FineTune", suspended),
        ("FineTune", trained),
        ("Evaluation", evaluating),
    ],
)
def test_deletion_leaves_nothing(
    place: Namespace, running: OperatorProcess, kind: str, bring: Callable[[Namespace, str], None]
) -> None:
    name = f"{kind.lower()}-{bring.__name__}"
    bring(place, name)
    uid = place.get(kind, name)["metadata"]["uid"]
    seen, said = count_gone(running, kind), len(running.log.read_text())
    place.delete(kind, name)
    wait_for(lambda: count_gone(running, kind) > seen, "the operator to see it")
    # A pass that had begun before may have made something anew; it has no owner, and goes as well.
    place.wait_gone(kind, name, uid)
    assert '"level": "error"' not in running.log.read_text()[said:]


def count_gone(operator: OperatorProcess, kind: str) -> int:
    prefix = f'attune_reconcile_total{{kind="{kind}",result="gone"}}'
    lines = [line for line in operator.read("/metrics").splitlines() if line.startswith(prefix)]
    return int(float(lines[0].split()[-1])) if lines else 0
