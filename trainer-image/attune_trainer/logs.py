"""JSON log lines on stdout; nothing that could hold a transcript or a secret."""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Messages of these types name files, modules, shapes and addresses. Others (ValueError, KeyError, UnicodeError,
# pydantic's) quote the value at fault, which may be a transcript: of those only type and place are logged.
_MESSAGE_IS_SAFE = (OSError, RuntimeError, ImportError, AttributeError, TypeError, MemoryError)


def describe_exception(error: BaseException) -> list[str]:
    """Lists an exception's chain as places and types, with messages only of types that quote no values."""
    lines: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        name = f"{type(current).__module__}.{type(current).__qualname__}"
        lines.append(f"{name}: {current}" if isinstance(current, _MESSAGE_IS_SAFE) else name)
        lines.extend(
            f"  {frame.filename}:{frame.lineno} in {frame.name}"
            for frame in traceback.extract_tb(current.__traceback__)
        )
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return lines


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object: time, level, logger, message, and whatever came as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Gives the line without its newline."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = describe_exception(record.exc_info[1])
        return json.dumps(entry, default=str, ensure_ascii=False)


def configure_logging(level: int = logging.INFO) -> None:
    """Sends every log record of the process to stdout as JSON lines."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    # They log every request with its URL.
    for name in ("urllib3", "httpx", "httpcore", "huggingface_hub", "filelock", "matplotlib", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
