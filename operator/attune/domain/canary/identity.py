"""Says what makes two models or two rollouts the same: names, revisions, and the image that an arm keeps."""

from datetime import datetime
from typing import Final

from attune.api.canary import PodTemplate, ServerContainer
from attune.domain.names import fingerprint

REVISION_DIGITS: Final = 10
# A scorer's name has to hold a Canary's name of 40 characters and a rollout's: 40 + 7 + 14 + 2 = 63.
_TRY_DIGITS: Final = 4


def name_pair(uid: str, stable_revision: str, target_revision: str) -> str:
    """Names what is compared: the same pair of models of the same Canary is the same question."""
    return fingerprint(uid, stable_revision, target_revision, digits=REVISION_DIGITS)


def name_rollout(pair: str, started: datetime) -> str:
    """Names one try to answer it; the next one within 18 hours has another name.

    Its scorer counts under this name. Prometheus gives the sums of an earlier try for as long as it looks back.
    """
    return f"{pair}{int(started.timestamp()) % 16**_TRY_DIGITS:0{_TRY_DIGITS}x}"


def is_same_pair(rollout: str, pair: str) -> bool:
    """Tells whether a rollout is a try to answer this question."""
    return rollout.startswith(pair)


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
