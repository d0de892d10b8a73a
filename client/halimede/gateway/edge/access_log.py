"""The access log: one line of JSON on stdout for each request. It never contains a text."""

from __future__ import annotations

import datetime
import logging
import os
import sys
from typing import Any

import orjson

OFF = "HALIMEDE_GATEWAY_NO_ACCESS_LOG"
"""Variable by which workers know that they write no access log."""
log = logging.getLogger("halimede.gateway")


class _Lines(logging.Formatter):
    """Requests as they are, and warnings of the gateway as JSON, too."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno == logging.INFO:
            return str(record.msg)
        warning = {"time": _now(), "level": record.levelname, "message": record.getMessage()}
        return orjson.dumps(warning).decode()


def start() -> None:
    """Write the access log to stdout, unless it is off."""
    if os.environ.get(OFF) or log.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def is_on() -> bool:
    """Return whether anybody reads the access log."""
    return log.isEnabledFor(logging.INFO)


def write(entry: dict[str, Any]) -> None:
    """Write a line; facts that are None or empty are left out."""
    known = {name: value for name, value in entry.items() if value is not None and value != ""}
    log.info(orjson.dumps({"time": _now(), **known}).decode())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
