"""The four custom resources of attune.dev/v1alpha1; the CRDs are generated from these models."""

from attune.api.canary import Canary, CanarySpec, CanaryStatus
from attune.api.dataset import Dataset, DatasetSpec, DatasetStatus
from attune.api.evaluation import Evaluation, EvaluationSpec, EvaluationStatus
from attune.api.finetune import FineTune, FineTuneSpec, FineTuneStatus
from attune.api.meta import GROUP, VERSION, Condition, Metadata, Resource

KINDS: tuple[type[Resource], ...] = (Dataset, FineTune, Evaluation, Canary)

__all__ = [
    "GROUP",
    "KINDS",
    "VERSION",
    "Canary",
    "CanarySpec",
    "CanaryStatus",
    "Condition",
    "Dataset",
    "DatasetSpec",
    "DatasetStatus",
    "Evaluation",
    "EvaluationSpec",
    "EvaluationStatus",
    "FineTune",
    "FineTuneSpec",
    "FineTuneStatus",
    "Metadata",
    "Resource",
]
