# SPDX-License-Identifier: GPL-3.0-only
"""Every error that tcpexporter raises on purpose."""

import contextlib
import errno
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


class ThreadError(TcpExporterError):
    """The kernel refuses another thread."""


class NativeCodeError(TcpExporterError):
    """Work of another language has failed."""


NO_MEMORY = "there is not enough memory: raise the service's limit, or what the host has"

_REMEDIES = {
    errno.EAGAIN: ": raise the limit of processes and threads: TasksMax= of the unit, the"
    " container's pids limit, or ulimit -u",
    errno.EMFILE: ": raise LimitNOFILE= of the unit, or ulimit -n",
    errno.ENFILE: ": raise the host's fs.file-max",
}


def reason(error: BaseException) -> str:
    """A sentence for an error, whatever raised it, with a remedy where one is known."""
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"no thread can be started{_REMEDIES[errno.EAGAIN]}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}{_REMEDIES.get(error.errno, '')}"
    if isinstance(error, TcpExporterError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """A block that may be refused memory, and can be tried again.

    Raises:
        SourceError: it was.
    """
    try:
        yield
    except MemoryError as error:
        raise SourceError(NO_MEMORY) from error
