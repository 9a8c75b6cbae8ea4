# SPDX-License-Identifier: GPL-3.0-only
"""Entry point of the command: exit codes and signals."""

import logging
import os
import resource
import signal
import sys
from functools import partial
from types import FrameType

from tcpexporter import startup
from tcpexporter.config.reload import ReloadSignal
from tcpexporter.errors import ServerError, SettingsError, reason
from tcpexporter.host import daemon_threads, logs, malloc, stderr
from tcpexporter.host.systemd import Supervisor

log = logging.getLogger("tcpexporter")

LAST_STANDARD_STREAM = 2

LEAST_DESCRIPTORS = 64
"""File descriptors that start-up and a few clients require; start-up alone requires 24."""


def main() -> None:
    """Run until a signal arrives; exit with 0, 1 (failure) or 2 (invalid setting)."""
    _restore_default_signals()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    _open_standard_streams()
    errors = stderr.replace()
    reload_signal = ReloadSignal()
    reload_signal.catch()
    malloc.limit_arenas()
    supervisor = Supervisor.of(os.environ)
    try:
        _require_descriptors()
        startup.run(
            startup.Process(sys.argv[1:], os.environ, supervisor, reload_signal, errors),
            partial(logs.set_up, to_journal=logs.is_journal(os.environ)),
        )
    except SettingsError as error:
        sys.exit(_report_failure(error, 2, supervisor))
    except Exception as error:
        log.debug("the exporter has failed", exc_info=error)
        sys.exit(_report_failure(error, 1, supervisor))
    daemon_threads.exit_if_running(0)


def _restore_default_signals() -> None:
    """Handle SIGCHLD and SIGTERM, even if the parent process ignored or blocked them.

    If SIGCHLD is ignored, the kernel does not report how a child process ended. If SIGTERM
    is blocked, it does not end the exporter.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _require_descriptors() -> None:
    """Raise the soft limit of open files if it is too low.

    Raises:
        ServerError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= LEAST_DESCRIPTORS:
        return
    if hard < LEAST_DESCRIPTORS:
        raise ServerError(
            f"the limit of open files is {hard}, and at least {LEAST_DESCRIPTORS} are"
            " required: raise LimitNOFILE in the unit, or ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open_standard_streams() -> None:
    """Open /dev/null as each standard stream that the parent process has closed.

    Otherwise a socket or a BPF map could get descriptor 1 or 2, and Python would write its
    output to that object.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= LAST_STANDARD_STREAM:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _stop(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _report_failure(error: Exception, code: int, supervisor: Supervisor) -> int:
    supervisor.tell(f"STATUS={reason(error)}")
    sentence = f"tcpexporter: {reason(error)}"
    if logs.is_journal(os.environ):
        sentence = logs.with_priority(sentence, logging.ERROR)
    sys.stderr.write(f"{sentence}\n")
    daemon_threads.exit_if_running(code)
    return code


if __name__ == "__main__":
    main()
