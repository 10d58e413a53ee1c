"""One log format for console and jobs: UTC time, level when it matters, message."""

from __future__ import annotations

import logging
import sys
import time


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def configure(*, stamped: bool) -> None:
    """Send the project's log to stderr, with a UTC time on every line if `stamped`."""
    handler = logging.StreamHandler(sys.stderr)
    layout = "%(asctime)s %(message)s" if stamped else "%(message)s"
    formatter = _Format(layout, "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def duration(seconds: float) -> str:
    """`42s`, `3m05s` or `2h07m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
