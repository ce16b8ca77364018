"""Says what makes two models or two rollouts the same: names, revisions, and the image that an arm keeps."""

from typing import Final

from attune.api.canary import PodTemplate, ServerContainer
from attune.domain.names import fingerprint

REVISION_DIGITS: Final = 10


def name_rollout(uid: str, stable_revision: str, target_revision: str) -> str:
    """Names a rollout by what is compared: the same pair of models of the same Canary is the same question."""
    return fingerprint(uid, stable_revision, target_revision, digits=REVISION_DIGITS)


def compute_revision(uri: str, digest: str | None, template: PodTemplate) -> str:
    """Hashes a model and the pods that serve it. Fields left at their defaults don't count."""
    plain = template.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return fingerprint(uri, digest, plain, digits=REVISION_DIGITS)


def name_model(uri: str) -> str:
    """Names a model by the last part of its URI that says something.

    "s3://attune/models/whisper-tiny.en" -> "whisper-tiny.en"; "s3://b/3f9c2a/merged" -> "3f9c2a/merged".
    """
    parts = [part for part in uri.partition("://")[2].split("/") if part]
    generic = {"merged", "model", "final", "latest", "checkpoint"}
    return "/".join(parts[-2:] if parts[-1] in generic else parts[-1:])


def fill_image(template: PodTemplate, image: str) -> PodTemplate:
    """Writes the inference image into a template that names none, so that an arm keeps it for life."""
    containers = template.spec.containers or [ServerContainer(name="server")]
    filled = [one if one.image else one.model_copy(update={"image": image}) for one in containers]
    return template.model_copy(update={"spec": template.spec.model_copy(update={"containers": filled})})
