"""Which transitions a person should hear of."""

from collections.abc import Iterable
from typing import Literal

from attune.api.meta import Condition
from attune.domain.actions import EmitEvent
from attune.domain.conditions import find_condition


def decide_events(
    before: Iterable[Condition], after: Iterable[Condition], *, terminal: str, kind: Literal["Normal", "Warning"]
) -> tuple[EmitEvent, ...]:
    """Announces the terminal condition's reason when it is new; a Warning also when its message is new.

    A pass in which nothing changes announces nothing, so a re-sync writes no Event.
    """
    old = find_condition(before, terminal)
    new = next(one for one in after if one.type == terminal)
    same = old is not None and old.reason == new.reason and (kind == "Normal" or old.message == new.message)
    if same:
        return ()
    return (EmitEvent(type=kind, reason=new.reason, message=new.message),)
