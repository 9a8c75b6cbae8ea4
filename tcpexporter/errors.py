# SPDX-License-Identifier: GPL-3.0-only
"""Every error that tcpexporter raises on purpose."""

import contextlib
import reprlib
from collections.abc import Iterator

_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def quoted(text: str) -> str:
    """What a user wrote, for a sentence: without its middle where it is long."""
    return _SHORT.repr(str(text))


class TcpExporterError(Exception):
    """What a user is told: one sentence that says what to do about it."""


class SettingsError(TcpExporterError):
    """A setting has an unknown name or a value that cannot be used."""


class WebConfigError(SettingsError):
    """The file that --web-config names cannot be used."""


class SourceError(TcpExporterError):
    """Connections cannot be had from a source."""


class LoadError(SourceError):
    """The BPF program cannot be compiled, loaded or attached."""


class TrackerError(SourceError):
    """The kernel refuses an operation on the tracker's maps."""


class SocketTableError(SourceError):
    """The kernel's socket tables cannot be read, or not understood."""


class PinError(TcpExporterError):
    """What an exporter left in the BPF file system cannot be used, or nothing be left."""


class StateError(TcpExporterError):
    """The file in which ages are saved cannot be used."""


class ServerError(TcpExporterError):
    """The metrics cannot be served, or printed, where that was asked for."""


class PrivilegeError(TcpExporterError):
    """Root cannot be given up as asked."""


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """A block that may be refused memory, and can be tried again.

    Raises:
        SourceError: it was.
    """
    try:
        yield
    except MemoryError as error:
        raise SourceError(
            "there is not enough memory: raise the service's limit, or what the host has"
        ) from error
