"""One JSON object a line on standard error, control characters escaped by JSON itself, secrets taken out."""

from __future__ import annotations

import logging
import re
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType

import orjson

# No line of ours should hold one. If one does all the same (a library logs the URL it could not reach), it is masked.
_SECRETS = (
    (re.compile(r"\bhr-[A-Za-z0-9_-]{20,}"), "hr-***"),
    (re.compile(r"(?<=://)([^\s:/@]{0,100}):[^\s/@]{1,200}@"), r"\1:***@"),
)


class JsonLines(logging.Formatter):
    """Time, level, logger, process and message, and the traceback if there is one."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": _clean(record.getMessage()),
        }
        if record.exc_info:
            fields["exception"] = _clean(self.formatException(record.exc_info))
        return orjson.dumps(fields).decode()


def _clean(text: str) -> str:
    """Without secrets, and without half characters, which JSON cannot hold."""
    for pattern, mask in _SECRETS:
        text = pattern.sub(mask, text)
    return text.encode(errors="replace").decode()


def set_up_logging(process: str, level: int = logging.INFO) -> None:
    """All that this process says goes to standard error as JSON lines: warnings, and what ends it or a thread, too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _log_death
    threading.excepthook = _log_thread_death


def _log_death(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger(__name__).critical("the process ends", exc_info=(kind, error, trace))


def _log_thread_death(death: threading.ExceptHookArgs) -> None:
    if death.exc_value is not None and not issubclass(death.exc_type, SystemExit):
        name = death.thread.name if death.thread else "?"
        exc_info = (death.exc_type, death.exc_value, death.exc_traceback)
        logging.getLogger(__name__).error("the thread %s ended", name, exc_info=exc_info)
