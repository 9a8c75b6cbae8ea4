# SPDX-License-Identifier: GPL-3.0-only
"""Saving ages to a file and restoring them, with socket tables that a test defines."""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.parts import Direction
from tcpexporter.connections.record import SOCKET, Records
from tcpexporter.errors import StateError
from tcpexporter.socket_tables import saved_ages
from tcpexporter.socket_tables.saved_ages import (
    HEADER,
    PIECE_BYTES,
    ROW,
    Save,
    State,
    compose,
    parse,
)
from tests.support import eventually


def connections(
    *numbers: int, seen_ns: int = 0, direction: Direction = Direction.INBOUND
) -> Records:
    """Return a connection for each number, which is its cookie and its remote port."""
    made = np.zeros(len(numbers), SOCKET)
    made["cookie"] = numbers
    made["key"]["remote_port"] = numbers
    made["key"]["local_port"] = 443
    made["established_ns"] = seen_ns
    made["is_outbound"] = direction
    return made


class Tables:
    """Socket tables with the connections that a test has chosen."""

    def __init__(self, shown: Records) -> None:
        self._shown = shown

    def established(self, *, with_ages: bool) -> Records:  # noqa: ARG002
        return self._shown.copy()

    def namespaces(self) -> npt.NDArray[np.uint32]:
        return np.array([7], np.uint32)


def reopened(path: Path) -> State:
    opened = State.open(path)
    assert opened is not None
    return opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


def saved(path: Path, *saves: Records) -> None:
    """Save these connections one after another, in one run of the exporter."""
    with contextlib.closing(reopened(path)) as run:
        run.aged(Tables(connections()))
        for each in saves:
            run._save(each)


def restored(path: Path, shown: Records) -> dict[int, tuple[int, int]]:
    """Return time and direction that the next run gives to each connection, by cookie."""
    run = reopened(path)
    found = run.aged(Tables(shown)).established(with_ages=True)
    run.close()
    values = zip(
        found["established_ns"].tolist(), found["is_outbound"].tolist(), strict=True
    )
    return dict(zip(found["cookie"].tolist(), values, strict=True))


def test_ages_and_directions_are_restored(path: Path) -> None:
    """Connections that were not saved have the time from the tables."""
    saved(path, connections(1, 2, 3, seen_ns=100, direction=Direction.OUTBOUND))
    assert restored(path, connections(2, 3, 5, seen_ns=900)) == {
        2: (100, Direction.OUTBOUND),
        3: (100, Direction.OUTBOUND),
        5: (900, Direction.INBOUND),
    }


def test_another_socket_or_another_key_is_another_connection(path: Path) -> None:
    """Another socket has the same address pair, or the same socket has another port."""
    saved(path, connections(1, 2, 3, seen_ns=100))
    shown = connections(1, 2, 3, seen_ns=900)
    shown["cookie"][0] = 11
    shown["key"]["remote_port"][1] = 22
    assert restored(path, shown) == {
        11: (900, 0),
        2: (900, 0),
        3: (100, 0),
    }


def test_without_cookies_nothing_is_saved_or_restored(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections from procfs have no cookie; the save fails with an error."""
    unknown = connections(1, 2, seen_ns=100)
    unknown["cookie"] = 0
    with pytest.raises(StateError, match="has no socket cookies"):
        saved(path, unknown)
    saved(path, connections(1, 2, seen_ns=100))
    unknown["established_ns"] = 900
    assert restored(path, unknown) == {0: (900, 0)}
    assert not caplog.messages


def test_an_earlier_time_from_the_tables_is_kept(path: Path) -> None:
    """The time from the tables can be earlier than the saved one, which is an upper
    bound."""
    saved(path, connections(1, seen_ns=500))
    assert restored(path, connections(1, seen_ns=300)) == {1: (300, 0)}


def test_the_last_of_several_saves_is_restored(path: Path) -> None:
    """The saves are from several runs, and each is shorter than the one before."""
    many = range(1, 10_007)
    for number in range(1, 8):
        saved(
            path,
            connections(*many[: 10_006 // number], seen_ns=1000 - 10 * number),
            connections(*many[:number], seen_ns=1000 - 10 * number - 1),
        )
        found = restored(path, connections(*many, seen_ns=2000))
        times = [time for time, _ in found.values()]
        assert times == [999 - 10 * number] * number + [2000] * (10_006 - number)


def test_an_unchanged_save_is_not_written_again(path: Path) -> None:
    """The file is not written, and the time of the save is updated."""
    run = reopened(path)
    run.aged(Tables(connections()))
    run._save(connections(1, 2, seen_ns=100))
    before = path.read_bytes()
    run.saved_s = 0.0
    run._save(connections(1, 2, seen_ns=100))
    assert path.read_bytes() == before
    assert run.saved_s
    run._save(connections(1, seen_ns=100))
    assert path.read_bytes() != before
    run.close()


def test_the_number_of_a_save_wraps_around(path: Path) -> None:
    """After the highest number of 64 bits, the next save has number 0."""
    save = Save(2**64 - 1, bytes(16), (1, 2), np.zeros(0, ROW))
    path.write_bytes(compose(save))
    path.chmod(0o600)
    saved(path, connections(1, seen_ns=100))
    assert parse(area(path, 1)).number == 0


def area(path: Path, number: int) -> bytes:
    whole = path.read_bytes()
    places = range(number * PIECE_BYTES, len(whole), 2 * PIECE_BYTES)
    return b"".join(whole[at : at + PIECE_BYTES] for at in places)


def overwrite(path: Path, place: int, what: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(what)


def test_a_damaged_area_leaves_the_other_one(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The complete save is restored, and the next save replaces the damaged one."""
    for torn in (0, 1):
        saved(path, connections(1, seen_ns=100), connections(1, seen_ns=101))
        whole = parse(area(path, 1 - torn))
        overwrite(path, torn * PIECE_BYTES + HEADER.itemsize, b"torn")
        assert restored(path, connections(1, seen_ns=900)) == {
            1: (int(whole.rows["established_ns"][0]), 0)
        }
        saved(path, connections(1, seen_ns=102))
        assert parse(area(path, 1 - torn)).number == whole.number
        assert parse(area(path, torn)).number == whole.number + 1
        path.unlink()
    assert not caplog.messages


def test_two_damaged_areas_are_logged_and_replaced(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No age is restored at first. The next save is complete, and is restored."""
    saved(path, connections(1, seen_ns=100), connections(1, seen_ns=101))
    for number in (0, 1):
        overwrite(path, number * PIECE_BYTES + HEADER.itemsize, b"torn")
    assert restored(path, connections(1, seen_ns=900)) == {1: (900, 0)}
    assert caplog.messages == [f"cannot restore ages from {path}: its checksum is wrong"]
    saved(path, connections(1, seen_ns=900))
    assert restored(path, connections(1, seen_ns=990)) == {1: (900, 0)}


def test_a_failed_save_leaves_the_previous_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gets full during several saves; the next complete save is restored."""
    run = reopened(path)
    run.aged(Tables(connections()))
    run._save(connections(*range(1, 5001), seen_ns=100))
    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if os.lseek(descriptor, 0, os.SEEK_CUR) >= 2 * PIECE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as changed:
        changed.setattr(os, "write", full)
        for seen_ns in (200, 201, 202):
            with pytest.raises(StateError, match="No space left on device"):
                run._save(connections(*range(1, 5001), seen_ns=seen_ns))
            assert parse(area(path, 0)).rows["established_ns"].tolist() == [100] * 5000
    run._save(connections(1, seen_ns=203))
    run.close()
    assert restored(path, connections(1, seen_ns=900)) == {1: (203, 0)}


def test_nothing_is_restored_after_another_boot(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cookies and the clock start again at each boot."""
    saved(path, connections(1, seen_ns=100))
    other = tmp_path / "boot_id"
    other.write_text("01234567-89ab-cdef-0123-456789abcd00\n")
    with monkeypatch.context() as changed:
        changed.setattr(saved_ages, "BOOT_ID", other)
        assert restored(path, connections(1, seen_ns=900)) == {1: (900, 0)}
        saved(path, connections(1, seen_ns=500))
        assert restored(path, connections(1, seen_ns=900)) == {1: (500, 0)}
    assert restored(path, connections(1, seen_ns=900)) == {1: (900, 0)}


def test_a_save_of_another_version_is_not_restored(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A line is logged, and the next save replaces it."""
    saved(path, connections(1, seen_ns=100))
    _, at = HEADER.fields["version"][:2]  # type: ignore[index]
    overwrite(path, at, (2).to_bytes(4, "little"))
    assert restored(path, connections(1, seen_ns=900)) == {1: (900, 0)}
    assert caplog.messages == [f"cannot restore ages from {path}: it has version 2, not 1"]
    saved(path, connections(1, seen_ns=500))
    assert restored(path, connections(1, seen_ns=900)) == {1: (500, 0)}


def refused(path: Path, use: Callable[[Path], object] = State.open) -> str:
    with pytest.raises(StateError) as raised:
        use(path)
    return str(raised.value)


def test_a_second_exporter_gets_an_error(path: Path) -> None:
    """It can use the file once the first exporter has ended."""
    with contextlib.closing(reopened(path)):
        assert "is in use by another exporter" in refused(path)
    reopened(path).close()


@pytest.mark.parametrize("use", [State.open, State.check])
def test_a_file_that_cannot_be_trusted_is_refused(
    path: Path, tmp_path: Path, use: Callable[[Path], object]
) -> None:
    """It has other content, other users may read it, or it is no regular file. --check says
    the same as a start."""
    path.write_text("# another file\n")
    path.chmod(0o600)
    not_ours = f"{path} is not a file of --state: choose another path with --state"
    assert refused(path, use) == not_ours
    path.chmod(0o640)  # the message must not propose to change the mode of such a file
    assert refused(path, use) == not_ours
    assert path.read_text() == "# another file\n"
    path.write_text("")
    assert "cannot be trusted: choose another path; or set its mode" in refused(path, use)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    assert refused(link, use) == f"{link} cannot be used: Too many levels of symbolic links"
    assert not (tmp_path / "elsewhere").exists()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    assert "is not a regular file" in refused(fifo, use)
    assert refused(tmp_path, use) == f"{tmp_path} cannot be used: Is a directory"
    missing = tmp_path / "missing" / "state"
    assert refused(missing, use) == (
        f"{missing} cannot be used: the directory {missing.parent} does not exist: create"
        f" it (install -d -m 0700 {missing.parent}), or choose another path with --state"
    )


def test_checking_a_file_creates_changes_and_locks_nothing(path: Path) -> None:
    """An exporter can use the file meanwhile."""
    assert State.check(path)
    assert not path.exists()
    with contextlib.closing(reopened(path)):
        before = path.read_bytes()
        assert State.check(path)
        assert path.read_bytes() == before


def test_checking_a_missing_file_on_a_read_only_file_system_logs_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start logs the same warning. access(2) refuses a read-only file system too."""
    status = os.statvfs(path.parent)
    read_only = os.statvfs_result((*status[:8], status.f_flag | os.ST_RDONLY, *status[9:]))
    monkeypatch.setattr(os, "statvfs", lambda _: read_only)
    monkeypatch.setattr(os, "access", lambda *_args, **_kwargs: False)
    assert not State.check(path)
    assert caplog.messages == [f"ages are not saved: {path}: Read-only file system"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(path: Path) -> None:
    """That user could write any ages to it."""
    path.touch(0o600)
    os.chown(path, 65534, 65534)
    assert "cannot be trusted" in refused(path)


def test_only_the_owner_can_access_the_file(path: Path) -> None:
    """This holds with any umask."""
    before = os.umask(0)
    try:
        reopened(path).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failing_disk_does_not_prevent_the_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is one warning, and connections can be counted."""

    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    assert State.open(path) is None
    assert caplog.messages == [f"ages are not saved: {path}: Read-only file system"]


def test_a_deleted_file_is_an_error(path: Path) -> None:
    """The next run could not find the saved ages."""
    with contextlib.closing(reopened(path)) as run:
        path.unlink()
        with pytest.raises(StateError, match=f"{path} was deleted or replaced"):
            run._save(connections(1))


def test_a_save_that_hangs_does_not_prevent_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is unchanged, and stays open until the save has written to it."""
    monkeypatch.setattr(saved_ages, "STOP_TIMEOUT_S", 0.01)
    hangs = threading.Event()

    def known() -> Records:
        hangs.wait()
        return connections(1)

    run = reopened(path)
    run.begin(known)
    run.close()
    assert path.read_bytes() == b""
    hangs.set()
    eventually(lambda: path.read_bytes() != b"")


any_save = st.builds(
    Save,
    number=st.integers(0, 2**64 - 1),
    boot=st.binary(min_size=16, max_size=16),
    secret=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    rows=st.lists(
        st.tuples(*[st.integers(0, 2**64 - 1)] * 3, st.integers(0, 1)), max_size=7
    ).map(lambda rows: np.array(rows, ROW)),
)


@given(save=any_save, after=st.binary(max_size=7))
def test_a_parsed_save_equals_the_composed_one(save: Save, after: bytes) -> None:
    """Any bytes may follow it, from an older, longer save."""
    read = parse(compose(save) + after)
    assert read.rows.tolist() == save.rows.tolist()
    assert (read.number, read.boot, read.secret) == (save.number, save.boot, save.secret)


@given(save=any_save, data=st.data())
def test_a_change_of_any_bit_is_detected(save: Save, data: st.DataObject) -> None:
    """Such an area is refused."""
    whole = bytearray(compose(save))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StateError):
        parse(bytes(whole))


@given(text=st.binary(max_size=200))
def test_any_other_bytes_are_refused(text: bytes) -> None:
    """The only exception is StateError."""
    for each in (text, saved_ages.MAGIC + saved_ages.VERSION.to_bytes(4, "little") + text):
        with pytest.raises(StateError):
            parse(each)
