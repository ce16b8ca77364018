"""Finds which model and which pods each arm is to have: the wanted one, stable's own, and the one on trial."""

from attune.api.canary import ArmModel, PodTemplate
from attune.api.finetune import FineTune
from attune.contract.metrics import Track
from attune.domain.actions import EnsureArm
from attune.domain.canary.identity import compute_revision, name_model
from attune.domain.canary.next import Problem
from attune.domain.canary.observed import ObservedCanary
from attune.domain.jobs import Availability, describe_availability


def resolve_target(o: ObservedCanary) -> ArmModel | Problem:
    """Finds the model that the spec asks for, or says why there is none yet."""
    source = o.spec.model
    if source.uri is not None:
        revision = compute_revision(source.uri, None, o.spec.template)
        return ArmModel(revision=revision, model_id=name_model(source.uri), uri=source.uri)
    if source.fine_tune_ref is None:
        return Problem("ModelMissing", "spec.model names neither a uri nor a FineTune; give one of them")
    model = o.fine_tune.status.model if o.fine_tune is not None else None
    if o.fine_tune is not None and model is not None and o.fine_tune_state == "Ready":
        return ArmModel(
            revision=compute_revision(model.uri, model.digest, o.spec.template),
            model_id=o.fine_tune.status.model_id or name_model(model.uri),
            uri=model.uri,
            digest=model.digest,
        )
    return describe_unavailable(FineTune.KIND, source.fine_tune_ref.name, o.fine_tune_state)


def describe_unavailable(kind: str, name: str, state: Availability) -> Problem:
    """Says why a referent cannot be used, and whether that ends by itself."""
    # Said to be ready, but without what it should have made: that comes with its next pass.
    reason, message = describe_availability(kind, name, "NotReady" if state == "Ready" else state) or ("", "")
    return Problem(reason, message, waits=state in {"Ready", "NotReady"})


def resolve_stable(o: ObservedCanary) -> ArmModel:
    """Finds the model that stable serves, or served last as far as anything still tells."""
    if o.stable is not None:
        return o.stable.model
    told = o.status.stable
    if told is not None:
        return ArmModel(revision=told.revision, model_id=told.model_id, uri=told.uri, digest=told.digest)
    # Both the Deployment and the status are gone: the spec is all that is left.
    target = resolve_target(o)
    if isinstance(target, Problem):
        return ArmModel(revision="unknown", model_id="unknown", uri=o.spec.model.uri or "")
    return target


def ensure_stable(o: ObservedCanary) -> EnsureArm:
    """Stable as it is: its own model and template, and as many pods as are wanted now."""
    template = o.stable.template if o.stable is not None else o.template
    return EnsureArm(Track.STABLE, resolve_stable(o), template, o.spec.replicas)


def choose_trial_template(o: ObservedCanary, model: ArmModel) -> PodTemplate:
    """Chooses the pods for a model on trial: those that try it already, else those that are wanted."""
    if o.trial is not None and o.trial.model.revision == model.revision:
        return o.trial.template
    return o.template
