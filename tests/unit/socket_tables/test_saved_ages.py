# SPDX-License-Identifier: GPL-3.0-only
"""The file that ages are saved in, over socket tables that a test fills."""

import contextlib
import errno
import os
import stat
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.connections.record import (
    SOCKET,
    Direction,
    Records,
    directions,
    groups,
)
from tcpexporter.errors import StateError
from tcpexporter.socket_tables import saved_ages as state
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
    """One for each number, which is its cookie, and its remote port."""
    made = np.zeros(len(numbers), SOCKET)
    made["cookie"] = numbers
    made["key"]["remote_port"] = numbers
    made["key"]["local_port"] = 443
    made["established_ns"] = seen_ns
    made["group"] = groups(made["key"], direction)
    return made


class Tables:
    """Tables that show what a test says."""

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
    """By one run of the exporter, one after another."""
    with contextlib.closing(reopened(path)) as run:
        run.aged(Tables(connections()))
        for each in saves:
            run._save(each)


def taken_over(path: Path, shown: Records) -> dict[int, tuple[int, int]]:
    """Times and directions by cookie, of what the next run finds in the tables."""
    run = reopened(path)
    found = run.aged(Tables(shown)).established(with_ages=True)
    run.close()
    values = zip(
        found["established_ns"].tolist(), directions(found["group"]).tolist(), strict=True
    )
    return dict(zip(found["cookie"].tolist(), values, strict=True))


def test_ages_and_directions_are_taken_over(path: Path) -> None:
    """Of connections that are still there; others have what the tables tell."""
    saved(path, connections(1, 2, 3, seen_ns=100, direction=Direction.OUTBOUND))
    assert taken_over(path, connections(2, 3, 5, seen_ns=900)) == {
        2: (100, Direction.OUTBOUND),
        3: (100, Direction.OUTBOUND),
        5: (900, Direction.INBOUND),
    }


def test_another_socket_or_another_key_is_another_connection(path: Path) -> None:
    """The same address pair opened anew; the same socket connected elsewhere."""
    saved(path, connections(1, 2, 3, seen_ns=100))
    shown = connections(1, 2, 3, seen_ns=900)
    shown["cookie"][0] = 11
    shown["key"]["remote_port"][1] = 22
    assert taken_over(path, shown) == {
        11: (900, 0),
        2: (900, 0),
        3: (100, 0),
    }


def test_sockets_that_are_not_told_apart_take_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with procfs, which tells no cookie: nothing is saved either, and that is said."""
    unknown = connections(1, 2, seen_ns=100)
    unknown["cookie"] = 0
    with pytest.raises(StateError, match="does not tell sockets apart"):
        saved(path, unknown)
    saved(path, connections(1, 2, seen_ns=100))
    unknown["established_ns"] = 900
    assert taken_over(path, unknown) == {0: (900, 0)}
    assert not caplog.messages


def test_a_bound_that_is_better_is_kept(path: Path) -> None:
    """Where a saved age is itself a bound, the tables may know of a higher one."""
    saved(path, connections(1, seen_ns=500))
    assert taken_over(path, connections(1, seen_ns=300)) == {1: (300, 0)}


def test_of_several_saves_the_last_counts(path: Path) -> None:
    """By one run and by others, however long they are."""
    many = range(1, 10_007)
    for number in range(1, 8):
        saved(
            path,
            connections(*many[: 10_006 // number], seen_ns=1000 - 10 * number),
            connections(*many[:number], seen_ns=1000 - 10 * number - 1),
        )
        found = taken_over(path, connections(*many, seen_ns=2000))
        times = [time for time, _ in found.values()]
        assert times == [999 - 10 * number] * number + [2000] * (10_006 - number)


def test_what_is_there_already_is_not_written_again(path: Path) -> None:
    """An idle host's disk is left alone, and the save counts as one."""
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


def test_the_highest_number_does_not_end_it(path: Path) -> None:
    """Nobody saves that often, but a file may say so."""
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


def test_a_torn_area_leaves_the_other(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever it is: the save that is whole is taken, and the torn one written next."""
    for torn in (0, 1):
        saved(path, connections(1, seen_ns=100), connections(1, seen_ns=101))
        whole = parse(area(path, 1 - torn))
        overwrite(path, torn * PIECE_BYTES + HEADER.itemsize, b"torn")
        assert taken_over(path, connections(1, seen_ns=900)) == {
            1: (int(whole.rows["established_ns"][0]), 0)
        }
        saved(path, connections(1, seen_ns=102))
        assert parse(area(path, 1 - torn)).number == whole.number
        assert parse(area(path, torn)).number == whole.number + 1
        path.unlink()
    assert not caplog.messages


def test_two_torn_areas_are_said_and_written_anew(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ages are lost, and saved from then on."""
    saved(path, connections(1, seen_ns=100), connections(1, seen_ns=101))
    for number in (0, 1):
        overwrite(path, number * PIECE_BYTES + HEADER.itemsize, b"torn")
    assert taken_over(path, connections(1, seen_ns=900)) == {1: (900, 0)}
    assert caplog.messages == [f"the ages in {path} are lost: its checksum is wrong"]
    saved(path, connections(1, seen_ns=900))
    assert taken_over(path, connections(1, seen_ns=990)) == {1: (900, 0)}


def test_a_save_that_fails_leaves_the_one_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the midst of each of several; the next that works is taken."""
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
    assert taken_over(path, connections(1, seen_ns=900)) == {1: (203, 0)}


def test_another_boot_takes_nothing_over(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cookies and the clock have begun anew."""
    saved(path, connections(1, seen_ns=100))
    other = tmp_path / "boot_id"
    other.write_text("01234567-89ab-cdef-0123-456789abcd00\n")
    with monkeypatch.context() as changed:
        changed.setattr(state, "BOOT_ID", other)
        assert taken_over(path, connections(1, seen_ns=900)) == {1: (900, 0)}
        saved(path, connections(1, seen_ns=500))
        assert taken_over(path, connections(1, seen_ns=900)) == {1: (500, 0)}
    assert taken_over(path, connections(1, seen_ns=900)) == {1: (900, 0)}


def test_a_version_of_tomorrow_is_not_understood(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and does not keep this one from saving."""
    saved(path, connections(1, seen_ns=100))
    _, at = HEADER.fields["version"][:2]  # type: ignore[index]
    overwrite(path, at, (2).to_bytes(4, "little"))
    assert taken_over(path, connections(1, seen_ns=900)) == {1: (900, 0)}
    assert caplog.messages == [f"the ages in {path} are lost: it is of version 2, not 1"]
    saved(path, connections(1, seen_ns=500))
    assert taken_over(path, connections(1, seen_ns=900)) == {1: (500, 0)}


def refused(path: Path) -> str:
    with pytest.raises(StateError) as raised:
        State.open(path)
    return str(raised.value)


def test_of_two_exporters_the_second_is_refused(path: Path) -> None:
    """Until the first has ended."""
    with contextlib.closing(reopened(path)):
        assert "is another exporter's" in refused(path)
    reopened(path).close()


def test_a_file_that_is_not_ours_is_refused(path: Path, tmp_path: Path) -> None:
    """Somebody else's, one that others may write to, a link, or of another kind."""
    path.write_text("# something that somebody needs\n")
    path.chmod(0o600)
    assert "is not what an exporter saves" in refused(path)
    path.chmod(0o640)
    assert "is not ours alone" in refused(path)
    assert path.read_text() == "# something that somebody needs\n"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    assert refused(link) == f"{link} cannot be used: Too many levels of symbolic links"
    assert not (tmp_path / "elsewhere").exists()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    assert "is not ours alone" in refused(fifo)
    assert refused(tmp_path) == f"{tmp_path} cannot be used: Is a directory"
    missing = tmp_path / "missing" / "state"
    assert refused(missing) == f"{missing} cannot be used: No such file or directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(path: Path) -> None:
    """What is in it could be anything."""
    path.touch(0o600)
    os.chown(path, 65534, 65534)
    assert "is not ours alone" in refused(path)


def test_the_file_is_ours_alone(path: Path) -> None:
    """Whatever the umask is."""
    before = os.umask(0)
    try:
        reopened(path).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_disk_with_trouble_does_not_keep_it_from_starting(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning: numbers matter more than ages."""

    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    assert State.open(path) is None
    assert caplog.messages == [f"ages are not saved: {path}: Read-only file system"]


def test_a_file_that_was_deleted_is_told_of(path: Path) -> None:
    """What is saved in it nobody will find."""
    with contextlib.closing(reopened(path)) as run:
        path.unlink()
        with pytest.raises(StateError, match=f"there is no {path} any more"):
            run._save(connections(1))


def test_a_save_that_hangs_does_not_keep_it_from_ending(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is as it was, and not closed while it may be written to."""
    monkeypatch.setattr(state, "STOP_TIMEOUT_S", 0.01)
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
def test_a_save_is_read_as_it_was_written(save: Save, after: bytes) -> None:
    """Whatever is left from a longer one follows it."""
    read = parse(compose(save) + after)
    assert read.rows.tolist() == save.rows.tolist()
    assert (read.number, read.boot, read.secret) == (save.number, save.boot, save.secret)


@given(save=any_save, data=st.data())
def test_no_bit_of_a_save_can_change(save: Save, data: st.DataObject) -> None:
    """A save that was torn anywhere is not taken for one."""
    whole = bytearray(compose(save))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StateError):
        parse(bytes(whole))


@given(text=st.binary(max_size=200))
def test_anything_else_is_an_error(text: bytes) -> None:
    """One that says what is wrong, and no other."""
    for each in (text, state.MAGIC + state.VERSION.to_bytes(4, "little") + text):
        with pytest.raises(StateError):
            parse(each)
