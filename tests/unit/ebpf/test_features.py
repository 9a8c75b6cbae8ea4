# SPDX-License-Identifier: GPL-3.0-only
"""The answers of a kernel to probes are interpreted; tests/kernel probes a real one."""

import errno
import os

import pytest

from tcpexporter.ebpf import features
from tcpexporter.ebpf.btf import Btf
from tcpexporter.ebpf.features import BTF, FEATURES, POLLS, Feature, Kernel, table
from tcpexporter.errors import LoadError


def refusing(number: int) -> features.Probe:
    def refuse(_types: Btf | None) -> bool:
        raise OSError(number, os.strerror(number))

    return refuse


def required(name: str, probe: features.Probe) -> Feature:
    used_by = "ebpf, to be tried"
    return Feature(name, "Linux 9.7", used_by, POLLS, probe, required=True)


PRESENT = required("present", lambda _types: True)
LACKING = required("lacking", refusing(errno.EINVAL))
FORBIDDEN = required("forbidden", refusing(errno.EPERM))
OPTIONAL = Feature(
    "optional", "Linux 9.7", "ebpf, to be tried", "it works slowly", lambda _types: False
)


def kernel(*without: str) -> Kernel:
    """A kernel without BTF, so that these tests do not require libbpf."""
    return Kernel((BTF.name, *without))


@pytest.mark.parametrize(
    ("asked", "answer"), [(PRESENT, True), (LACKING, False), (FORBIDDEN, None)]
)
def test_a_kernel_error_is_an_answer(asked: Feature, answer: features.Answer) -> None:
    """An unknown operation means no; a forbidden one means unknown."""
    assert kernel().has(asked) is answer


def test_an_answer_can_be_forced() -> None:
    """A feature that a test declares missing is not probed."""
    assert kernel(PRESENT.name).has(PRESENT) is False
    assert kernel(FORBIDDEN.name).has(FORBIDDEN) is False


def test_without_btf_features_found_in_it_are_unknown() -> None:
    """Unknown is not the same as missing."""
    assert kernel().has(BTF) is False
    assert kernel().has(features.STATES) is None
    assert kernel().has(features.HASH_MAP_ALLOCATOR) is None


def test_missing_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names all missing required features, their origin, and one remedy."""
    monkeypatch.setattr(features, "FEATURES", (BTF, PRESENT, LACKING, FORBIDDEN, OPTIONAL))
    with pytest.raises(LoadError) as raised:
        kernel().require()
    assert str(raised.value) == (
        "this kernel has no BTF (requires CONFIG_DEBUG_INFO_BTF), no lacking (requires"
        " Linux 9.7): use another kernel, or --source sock_diag"
    )


def test_a_feature_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns are the name, the answer, the use, and the effect of its absence."""
    monkeypatch.setattr(features, "FEATURES", (PRESENT, LACKING, FORBIDDEN, OPTIONAL))
    assert table(kernel()).splitlines() == [
        "FEATURE    AVAILABLE  USED BY            WITHOUT IT",
        "present    yes        ebpf, to be tried  sock_diag is polled",
        "lacking    no         ebpf, to be tried  sock_diag is polled",
        "forbidden  ?          ebpf, to be tried  sock_diag is polled",
        "optional   no         ebpf, to be tried  it works slowly",
        "? cannot be determined: requires root, and BTF for most features",
    ]


def test_without_question_marks_there_is_no_explanation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any question mark there is a header and one line for each feature."""
    monkeypatch.setattr(features, "FEATURES", (PRESENT, OPTIONAL))
    assert len(table(kernel()).splitlines()) == 3


def test_names_of_features_are_unique() -> None:
    """A test that forces one feature forces no other."""
    assert len({each.name for each in FEATURES}) == len(FEATURES)
