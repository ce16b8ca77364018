"""What the example's scripts share: the cache, a progress line, and copies of folders in the store's bucket.

The store is named by the variables that a Job finds too: ATTUNE_STORE_ENDPOINT, ATTUNE_STORE_BUCKET and, where the
store wants them, ATTUNE_STORE_REGION, ATTUNE_STORE_ACCESS_KEY and ATTUNE_STORE_SECRET_KEY.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from attune_trainer.failures import RecipeFailure
from attune_trainer.store import Store, digest_directory

_DIGEST = ".digest"  # written last: it says that everything beside it is there


def cache_folder() -> Path:
    """Names the folder for everything that can be made again: ATTUNE_CACHE, or ~/.cache/attune."""
    return Path(os.environ.get("ATTUNE_CACHE") or Path.home() / ".cache" / "attune")


class ProgressLine:
    """Prints one line that grows over itself on a terminal, and a line every tenth of the way elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        """Begins a line about ``total`` things."""
        self._what, self._total = what, total
        self._began = time.monotonic()
        self._tenth = 0

    def show(self, done: int, remark: str = "") -> None:
        """Says that ``done`` of the total are done."""
        tenth = 10 * done // max(1, self._total)
        terminal = sys.stderr.isatty()
        if not terminal and tenth == self._tenth:
            return
        self._tenth = tenth
        line = f"{self._what}: {done} of {self._total}, {time.monotonic() - self._began:.0f} s {remark}".rstrip()
        end = "\n" if done >= self._total or not terminal else ""
        print(f"\r\033[K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)


def upload(folder: Path, prefix: str) -> str:
    """Copies a folder to a prefix of the store's bucket, unless the same content is there; returns its s3:// address.

    Raises:
        SystemExit: the store is not named, can't be reached or refuses; the message says which.
    """
    prefix = prefix.strip("/")
    began = time.monotonic()
    try:
        store = Store.from_environment()
        digest = digest_directory(folder)
        marker = f"{prefix}/{_DIGEST}"
        if store.exists(marker) and store.read_bytes(marker).decode() == digest:
            print(f"{store.uri(prefix)} holds the same already", file=sys.stderr)
            return store.uri(prefix)
        print(f"uploading {folder.name} to {store.uri(prefix)}", file=sys.stderr, flush=True)
        address = store.upload_directory(folder, prefix)
        store.write_bytes(marker, digest.encode())
    except RecipeFailure as failure:
        raise SystemExit(str(failure)) from failure
    print(f"uploaded in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return address
