# SPDX-License-Identifier: GPL-3.0-only
"""Starts the loader, a child process, and waits for the descriptors that it sends.

The loader compiles the BPF program for a quarter of a second. Its parent can import modules
meanwhile. So this module does not import numpy.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
from pathlib import Path

from tcpexporter.ebpf.loader_protocol import (
    LOAD_TIMEOUT_S,
    SEE_DEBUG,
    Descriptors,
    Request,
    SilentError,
    out_of_memory,
    receive_descriptors,
    send_request,
)
from tcpexporter.errors import LoadError, reason
from tcpexporter.host import children

log = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 0.5
"""Seconds after its answer in which the loader must exit; then it is killed."""

VMSTAT = Path("/proc/vmstat")


def load(request: Request) -> Descriptors:
    """Start the loader, and return the descriptors that it sends; the caller closes them.

    Raises:
        LoadError: the program could not be loaded; the message has the cause and a remedy.
    """
    with contextlib.closing(Loading(request)) as loading:
        return loading.descriptors()


class Loading:
    """A loader that has started. It may attach the program at any time from now on."""

    def __init__(self, request: Request) -> None:
        """Start the loader; `close` ends it.

        Raises:
            LoadError: the process cannot be started.
        """
        self.request = request
        self._oom_kills = _oom_kills()
        with contextlib.ExitStack() as resources:
            try:
                self._channel = self._start(resources)
            except OSError as error:
                raise LoadError(
                    "the process that loads the BPF program cannot be started:"
                    f" {reason(error)}"
                ) from error
            self._resources = resources.pop_all()

    def _start(self, resources: contextlib.ExitStack) -> socket.socket:
        """Start the loader and send the request; return the channel to the loader."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        resources.enter_context(ours)
        with theirs:
            # In memory, because the exporter may lack write access to every directory.
            self._output = os.fdopen(os.memfd_create("output"), "w+b")
            resources.enter_context(self._output)
            self._child = children.start(
                "tcpexporter.ebpf.loader", theirs, output=self._output
            )
        ours.settimeout(LOAD_TIMEOUT_S)
        # If the loader has ended already, `descriptors` says why.
        with contextlib.suppress(ConnectionError):
            send_request(ours, self.request)
        return ours

    def descriptors(self) -> Descriptors:
        """Wait until the program is attached; this can be called once.

        Returns:
            The descriptors that the loader sends, which the caller closes.

        Raises:
            LoadError: the program could not be loaded; the message has the cause and a
                remedy.
        """
        try:
            return receive_descriptors(self._channel)
        except SilentError as error:
            self._wait()
            code = self._child.returncode
            if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
                raise LoadError(out_of_memory(self.request)) from error
            raise LoadError(_cause_of_death(code)) from error
        finally:
            self._wait()
            self._output.seek(0)
            for line in self._output.read().decode(errors="replace").splitlines():
                log.debug("loader: %s", line)

    def _wait(self) -> None:
        """Wait until the loader has exited; kill it if it hangs."""
        try:
            self._child.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def close(self) -> None:
        """Kill the loader if it is running. The kernel frees maps that were not sent."""
        if self._child.poll() is None:
            self._kill()
        self._resources.close()

    def _kill(self) -> None:
        self._child.kill()
        self._child.wait()


def _cause_of_death(code: int) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the process that loads the BPF program died ({how}), {SEE_DEBUG}"


def _oom_kills() -> int:
    """Return how many processes of the host the kernel has killed for lack of memory."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
