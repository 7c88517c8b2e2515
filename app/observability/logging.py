"""Structured logs: for people on a terminal, JSON lines otherwise. Prompts, answers and keys are never logged."""

from __future__ import annotations

import contextvars
import datetime as dt
import logging
import re
import sys
from typing import IO, Any, Literal

import msgspec

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_COLOURS = {
    logging.DEBUG: "2",
    logging.INFO: "32",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "1;31",
}
_LEVEL_WIDTH = 7


def configure(log_format: Literal["auto", "human", "json"], level: str, stream: IO[str] | None = None) -> None:
    """Send all logs of this level and above to standard error, or to `stream`; replaces what was set before."""
    stream = stream or sys.stderr
    terminal = stream.isatty()
    handler = logging.StreamHandler(stream)
    if log_format == "json" or (log_format == "auto" and not terminal):
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(HumanFormatter(colours=terminal))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module. Fields go in `extra`: `log.info("loaded", extra={"seconds": 1.2})`."""
    return logging.getLogger(name)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, then the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line of JSON."""
        line: dict[str, Any] = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identifier := request_id.get():
            line["request_id"] = identifier
        line.update(_fields(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class HumanFormatter(logging.Formatter):
    """`10:41:02.123 info    message  field=value`, coloured on a terminal; control characters are escaped."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, a traceback below it."""
        fields = _fields(record)
        if identifier := request_id.get():
            fields.setdefault("request_id", identifier)
        level = record.levelname.lower().ljust(_LEVEL_WIDTH)
        details = "".join(f" {name}={value}" for name, value in fields.items())
        message = _escape(record.getMessage())
        time = _time(record).astimezone().strftime("%H:%M:%S.%f")[:-3]
        if self._colours:
            level = f"\x1b[{_COLOURS.get(record.levelno, '0')}m{level}\x1b[0m"
            details = f"\x1b[2m{_escape(details)}\x1b[0m" if details else ""
        else:
            details = _escape(details)
        line = f"{time} {level} {message}{' ' if details else ''}{details}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}


def _time(record: logging.LogRecord) -> dt.datetime:
    return dt.datetime.fromtimestamp(record.created, dt.UTC)


def _escape(text: str) -> str:
    """Make control characters visible, so that no logged value can fake a line or drive the terminal."""
    return _CONTROL_CHARACTERS.sub(lambda match: match.group().encode("unicode_escape").decode(), text)
