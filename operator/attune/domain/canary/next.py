"""What a decision on a Canary comes to, before it is told: what comes next, or the Problem that stands against it."""

from dataclasses import dataclass
from typing import Final

from attune.domain.actions import CanaryAction, RolloutRecord
from attune.domain.jobs import Standing
from attune.domain.verdict import Judgement

SOON_SECONDS: Final = 2.0  # until what was asked for can be seen
WAIT_SECONDS: Final = 15.0  # until others may have done their part
MESSAGE_CHARACTERS: Final = 512  # of a message that is kept


@dataclass(frozen=True)
class Problem:
    """Why something that is wanted can't be done. waits: it will be possible without anybody's help."""

    reason: str
    message: str
    waits: bool = False


@dataclass(frozen=True)
class Next:
    """What comes next, before it is told in a status."""

    actions: tuple[CanaryAction, ...]
    standing: Standing
    weight: int  # of the canary, in percent, after the actions
    record: RolloutRecord | None = None
    judgement: Judgement | None = None
    look_again_seconds: float | None = None
