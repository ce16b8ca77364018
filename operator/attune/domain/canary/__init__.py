"""Decides what a Canary does next: first model, rollout in steps, promotion, rollback.

What must survive the operator is in the cluster: models and templates are on the arms' Deployments, weights and the
rollout's record on the route, in one object and so in one write. The status is for people; decisions read from it only
what is harmless to lose: when the analysis last knew something, and how a rollout that has just ended should be told.
"""

from attune.domain.canary.decide import decide_canary
from attune.domain.canary.observed import ObservedCanary

__all__ = ["ObservedCanary", "decide_canary"]
