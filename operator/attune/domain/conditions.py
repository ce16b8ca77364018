"""Conditions after kstatus: one terminal condition, plus Reconciling and Stalled, all set on the first visit."""

from collections.abc import Iterable
from typing import Literal

from attune.api.meta import Condition

RECONCILING = "Reconciling"
STALLED = "Stalled"

State = Literal["True", "False", "Unknown"]


def find_condition(conditions: Iterable[Condition], kind: str) -> Condition | None:
    """Gives the condition of a type; None before it was first written."""
    return next((one for one in conditions if one.type == kind), None)


def decide_conditions(
    previous: Iterable[Condition],
    *,
    terminal: str,
    state: State,
    reason: str,
    message: str,
    working: bool,
    stalled: bool,
    generation: int,
    now: str,
) -> list[Condition]:
    """Decides all three conditions at once; a transition time changes only where the status of a condition does.

    terminal is Ready or Succeeded. working: the operator is on its way and needs nobody. stalled: only a person can
    help. now is RFC 3339 in UTC.

    kstatus, Argo CD and `kubectl wait` are to agree, so exactly one of the three is True:
    - What is neither there nor stalled is Reconciling, even where it only waits (suspended): kstatus knows no condition
      Succeeded, and would take a resource that is neither Reconciling nor Stalled for finished.
    - What is still being worked on is not there yet: with state True and working, the terminal condition is Unknown (a
      Canary in a rollout serves, but whether it will be as wanted nobody knows).
    """
    if stalled and (working or state == "True"):
        raise ValueError("stalled excludes working and True")
    if working and state == "True":
        state = "Unknown"
    reconciling = working or (state != "True" and not stalled)
    before = {condition.type: condition for condition in previous}

    def condition(kind: str, value: State, because: str, text: str) -> Condition:
        old = before.get(kind)
        since = old.last_transition_time if old is not None and old.status == value else now
        return Condition(
            type=kind,
            status=value,
            reason=because,
            message=text,
            last_transition_time=since,
            observed_generation=generation,
        )

    return [
        condition(terminal, state, reason, message),
        condition(
            RECONCILING,
            "True" if reconciling else "False",
            reason if reconciling else "Settled",
            message if reconciling else "",
        ),
        condition(
            STALLED, "True" if stalled else "False", reason if stalled else "NotStalled", message if stalled else ""
        ),
    ]
