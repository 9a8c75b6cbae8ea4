# SPDX-License-Identifier: GPL-3.0-only
"""Formats log lines: as text, for systemd's journal, or as JSON."""

import logging
import os
from collections.abc import Mapping

from tcpexporter.host.stderr import DESCRIPTOR

PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
"""Severities of syslog(3), by level."""


class JournalFormatter(logging.Formatter):
    """Begins each line with its severity: sd-daemon(3). The journal adds the time."""

    def __init__(self) -> None:
        """Format the name of the logger and the message."""
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return with_priority(super().format(record), record.levelno)


def with_priority(text: str, level: int) -> str:
    """Return the text with the severity of a level at the beginning of each line."""
    prefix = f"<{PRIORITIES[level]}>"
    return prefix + text.replace("\n", f"\n{prefix}")


def is_journal(environ: Mapping[str, str]) -> bool:
    """Return whether standard error is connected to systemd's journal.

    systemd sets JOURNAL_STREAM to the device and inode of that stream: systemd.exec(5). A
    process that redirects its standard error keeps the variable.
    """
    try:
        status = os.fstat(DESCRIPTOR)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: str, log_format: str, *, to_journal: bool) -> None:
    """Log lines of this level and above to standard error.

    Args:
        level: debug, info, warning or error.
        log_format: text or json.
        to_journal: whether the text is for systemd's journal.
    """
    # If the disk is full, logging must not print a traceback for each lost line.
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(log_format, to_journal=to_journal))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _formatter(log_format: str, *, to_journal: bool) -> logging.Formatter:
    if log_format == "json":
        # Imported only when it is used: it uses 0.2 MiB of memory.
        from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415

        return JsonFormatter(
            "%(levelname)s %(name)s %(message)s",
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp="time",
        )
    if to_journal:
        return JournalFormatter()
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
