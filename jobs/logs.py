"""One JSON object a line on standard error, control characters escaped by JSON itself."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import orjson


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
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(fields).decode()


def set_up_logging(process: str, level: int = logging.INFO) -> None:
    """Everything this process logs goes to standard error as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)
