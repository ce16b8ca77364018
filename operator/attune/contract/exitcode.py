"""Why a Job's container ended, and what Kubernetes is to do about it."""

from enum import IntEnum, StrEnum
from typing import Final

# Ended by SIGKILL: out of memory, since what evicts or deletes a pod marks it with DisruptionTarget, which comes first.
# The kubelet gives the same code, without that mark, to a container that a crash of its node has swallowed; it says so
# in the reason, which no podFailurePolicy can read.
KILLED: Final = 137
REASON_SWALLOWED: Final = "ContainerStatusUnknown"

_FINDINGS = range(10, 30)


class Disposition(StrEnum):
    """What a podFailurePolicy does with an exit code."""

    FAIL = "FailJob"
    RETRY = "Count"
    FREE = "Ignore"


class ExitCode(IntEnum):
    """The exit status of every recipe; the Job's podFailurePolicy is rendered from this enum.

    Codes from 10 to 29 are findings about the input: trying again gives the same answer. Codes from 30 on are the
    surroundings' fault and are tried again. Two codes cost no retry: 143 (ended by SIGTERM after a checkpoint), and 32,
    of a pod that has lost another one which it trained with: the retry is on whatever ended that one.
    """

    OK = 0
    INTERNAL_ERROR = 1
    INVALID_INPUT = 10
    ACCESS_DENIED = 11
    NOT_FOUND = 12
    OUT_OF_MEMORY = 13
    UNSUPPORTED_MODEL = 14
    DIVERGED = 15
    STORE_UNAVAILABLE = 30
    GANG_INCOMPLETE = 31
    PEER_LOST = 32
    TERMINATED = 143

    @property
    def disposition(self) -> Disposition:
        """What the Job controller does when a container ends with this code."""
        if self in _FINDINGS:
            return Disposition.FAIL
        if self in {ExitCode.PEER_LOST, ExitCode.TERMINATED}:
            return Disposition.FREE
        return Disposition.RETRY

    @property
    def reason(self) -> str:
        """The CamelCase reason for conditions and Events, used where a Job left no better word."""
        return "".join(word.capitalize() for word in self.name.split("_"))
