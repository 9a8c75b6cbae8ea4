# SPDX-License-Identifier: GPL-3.0-only
"""Numbers of owners: equal labels, cgroups whose names are found later, removed ones."""

import numpy as np
import pytest

from tcpexporter.connections.selection import UNKNOWN_OWNER
from tcpexporter.metrics.owner_numbers import FORGET_NS, OwnerNumbers
from tcpexporter.metrics.owners import Owner
from tests.unit.made_cgroups import PATHS, WITHOUT_PATH, MadePaths, made_owners
from tests.unit.series_rows import series_of_rows

UID = "16e6a747-9d40-4120-bbac-ca7cd274fdd9"
IN_PODS = {
    101: f"/kubepods/besteffort/pod{UID}/{'a' * 64}",
    103: f"/kubepods/besteffort/pod{UID}/{'b' * 64}",
}
PODS = [*IN_PODS]

SSH, BELOW_SSH, DOCKER, UNMATCHED, SESSION = PATHS


def numbers(owners: OwnerNumbers, *cgroups: int) -> list[int]:
    found: list[int] = owners.numbers(np.array(cgroups, np.uint64)).tolist()
    return found


def test_cgroups_with_equal_labels_have_one_number() -> None:
    """A unit owns the cgroups below its own. A path of no known owner has no labels."""
    owners = made_owners(["port", "unit"])
    ssh, below, docker, unmatched, session = numbers(owners, *PATHS)
    assert ssh == below
    assert len({ssh, docker, session, UNKNOWN_OWNER}) == 4
    assert unmatched == UNKNOWN_OWNER
    assert owners.of(ssh).unit == "ssh.service"


def test_only_the_labels_that_were_asked_for_distinguish_owners() -> None:
    """Without the label unit, the cgroups of two units have the same owner."""
    owners = made_owners(["container"])
    assert numbers(owners, SSH, SESSION, DOCKER) == [UNKNOWN_OWNER, UNKNOWN_OWNER, 2]
    assert owners.of(2).container == "0123456789ab"


@pytest.mark.parametrize("cgroup", [0, WITHOUT_PATH])
def test_an_unknown_cgroup_has_an_owner_without_labels(cgroup: int) -> None:
    """So its connections are counted, in a series of their own."""
    owners = made_owners(["unit", "container", "pod"])
    assert numbers(owners, cgroup) == [UNKNOWN_OWNER]
    assert owners.of(UNKNOWN_OWNER)[1:] == ("", "", "")


def test_a_cgroup_gets_its_name_when_it_is_found() -> None:
    """Before that, it has the number of unknown owners."""
    paths = MadePaths({})
    owners = OwnerNumbers(["unit"], paths)
    assert numbers(owners, SSH) == [UNKNOWN_OWNER]
    owners.finish(0)
    paths.known = PATHS
    (number,) = numbers(owners, SSH)
    assert owners.of(number).unit == "ssh.service"


def test_a_cgroup_keeps_its_name_as_long_as_it_is_requested() -> None:
    """Afterwards the number is forgotten, and no other owner gets it."""
    paths = MadePaths(dict(PATHS))
    owners = OwnerNumbers(["unit"], paths)
    (ssh,) = numbers(owners, SSH)
    paths.known = {SESSION: PATHS[SESSION]}
    for _ in range(3):
        owners.finish(0)
        assert numbers(owners, SSH) == [ssh]
    owners.finish(0)
    assert owners.is_known(np.array([0, UNKNOWN_OWNER, ssh], np.uint64)).all()
    owners.finish(0)
    assert owners.is_known(np.array([ssh], np.uint64)).tolist() == [False]
    (session,) = numbers(owners, SESSION)
    assert session not in (ssh, UNKNOWN_OWNER)


def test_removed_cgroups_are_returned_after_forget_ns() -> None:
    """A cgroup that is not requested any more is not returned."""
    paths = MadePaths(dict(PATHS))
    owners = OwnerNumbers(["unit"], paths)

    def finish(now_ns: int, *requested: int) -> list[int]:
        numbers(owners, *requested)
        return sorted(owners.finish(now_ns))

    assert finish(7, SSH, DOCKER) == []
    paths.gone = {SSH, DOCKER}
    assert finish(11, SSH, DOCKER) == []
    assert finish(11 + FORGET_NS, SSH, DOCKER) == []
    assert finish(12 + FORGET_NS, SSH, DOCKER) == [SSH, DOCKER]
    assert finish(13 + FORGET_NS, DOCKER) == [DOCKER]


def test_each_owner_is_present_once() -> None:
    """Paths of no known owner and unknown cgroups are included; the cgroup 0 is not."""
    owners = made_owners(["unit"])
    found = {*numbers(owners, 0, WITHOUT_PATH, *PATHS)}
    present = [*owners.present(found)]
    assert present == sorted({*present})
    assert Owner("/system.slice/ssh.service", "ssh.service", "", "") in present
    assert Owner("/nothing/known", "", "", "") in present
    assert Owner(str(WITHOUT_PATH), "", "", "") in present
    assert len(present) == 5
    assert [each.unit for each in owners.present([UNKNOWN_OWNER])] == ["", ""]


@pytest.mark.parametrize(
    ("cgroups", "expected"),
    [
        ([DOCKER], {7: "container:0123456789ab"}),
        ([DOCKER, SSH, 0, WITHOUT_PATH], {7: "container:0123456789ab"}),
        ([SSH, UNMATCHED], {}),
        ([PODS[0]], {7: "container:aaaaaaaaaaaa"}),
        ([PODS[0], PODS[1]], {7: f"pod:{UID}"}),
        ([PODS[0], PODS[1], DOCKER], {}),
        ([PODS[0], DOCKER], {}),
    ],
)
def test_a_namespace_has_the_name_of_its_container_or_pod(
    cgroups: list[int], expected: dict[int, str]
) -> None:
    """With several containers it has the name of their common pod, or no name."""
    owners = OwnerNumbers([], MadePaths({**PATHS, **IN_PODS}))
    series = series_of_rows([(4, 0, 443, 7, each) for each in cgroups])
    assert owners.of_namespaces(series) == expected


def test_a_removed_container_does_not_name_a_namespace() -> None:
    """The kernel may have given the inode to another namespace."""
    paths = MadePaths({**PATHS, **IN_PODS})
    owners = OwnerNumbers([], paths)
    series = series_of_rows([(4, 0, 443, 7, DOCKER), (4, 0, 443, 7, PODS[0])])
    paths.gone = {DOCKER}
    owners.of_namespaces(series)
    owners.finish(0)
    assert owners.of_namespaces(series) == {7: "container:aaaaaaaaaaaa"}


def test_without_the_cgroup_file_system_owners_are_numbers() -> None:
    """The number is that of the cgroup, and the other labels are empty."""
    owners = OwnerNumbers(["unit"], None)
    assert numbers(owners, SSH) == [UNKNOWN_OWNER]
    assert [*owners.present([UNKNOWN_OWNER])] == [Owner(str(SSH), "", "", "")]
    assert owners.finish(0) == []
