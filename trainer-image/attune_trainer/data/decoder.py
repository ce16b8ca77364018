"""Decoding in processes of their own: whatever a file does to a decoder, the Job and its other files go on.

A decoder process has no credentials in its environment, limits on memory and open files, and a time for each file. It
reads a request a line on its standard input and answers on its standard output, each span as a line of JSON followed by
the bytes of its samples.
"""

import contextlib
import json
import os
import queue
import resource
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import numpy as np

from attune_trainer.data.audio import Bounds, Cut, Span, cut_spans

FILE_SECONDS: Final = 900.0  # of the clock, for one file
_MEMORY_BYTES: Final = 4 * 1024**3  # of address space, most of it the libraries'
_OPEN_FILES: Final = 64
_KEPT_VARIABLES: Final = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "LANG", "PYTHONDONTWRITEBYTECODE")


class Decoders:
    """Decoder processes, started when they are first needed; safe to use from any thread."""

    def __init__(self, count: int, file_seconds: float = FILE_SECONDS) -> None:
        """Starts nothing yet.

        Args:
            count: processes, at most.
            file_seconds: time that one file may take; what is left of it then is rejected.
        """
        self._file_seconds = file_seconds
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        self._count = count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; nobody may be decoding."""
        for _ in range(self._count):
            process = self._idle.get()
            if process is not None:
                _kill(process)

    def cut_spans(self, path: Path, spans: Sequence[Span], bounds: Bounds) -> Generator[Cut, None, None]:
        """Does what audio.cut_spans does, in a process that may fail. Close it where you do not take all.

        A file that takes too long, or ends the process, gets DecodingTimedOut or DecoderFailed for what is left of it.
        """
        process = _revive(self._idle.get())
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(self._file_seconds, end)
        timer.daemon = True
        timer.start()
        left = set(range(len(spans)))
        whole = False
        try:
            for cut in _ask(process, path, spans, bounds):
                left.discard(cut.index)
                yield cut
            whole = not left
        finally:
            timer.cancel()
            usable = whole and not timed_out.is_set()
            if not usable:
                _kill(process)
            self._idle.put(process if usable else None)
        reason = "DecodingTimedOut" if timed_out.is_set() else "DecoderFailed"
        for index in sorted(left):
            yield Cut(index, reason=reason)


def _revive(process: "subprocess.Popen[bytes] | None") -> "subprocess.Popen[bytes]":
    """Gives a process that is there, in place of one that was never started or has ended since."""
    if process is not None and process.poll() is None:
        return process
    if process is not None:
        _kill(process)
    return _start()


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # Where the package was found may be a matter of sys.path alone.
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "attune_trainer.data.decoder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


def _ask(process: subprocess.Popen[bytes], path: Path, spans: Sequence[Span], bounds: Bounds) -> Iterator[Cut]:
    """Sends a request and yields the answers; ends early where the process does."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("a decoder process needs pipes")
    request = {"path": str(path), "bounds": asdict(bounds), "spans": [asdict(span) for span in spans]}
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        for _ in spans:
            line = process.stdout.readline()
            if not line.endswith(b"\n"):
                return
            answer = json.loads(line)
            size = 2 * int(answer["samples"])
            raw = process.stdout.read(size)
            if len(raw) < size:
                return
            samples = np.frombuffer(raw, dtype="<i2").astype(np.int16) if size else None
            yield Cut(int(answer["index"]), samples, float(answer["clipped"]), answer["reason"])
    except (OSError, ValueError):
        return


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more."""
    for line in requests:
        request: dict[str, Any] = json.loads(line)
        spans = [Span(**one) for one in request["spans"]]
        for cut in cut_spans(Path(request["path"]), spans, Bounds(**request["bounds"])):
            raw = cut.samples.astype("<i2", copy=False).tobytes() if cut.samples is not None else b""
            head = {"index": cut.index, "samples": len(raw) // 2, "clipped": cut.clipped, "reason": cut.reason}
            answers.write(json.dumps(head).encode() + b"\n" + raw)
        answers.flush()


def main() -> None:
    """Takes its limits and serves its standard input and output, which no library can write into."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
