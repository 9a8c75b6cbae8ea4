# SPDX-License-Identifier: GPL-3.0-only
"""What is made of a kernel's answers; tests/kernel asks a real one."""

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


def feature(name: str, probe: features.Probe, without: str = POLLS) -> Feature:
    return Feature(name, "Linux 9.7", "ebpf, to be tried", without, probe)


THERE = feature("there", lambda _types: True)
LACKING = feature("lacking", refusing(errno.EINVAL))
FORBIDDEN = feature("forbidden", refusing(errno.EPERM))
SPARED = feature("spared", lambda _types: False, "it works slowly")


def kernel(*without: str) -> Kernel:
    """One without BTF, so that nothing here takes libbpf."""
    return Kernel((BTF.name, *without))


@pytest.mark.parametrize(
    ("asked", "answer"), [(THERE, True), (LACKING, False), (FORBIDDEN, None)]
)
def test_a_refusal_is_an_answer(asked: Feature, answer: features.Answer) -> None:
    """What the kernel does not know is not there; what it forbids cannot be told."""
    assert kernel().has(asked) is answer


def test_an_answer_can_be_forced() -> None:
    """A feature that is named is not even probed."""
    assert kernel(THERE.name).has(THERE) is False
    assert kernel(FORBIDDEN.name).has(FORBIDDEN) is False


def test_without_btf_what_is_found_in_it_cannot_be_told() -> None:
    """That is not the same as not being there, and nothing is said about it."""
    assert kernel().has(BTF) is False
    assert kernel().has(features.STATES) is None
    assert kernel().has(features.HASH_MAP_ALLOCATOR) is None


def test_what_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is required and not there, with what has it; and one remedy."""
    monkeypatch.setattr(features, "FEATURES", (BTF, THERE, LACKING, FORBIDDEN, SPARED))
    with pytest.raises(LoadError) as raised:
        kernel().require()
    assert str(raised.value) == (
        "this kernel has no BTF (it takes CONFIG_DEBUG_INFO_BTF), no lacking (it takes"
        " Linux 9.7): use another, or --source sock_diag"
    )


def test_a_feature_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, whether it is there, who needs it, what is done without it; in columns."""
    monkeypatch.setattr(features, "FEATURES", (THERE, LACKING, FORBIDDEN, SPARED))
    assert table(kernel()).splitlines() == [
        "FEATURE    THERE  NEEDED BY          WITHOUT IT",
        "there      yes    ebpf, to be tried  sock_diag is polled",
        "lacking    no     ebpf, to be tried  sock_diag is polled",
        "forbidden  ?      ebpf, to be tried  sock_diag is polled",
        "spared     no     ebpf, to be tried  it works slowly",
        "? cannot be told here: it takes root, and for the most part BTF",
    ]


def test_what_can_be_told_needs_no_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line is there for question marks only."""
    monkeypatch.setattr(features, "FEATURES", (THERE, SPARED))
    assert len(table(kernel()).splitlines()) == 3


def test_names_are_told_apart() -> None:
    """A test that forces one feature forces no other."""
    assert len({each.name for each in FEATURES}) == len(FEATURES)
