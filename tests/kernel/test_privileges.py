# SPDX-License-Identifier: GPL-3.0-only
"""Privileges are dropped in every kind of start, and warnings list exactly what remains."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import pytest

from tcpexporter.host import privileges
from tcpexporter.host.privileges import (
    CAP_BPF,
    CAP_DAC_READ_SEARCH,
    CAP_PERFMON,
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    CAP_SYS_ADMIN,
)
from tests.kernel.helpers.privilege_starts import NOBODY, Case, Outcome
from tests.support import DEADLINE_S

pytestmark = pytest.mark.any_kernel

ROOT = (0, 0, 0)
MIXED = (0, NOBODY, 0)
UNPRIVILEGED = (NOBODY, NOBODY, NOBODY)

FOR_IDS = (CAP_SETUID, CAP_SETGID, CAP_SETPCAP)
FOR_BPF = (CAP_BPF, CAP_PERFMON)
DANGEROUS = (1, CAP_SYS_ADMIN, 19)
"""CAP_DAC_OVERRIDE, CAP_SYS_ADMIN, CAP_SYS_PTRACE."""

# include/uapi/linux/securebits.h; each value includes the lock bit
NOROOT = 0b11
NO_SETUID_FIXUP = 0b11 << 2
KEEP_CAPS = 0b11 << 4
NO_KEEP_CAPS = 0b10 << 4
SECUREBITS = (0, NOROOT, NO_SETUID_FIXUP, KEEP_CAPS, NO_KEEP_CAPS)


def outcomes(cases: Sequence[Case]) -> Iterator[tuple[Case, Outcome]]:
    """Run each case in a child process, and yield it with its outcome."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel.helpers.privilege_starts"],
        input="".join(f"{json.dumps(asdict(each))}\n" for each in cases),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    lines = done.stdout.splitlines()
    for case, line in zip(cases, lines, strict=True):
        yield case, Outcome(**json.loads(line))


def subsets(capabilities: Sequence[int]) -> list[tuple[int, ...]]:
    return [
        chosen
        for size in range(len(capabilities) + 1)
        for chosen in itertools.combinations(capabilities, size)
    ]


def capabilities(shown: dict[str, list[str]], name: str) -> int:
    return int(shown[name][0], 16)


def bits(held: Sequence[int]) -> int:
    return sum(1 << each for each in held)


def assert_given_up(case: Case, outcome: Outcome, kept: int = 0) -> None:
    """Check that every privilege that can be dropped is dropped, and a warning lists the
    rest."""
    after = outcome.after
    assert outcome.refusal is None
    for name, expected in {
        "CapPrm": kept,
        "CapEff": kept,
        "CapInh": 0,
        "CapAmb": 0,
    }.items():
        assert capabilities(after, name) == expected, name
    assert after["NoNewPrivs"] == ["1"]
    has_bounding = CAP_SETPCAP not in case.holds and bool(case.holds)
    assert capabilities(after, "CapBnd") == has_bounding * bits(case.holds)
    is_root = 0 in case.uids
    # Without the capability a process can only switch to an id that it already has.
    is_kept_uid = is_root and not (CAP_SETUID in case.holds or NOBODY in case.uids)
    is_kept_gid = is_root and CAP_SETGID not in case.holds
    assert after["Uid"] == ["0" if is_kept_uid else str(NOBODY)] * 4
    assert after["Gid"] == ["0" if is_kept_gid else str(NOBODY)] * 4
    assert after["Groups"] == (["0", "27"] if is_kept_gid else [])
    expected_words = {
        "user 0 (CAP_SETUID is missing)": is_kept_uid,
        "group 0, 27 (CAP_SETGID is missing)": is_kept_gid,
        "in the bounding set, useless by no_new_privs (CAP_SETPCAP is missing)": (
            is_root and has_bounding
        ),
    }
    (warning,) = outcome.warnings or [""]
    for words, is_expected in expected_words.items():
        assert (words in warning) == is_expected, warning
    assert bool(warning) == any(expected_words.values())
    missing = [
        each for each in FOR_IDS if f"{privileges.names(1 << each)} is missing" in warning
    ]
    if warning:
        lacking = privileges.names(bits(sorted(missing)))
        assert f"start the exporter with {lacking} as well" in warning


def test_every_privilege_that_can_be_dropped_is_dropped() -> None:
    """If a step is refused the start continues; a warning has the missing capability and
    what remains.

    The kind of fault: dropping one privilege requires another one, which a container may
    lack. The cases are combinations of these: root or not; each capability that a step
    requires, or not; effective, ambient or permitted; no_new_privs or not; each of the
    securebits.
    """
    starts = itertools.product(
        (ROOT, UNPRIVILEGED, MIXED),
        subsets(FOR_IDS),
        ((), FOR_BPF, DANGEROUS),
        ("effective", "ambient", "idle"),
    )
    # The cycles have lengths without a common factor, so every combination occurs.
    locked = itertools.cycle(SECUREBITS)
    no_new_privs = itertools.cycle([False, True, True, False, True, False, False])
    cases = [
        Case(uids, (*for_ids, *others), mode, next(no_new_privs), next(locked))
        for uids, for_ids, others, mode in starts
    ]
    for case, outcome in outcomes(cases):
        assert_given_up(case, outcome)


def test_the_reader_process_keeps_one_capability() -> None:
    """It keeps CAP_DAC_READ_SEARCH. If it cannot, it stays root without capabilities.

    It logs no warning, because the serving process lacks the same capabilities and warns.
    """
    held = subsets((CAP_DAC_READ_SEARCH, CAP_SETUID, CAP_SETPCAP))
    cases = [
        Case(uids, holds, securebits=securebits, reads=True)
        for uids, holds, securebits in itertools.product(
            (ROOT, UNPRIVILEGED), held, (0, NO_SETUID_FIXUP, NO_KEEP_CAPS)
        )
    ]
    for case, outcome in outcomes(cases):
        keeps = CAP_DAC_READ_SEARCH in case.holds
        keeps &= case.uids == UNPRIVILEGED or case.securebits != NO_KEEP_CAPS
        after = outcome.after
        assert outcome.refusal is None
        assert outcome.warnings == []
        for name in ("CapPrm", "CapEff"):
            assert capabilities(after, name) == keeps << CAP_DAC_READ_SEARCH
        for name in ("CapInh", "CapAmb"):
            assert capabilities(after, name) == 0
        assert after["NoNewPrivs"] == ["1"]
        becomes_nobody = case.uids == UNPRIVILEGED or (keeps and CAP_SETUID in case.holds)
        assert after["Uid"] == [str(NOBODY) if becomes_nobody else "0"] * 4
        if CAP_SETPCAP in case.holds:
            assert capabilities(after, "CapBnd") == 0


def test_cap_bpf_is_kept_only_if_required() -> None:
    """CAP_BPF is kept and this is logged, if reading maps requires it.

    If it cannot be kept, or if only CAP_SYS_ADMIN would help, the start ends with one
    sentence. The kind of fault: the error has another reason than the failed attempt. The
    object here requires CAP_BPF or CAP_SYS_ADMIN on every kernel.
    """
    cases = [
        Case(uids, holds, securebits=securebits, needs_bpf=True)
        for uids in (ROOT, UNPRIVILEGED)
        for holds in (FOR_BPF, (*FOR_IDS, *FOR_BPF), (*FOR_IDS, CAP_SYS_ADMIN), FOR_IDS)
        for securebits in (0, NO_KEEP_CAPS)
    ]
    for case, outcome in outcomes(cases):
        is_lost = case.securebits and case.uids == ROOT and CAP_SETUID in case.holds
        if CAP_BPF in case.holds and not is_lost:
            warning, *others = outcome.warnings
            assert (
                warning
                == "keeping CAP_BPF, which this kernel requires for reading a BPF map"
            )
            expected = Outcome(outcome.before, outcome.after, others, outcome.refusal)
            assert_given_up(case, expected, kept=1 << CAP_BPF)
            continue
        assert outcome.warnings == []
        assert outcome.refusal
        if case.holds == FOR_IDS:  # access failed before the drop too
            assert outcome.refusal == "cannot make a map"
        else:
            assert "CAP_BPF" in outcome.refusal
            assert "start with CAP_BPF and CAP_PERFMON" in outcome.refusal


@pytest.mark.parametrize("answer", [1, 0])
def test_a_dangerous_privilege_that_remains_ends_the_start(answer: int) -> None:
    """A seccomp filter refuses the system call, or returns success without executing it.

    The kind of fault: the exporter trusts the result of a system call, and does not check
    the privileges afterwards.
    """
    dangerous = (*FOR_BPF, *DANGEROUS)
    cases = [
        Case(ROOT, dangerous, refused="capset", answer=answer),
        Case(UNPRIVILEGED, dangerous, refused="capset", answer=answer),
        Case(ROOT, (*FOR_IDS, *dangerous), refused="capset", answer=answer),
        Case(ROOT, (*FOR_IDS, CAP_SYS_ADMIN), refused="prctl", answer=answer),
        Case(ROOT, (*FOR_IDS, CAP_SYS_ADMIN), refused="setresuid", answer=answer),
    ]
    root, nobody, changed, no_new_privs, setresuid = (each for _, each in outcomes(cases))
    for outcome in (root, nobody):
        assert outcome.refusal
        assert "cannot give up CAP_DAC_OVERRIDE, CAP_SYS_PTRACE, " in outcome.refusal
        assert "capset(2)" in outcome.refusal
    # The kernel drops them when the process changes to another user.
    assert changed.refusal is None
    assert capabilities(changed.after, "CapPrm") == 0
    assert no_new_privs.refusal
    assert "cannot set no_new_privs" in no_new_privs.refusal
    assert setresuid.refusal is None
    assert capabilities(setresuid.after, "CapPrm") == 0
    (warning,) = setresuid.warnings
    assert "user 0 (refused despite CAP_SETUID, by a seccomp filter" in warning
    assert "group" not in warning
