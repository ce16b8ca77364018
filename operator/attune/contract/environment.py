"""Names of environment variables, files and ports that a Job's container finds."""

from typing import Final

JOB_FILE: Final = "/etc/attune/job.json"
JOB_FILE_VARIABLE: Final = "ATTUNE_JOB_FILE"
TERMINATION_MESSAGE_FILE: Final = "/dev/termination-log"
TERMINATION_MESSAGE_VARIABLE: Final = "ATTUNE_TERMINATION_MESSAGE_FILE"
TERMINATION_MESSAGE_BYTES: Final = 4096
WORK_DIRECTORY_VARIABLE: Final = "ATTUNE_WORK_DIRECTORY"

# The namespace's store. Keys are absent with workload identity.
STORE_ENDPOINT: Final = "ATTUNE_STORE_ENDPOINT"
STORE_BUCKET: Final = "ATTUNE_STORE_BUCKET"
STORE_REGION: Final = "ATTUNE_STORE_REGION"
STORE_ACCESS_KEY: Final = "ATTUNE_STORE_ACCESS_KEY"
STORE_SECRET_KEY: Final = "ATTUNE_STORE_SECRET_KEY"  # noqa: S105 (a variable's name, no secret)
# Variable -> key inside the Secret. A source's own credentials arrive under ATTUNE_SOURCE_<index>_<suffix>.
STORE_SECRET_KEYS: Final = {
    STORE_ENDPOINT: "endpoint",
    STORE_BUCKET: "bucket",
    STORE_REGION: "region",
    STORE_ACCESS_KEY: "accessKey",
    STORE_SECRET_KEY: "secretKey",
}
STORE_SECRET_REQUIRED: Final = frozenset({STORE_ENDPOINT, STORE_BUCKET})

# A recipe that was told to stop ends itself after this long, whatever it is doing. A container that the kubelet has to
# kill looks like one that ran out of memory, so each pod's grace period is longer.
STOP_SECONDS: Final = 50

# Key of an endpoint's Secret; it is sent as a bearer token.
ENDPOINT_SECRET_KEY: Final = "apiKey"  # noqa: S105 (a key's name, no secret)

# The pod's uid (downward API): fences what an attempt writes.
ATTEMPT_UID: Final = "ATTUNE_ATTEMPT_UID"

# Pods that train together: which of them this is, from 0 (the Job controller says so in every Indexed Job), and where
# the first of them is found.
COMPLETION_INDEX: Final = "JOB_COMPLETION_INDEX"
LEADER_HOST: Final = "ATTUNE_LEADER_HOST"
# On the first of them: where the others report, and where their training processes meet.
GANG_PORT: Final = 9401
TRAINING_PORT: Final = 29500

# GET /progress answers a Progress, GET /metrics Prometheus text. Every recipe listens here while it runs.
PROGRESS_PORT: Final = 9400
SERVE_PORT: Final = 8000

# The inference container: which model it serves and under which names.
SERVE_MODEL_URI: Final = "ATTUNE_MODEL_URI"
SERVE_MODEL_DIGEST: Final = "ATTUNE_MODEL_DIGEST"
SERVE_MODEL_ID: Final = "ATTUNE_MODEL_ID"
SERVE_TRACK: Final = "ATTUNE_TRACK"


def endpoint_variable(index: int) -> str:
    """Names the variable that carries the key of a candidate's endpoint.

    endpoint_variable(1) -> "ATTUNE_ENDPOINT_1_KEY".
    """
    return f"ATTUNE_ENDPOINT_{index}_KEY"


def source_variable(index: int, store_variable: str) -> str:
    """Names the variable that carries one part of a source's own credentials.

    source_variable(2, STORE_ACCESS_KEY) -> "ATTUNE_SOURCE_2_ACCESS_KEY".
    """
    return store_variable.replace("ATTUNE_STORE_", f"ATTUNE_SOURCE_{index}_")


def source_mount(index: int) -> str:
    """Names the folder at which a source's volume is mounted.

    source_mount(2) -> "/sources/2".
    """
    return f"/sources/{index}"
