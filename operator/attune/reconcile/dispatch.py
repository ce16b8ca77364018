"""For each kind: how it is observed and how it is decided."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from attune.adapters.cluster import Cluster
from attune.api import Canary, Dataset, Evaluation, FineTune
from attune.api.meta import Resource
from attune.domain.actions import Plan
from attune.domain.canary import decide_canary
from attune.domain.dataset import decide_dataset
from attune.domain.evaluation import decide_evaluation
from attune.domain.finetune import decide_finetune
from attune.reconcile.observe import observe_dataset, observe_evaluation, observe_finetune
from attune.reconcile.observe_canary import observe_canary
from attune.settings import Settings


@dataclass(frozen=True)
class Reconciler:
    """The two halves of a kind's reconcile that differ between kinds.

    observe reads everything once; now is UTC in whole seconds. decide is pure and total. The observation's type is
    theirs alone, hence Any.
    """

    model: type[Resource]
    observe: Callable[[Cluster, Settings, Any, datetime], Any]
    decide: Callable[[Any], Plan]


RECONCILERS: dict[str, Reconciler] = {
    one.model.KIND: one
    for one in (
        Reconciler(Dataset, observe_dataset, decide_dataset),
        Reconciler(FineTune, observe_finetune, decide_finetune),
        Reconciler(Evaluation, observe_evaluation, decide_evaluation),
        Reconciler(Canary, observe_canary, decide_canary),
    )
}
