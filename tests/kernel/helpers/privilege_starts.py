# SPDX-License-Identifier: GPL-3.0-only
"""Gives up root in child processes that start in many ways, and reports the outcomes.

As a module it reads a case from each line of JSON, and writes an outcome as a line. It has
few imports, because fork(2) requires more time in a process with more memory.
"""

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tcpexporter.ebpf.libbpf import create_map
from tcpexporter.errors import SourceError, TcpExporterError
from tcpexporter.host import libc, privileges

NOBODY = 65534

# include/uapi/linux/prctl.h
PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT_RAISE = 2

BPF_MAP_TYPE_STACK = 23
"""Every kernel refuses to create such a map without CAP_BPF or CAP_SYS_ADMIN."""

SHOWN = (
    *("Uid", "Gid", "Groups", "NoNewPrivs"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
)


@dataclass(frozen=True)
class Case:
    """The user, the capabilities and the role with which a process starts."""

    uids: Sequence[int] = (0, 0, 0)
    """Real, effective and saved user id. If the real one is 0, the process has root's
    groups."""
    holds: Sequence[int] = ()
    """Capabilities in the permitted set and in the bounding set."""
    mode: str = "effective"
    """One of ``effective``, ``ambient``, or ``idle`` (permitted, but not effective)."""
    no_new_privs: bool = False
    securebits: int = 0
    reads: bool = False
    """Whether the process is the reader process; otherwise it is the serving process."""
    needs_bpf: bool = False
    """Whether it requires CAP_BPF or CAP_SYS_ADMIN later, as maps do before Linux 5.19."""
    refused: str = ""
    """A system call that a seccomp filter answers without executing it; empty for none.
    For prctl the filter only applies to no_new_privs. Loading the filter requires
    CAP_SYS_ADMIN."""
    answer: int = errno.EPERM
    """The answer of the filter: an error number, or 0 for success."""


@dataclass(frozen=True)
class Outcome:
    """The privileges of a process before and after, its warnings, and its error."""

    before: dict[str, list[str]]
    """Fields of /proc/self/status at the start."""
    after: dict[str, list[str]]
    warnings: list[str]
    refusal: str | None
    """The error with which the process ends; None if it does not end."""


def _main() -> None:
    for line in sys.stdin:
        case = Case(**json.loads(line))
        if os.fork() == 0:
            try:
                outcome = _outcome(case)
                sys.stdout.write(f"{json.dumps(asdict(outcome))}\n")
                sys.stdout.flush()
            except BaseException as error:
                sys.stderr.write(f"{case}: {error!r}\n")
                raise
            finally:
                os._exit(0)
        os.wait()


def _outcome(case: Case) -> Outcome:
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    _enter(case)
    before = _status()
    account = privileges.find_user("nobody") if privileges.is_root() else None
    refusal = None
    try:
        if case.reads:
            privileges.keep_reading(account)
        else:
            privileges.drop(account, _make_map if case.needs_bpf else lambda: None)
    except TcpExporterError as error:
        refusal = str(error)
    return Outcome(before, _status(), warnings, refusal)


def _status() -> dict[str, list[str]]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.partition(":") for line in lines)
    return {name: value.split() for name, _, value in fields if name in SHOWN}


def _make_map() -> None:
    try:
        os.close(create_map(BPF_MAP_TYPE_STACK, 0, 4))
    except OSError as error:
        raise SourceError("cannot make a map") from error


def _enter(case: Case) -> None:
    libc.prctl(privileges.PR_SET_KEEPCAPS, 1)
    is_root = case.uids[0] == 0
    os.setgroups([0, 27] if is_root else [])
    os.setresgid(*[0 if is_root else NOBODY] * 3)
    os.setresuid(*case.uids)
    permitted = privileges.read_status().permitted
    libc.capset(permitted, permitted, 0)
    libc.prctl(PR_SET_SECUREBITS, case.securebits)
    for each in range(64):
        if each not in case.holds:
            with contextlib.suppress(OSError):  # this kernel knows fewer capabilities
                libc.prctl(privileges.PR_CAPBSET_DROP, each)
    held = sum(1 << each for each in case.holds)
    is_ambient = case.mode == "ambient"
    effective = 0 if case.mode == "idle" else held
    libc.capset(effective, held, held if is_ambient else 0)
    for each in case.holds if is_ambient else ():
        libc.prctl(privileges.PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, each)
    if case.no_new_privs:
        libc.prctl(privileges.PR_SET_NO_NEW_PRIVS, 1)
    if case.refused:
        _refuse(case.refused, case.answer)


def _refuse(name: str, answer: int) -> None:
    import pyseccomp  # noqa: PLC0415  most cases do not require it

    made = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    made.set_attr(pyseccomp.Attr.CTL_NNP, 0)
    conditions = []
    if name == "prctl":
        set_no_new_privs = privileges.PR_SET_NO_NEW_PRIVS
        conditions.append(pyseccomp.Arg(0, pyseccomp.EQ, set_no_new_privs))
    made.add_rule(pyseccomp.ERRNO(answer), name, *conditions)
    made.load()


if __name__ == "__main__":
    _main()
