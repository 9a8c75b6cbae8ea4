# SPDX-License-Identifier: GPL-3.0-only
"""Defines the errors that tcpexporter raises, and the messages for other errors."""

import contextlib
import errno
import reprlib
from collections.abc import Iterator

_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


def quoted(text: str) -> str:
    """Return a text in quotes for a message; the middle of a long text is left out."""
    return _SHORT.repr(str(text))


class TcpExporterError(Exception):
    """An error whose text is one sentence for the operator, with the remedy."""


class SettingsError(TcpExporterError):
    """A setting has an unknown name or a value that cannot be used.

    ``setting`` is the name of a setting if the text does not say where its value was given;
    `config.settings.naming_origins` adds that.
    """

    def __init__(self, sentence: str, *, setting: str | None = None) -> None:
        super().__init__(sentence)
        self.setting = setting


class WebConfigError(SettingsError):
    """The file that --web-config names cannot be used."""


class SourceError(TcpExporterError):
    """A source cannot report connections."""


class LoadError(SourceError):
    """The BPF program cannot be compiled, loaded or attached."""


class TrackerError(SourceError):
    """The kernel refuses an operation on the tracker's maps."""


class SocketTableError(SourceError):
    """The kernel's socket tables cannot be read or decoded."""


class PinError(TcpExporterError):
    """Objects in the BPF file system cannot be adopted or pinned."""


class StateError(TcpExporterError):
    """The file in which ages are saved cannot be used."""


class ServerError(TcpExporterError):
    """The metrics cannot be served, or written."""


class PrivilegeError(TcpExporterError):
    """Privileges cannot be given up."""


class ThreadError(TcpExporterError):
    """The kernel refuses another thread."""


class NativeCodeError(TcpExporterError):
    """Native code in a daemon thread has failed."""


NO_MEMORY = "there is not enough memory: raise the service's limit, or the host's memory"

_REMEDIES = {
    errno.EAGAIN: ": raise the limit of processes and threads: TasksMax= of the unit, the"
    " container's pids limit, or ulimit -u",
    errno.EMFILE: ": raise LimitNOFILE= of the unit, or ulimit -n",
    errno.ENFILE: ": raise the host's fs.file-max",
}


def reason(error: BaseException) -> str:
    """Return one sentence that describes any error, with the remedy if one is known."""
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
    """Raise SourceError if the block runs out of memory: the caller can try it again.

    Raises:
        SourceError: there was not enough memory.
    """
    try:
        yield
    except MemoryError as error:
        raise SourceError(NO_MEMORY) from error
