"""Says what each long step does, how far it is, and how long it took."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TICK_SECONDS = 10.0

_lock = threading.Lock()


def say(line: str) -> None:
    """Print one line, whole, whichever thread says it."""
    with _lock:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def seconds(elapsed: float) -> str:
    """A duration as people read it: 4.2 -> "4.2 s", 75 -> "1 min 15 s"."""
    minutes, rest = divmod(round(elapsed), 60)
    if not minutes:
        return f"{elapsed:.1f} s"
    return f"{minutes} min {rest:02d} s"


class Step:
    """One step under way; `at` says how far it is."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.position = ""
        self.started = time.monotonic()

    def at(self, position: str) -> None:
        """Note how far the step is, for the next line that is printed about it."""
        self.position = position

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.started


@contextmanager
def step(title: str) -> Iterator[Step]:
    """Announce a step, report on it while it lasts, and say how long it took or that it failed."""
    current = Step(title)
    done = threading.Event()

    def tick() -> None:
        while not done.wait(TICK_SECONDS):
            position = f": {current.position}" if current.position else ""
            say(f"     ... {title}{position} ({seconds(current.elapsed)})")

    say(f"  -> {title}")
    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield current
    except BaseException:
        say(f"  !! {title}: failed after {seconds(current.elapsed)}")
        raise
    else:
        say(f"  ok {title} ({seconds(current.elapsed)})")
    finally:
        done.set()
        ticker.join()
