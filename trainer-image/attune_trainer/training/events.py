"""What training processes tell the Job's own process: JSON lines through a named pipe.

The pipe also ties their lives together: when the Job's process dies, the next event fails with EPIPE and training ends.
"""

import json
import os
import select
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from attune_trainer.failures import RecipeFailure

_LINE_BYTES: Final = 4096  # POSIX writes no more than PIPE_BUF bytes as one; Linux has 4096
_MESSAGE_BYTES: Final = 3072


class EventWriter:
    """Writes events; several processes may write to one pipe."""

    def __init__(self, pipe: Path) -> None:
        self._file = os.open(pipe, os.O_WRONLY)

    def send(self, kind: str, **fields: Any) -> None:
        """Sends one event.

        Raises:
            ValueError: when it is longer than a pipe keeps in one piece.
            BrokenPipeError: when nobody listens any more.
        """
        line = json.dumps({"kind": kind, **fields}).encode() + b"\n"
        if len(line) > _LINE_BYTES:
            raise ValueError(f"an event of {len(line)} bytes; {_LINE_BYTES} are kept in one piece")
        os.write(self._file, line)

    def send_failure(self, failure: RecipeFailure) -> None:
        """Sends why a run failed; of a message that is too long, as much as there is room for."""
        message = _cut(failure.message, _MESSAGE_BYTES)
        self.send("failed", code=int(failure.code), reason=failure.reason, message=message)


def _cut(text: str, room: int) -> str:
    """Gives the longest beginning of whole characters that takes at most so many bytes in JSON.

    _cut("aé", 7) -> "aé", because "é" is written in six; _cut("aé", 6) -> "a".
    """
    ends = accumulate(len(json.dumps(character)) - 2 for character in text)
    return text[: sum(end <= room for end in ends)]


class EventReader:
    """Creates the pipe and reads events from it."""

    def __init__(self, pipe: Path) -> None:
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe, 0o600)
        # Open for writing as well, or the pipe would be at its end whenever no process has it open.
        self._file = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
        self._rest = b""

    def poll(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Yields the events that are there, after waiting at most this long for the first."""
        if not select.select([self._file], [], [], seconds)[0]:
            return
        try:
            data = os.read(self._file, 1 << 16)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def close(self) -> None:
        """Closes the pipe."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
