"""Carries out what only a Canary's plan asks for: arms, route, scorer. Nothing is written that is there already."""

import logging
from typing import Any

from attune.adapters.cluster import DEPLOYMENT, Cluster, Object, is_owned_by, type_of
from attune.api import Canary
from attune.contract.job import JobSpec
from attune.contract.metrics import Track
from attune.domain.actions import DeleteArm, EnsureArm, EnsureJob, EnsureRoute, EnsureScorer
from attune.domain.jobs import build_key
from attune.errors import NotOurs
from attune.reconcile.drift import covers, sign
from attune.reconcile.ensure import ensure_job
from attune.render.inference import build_deployment, build_service, name_arm
from attune.render.route import build_route
from attune.settings import Settings

_log = logging.getLogger(__name__)


def ensure_arm(cluster: Cluster, settings: Settings, canary: Canary, action: EnsureArm) -> bool:
    """Makes an arm's Deployment and Service as they are wanted; tells whether anything was written.

    Raises:
        NotOurs: when an object of that name has another owner.
    """
    wrote = _ensure_applied(cluster, canary, build_service(canary, action.track))
    deployment = build_deployment(
        canary, action.track, action.model, action.template, action.replicas, settings, action.former
    )
    return _ensure_applied(cluster, canary, deployment) or wrote


def delete_arm(cluster: Cluster, settings: Settings, canary: Canary, action: DeleteArm) -> bool:  # noqa: ARG001 (one shape for all)
    """Deletes an arm's Deployment and its pods; tells whether it was there. Its Service stays."""
    namespace, name = canary.metadata.namespace, name_arm(canary.metadata.name, action.track)
    present = cluster.get(DEPLOYMENT, namespace, name)
    if present is None or not is_owned_by(present, canary.metadata.uid):
        return False
    if present["metadata"].get("deletionTimestamp"):
        return False
    if not cluster.delete(DEPLOYMENT, namespace, name, uid=present["metadata"]["uid"]):
        return False
    _say("deleted", present, "the rollout is over")
    return True


def ensure_route(cluster: Cluster, settings: Settings, canary: Canary, action: EnsureRoute) -> bool:  # noqa: ARG001
    """Makes the HTTPRoute carry the weights and the record, in one request; tells whether anything was written.

    Both Services come first: a route to a Service that does not exist answers requests with errors.

    Raises:
        NotOurs: when an object of that name has another owner.
    """
    wrote = False
    for track in Track:
        wrote = _ensure_applied(cluster, canary, build_service(canary, track)) or wrote
    route = build_route(canary, action.stable_weight, action.canary_weight, action.rollout)
    return _ensure_applied(cluster, canary, route, reason=action.reason, exact_lists=True) or wrote


def ensure_scorer(cluster: Cluster, settings: Settings, canary: Canary, action: EnsureScorer) -> bool:
    """Makes the Job exist that replays golden utterances; tells whether anything was written.

    Raises:
        NotOurs: when an object of that name has another owner.
    """
    owner = canary.owner()
    spec = JobSpec(
        owner=owner,
        result_key=f"{build_key('results', owner, action.recipe.rollout)}.json",
        recipe=action.recipe,
    )
    job = EnsureJob(name=action.name, spec=spec, suspended=False, termination_grace_seconds=10)
    return ensure_job(cluster, settings, job)


def _ensure_applied(
    cluster: Cluster, canary: Canary, wanted: dict[str, Any], *, reason: str = "", exact_lists: bool = False
) -> bool:
    metadata = wanted["metadata"]
    live = cluster.get(type_of(wanted), metadata["namespace"], metadata["name"])
    if live is not None and not is_owned_by(live, canary.metadata.uid):
        raise NotOurs(
            f"{wanted['kind']} {metadata['name']} exists and is not owned by Canary {canary.metadata.name}; "
            "delete or rename it"
        )
    wanted = sign(wanted)
    if live is not None and covers(live, wanted, exact_lists=exact_lists):
        return False
    # Created by apply as well: what a POST has set would belong to the POST for ever, and no later apply could drop it.
    # Without force, since somebody else may create an object of this name at the same moment.
    cluster.apply(wanted, force=live is not None)
    _say("created" if live is None else "updated", wanted, reason)
    return True


def _say(verb: str, obj: Object, reason: str) -> None:
    metadata = obj["metadata"]
    extra = {"object": f"{obj['kind']}/{metadata['name']}", "namespace": metadata["namespace"], "reason": reason}
    _log.info(verb, extra=extra)
