"""Which other resources a resource refers to: their changes wake it."""

from attune.api import Canary, Dataset, Evaluation, FineTune
from attune.api.meta import LocalRef, Resource
from attune.reconcile.queue import Key


def find_references(resource: Resource) -> frozenset[Key]:
    """Names the custom resources that a resource refers to, in its own namespace."""
    namespace = resource.metadata.namespace

    def keys(kind: str, *references: LocalRef | None) -> set[Key]:
        return {Key(kind, namespace, one.name) for one in references if one is not None}

    match resource:
        case FineTune(spec=spec):
            old = spec.retention.dataset_ref if spec.retention is not None else None
            return frozenset(
                keys(Dataset.KIND, *spec.datasets, old) | keys(FineTune.KIND, spec.base_model.fine_tune_ref)
            )
        case Evaluation(spec=spec):
            tuned = (one.fine_tune_ref for one in spec.candidates)
            return frozenset(keys(Dataset.KIND, spec.dataset_ref) | keys(FineTune.KIND, *tuned))
        case Canary(spec=spec):
            return frozenset(
                keys(FineTune.KIND, spec.model.fine_tune_ref) | keys(Dataset.KIND, spec.analysis.golden.dataset_ref)
            )
        case _:
            return frozenset()
