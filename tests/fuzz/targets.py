# SPDX-License-Identifier: GPL-3.0-only
"""Each door as a function of bytes: it returns, whatever they are.

It lets the errors pass that are documented there, and looks at what they say and at what
came out. All else that is raised is a finding.
"""

import contextlib
import ctypes
import io
import os
import re
import socket
import string
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
from pyroute2.netlink import NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, SS_ESTABLISHED, SS_LISTEN

from tcpexporter.config import settings
from tcpexporter.connections.record import CONNECTION, GROUP_BITS, Records
from tcpexporter.ebpf import loader_protocol, pins
from tcpexporter.ebpf.btf import KIND_FUNC, KIND_STRUCT, KIND_TYPEDEF, KIND_UNION, Btf
from tcpexporter.ebpf.libbpf import load_libbpf
from tcpexporter.errors import (
    LoadError,
    PinError,
    SettingsError,
    SocketTableError,
    StateError,
    TcpExporterError,
    WebConfigError,
)
from tcpexporter.socket_tables import saved_ages as saves
from tcpexporter.socket_tables import tables as sockets
from tcpexporter.socket_tables.tables import (
    DIAG_MESSAGE,
    INET_DIAG_INFO,
    INET_DIAG_SKV6ONLY,
    NETLINK_HEADER,
    TCP_INFO,
    decode_procfs_table,
    decode_sock_diag,
)
from tcpexporter.web import config_file as webformat
from tcpexporter.web import passwords as access
from tests.fuzz.choices import Choices

NETNS = 0x0BADCAFE
SEQUENCE = 7
"""Of the replies that are captured."""

LONGEST_SENTENCE = 2000


@contextlib.contextmanager
def refused(*errors: type[TcpExporterError], saying: str = "") -> Iterator[None]:
    """Let these errors pass, if they say something and not too much."""
    try:
        yield
    except errors as error:
        sentence = str(error)
        assert sentence.strip(), "an error that says nothing"
        assert len(sentence) < LONGEST_SENTENCE, "an error that never ends"
        assert re.search(saying, sentence), f"not as documented: {sentence}"


def check_connections(connections: Records) -> None:
    """That they are what `counting` takes, which looks groups up in an array."""
    assert connections.dtype == CONNECTION
    assert (connections["group"] < 1 << GROUP_BITS).all()


# --- The kernel's socket tables ---

PLACE = r" at byte \d+$|^sock_diag refuses: |^sock_diag does not answer "


class _Table:
    """A reader of whatever decodes."""

    name = "fuzzed"
    netns = NETNS

    def __init__(self, chunks: Sequence[Records]) -> None:
        self._chunks = chunks

    def entries(self, *, with_ages: bool) -> Iterator[Records]:  # noqa: ARG002
        yield from self._chunks

    listening = entries

    def close(self) -> None:
        pass


def _look(chunks: Iterator[Records]) -> int:
    """At all of a table; how many entries it has."""
    found = list(chunks)
    connections, _ = sockets._established(_Table(found), with_ages=True)  # type: ignore[arg-type]
    check_connections(connections)
    for entries in found:
        sockets._listeners(entries)
    return sum(map(len, found))


def sock_diag(data: bytes) -> None:
    """What the kernel has sent, to the byte."""

    def chunks() -> Iterator[Records]:
        runs, _ = decode_sock_diag(np.frombuffer(data, np.uint8), SEQUENCE)
        assert sum(rows.size for rows in runs) <= len(data)
        for rows in runs:
            yield sockets._diag_entries(rows, NETNS, with_ages=True)

    with refused(SocketTableError, saying=PLACE):
        _look(chunks())


class Datagrams:
    """A socket whose other end sends these datagrams, and then nothing."""

    def __init__(self, datagrams: Sequence[bytes]) -> None:
        self._datagrams = list(datagrams)

    def send_later(self, datagrams: Sequence[bytes]) -> None:
        self._datagrams += datagrams

    def send(self, request: bytes) -> int:
        return len(request)

    def recv_into(self, room: memoryview) -> int:
        if not self._datagrams:
            raise TimeoutError("timed out")
        datagram = self._datagrams.pop(0)
        room[: len(datagram)] = datagram
        return len(datagram)

    def close(self) -> None:
        pass


def sock_diag_dump(data: bytes) -> None:
    """Datagrams of messages with attributes, of which much is as the kernel has it."""
    choices = Choices(data)
    opened = Datagrams([_datagram(choices) for _ in range(choices.number() % 8)])
    dumps = sockets._Dumps(cast("socket.socket", opened))

    def chunks() -> Iterator[Records]:
        for rows in dumps.read(1 << SS_ESTABLISHED | 1 << SS_LISTEN, 2):
            yield sockets._diag_entries(rows, NETNS, with_ages=True)

    for _ in range(2):  # the next look passes over what is left
        with refused(SocketTableError, saying=PLACE):
            _look(chunks())


def _datagram(choices: Choices) -> bytes:
    messages = b"".join(_message(choices) for _ in range(choices.number() % 8))
    return messages[: len(messages) - choices.pick([0, 0, 0, 1, 4, 20])]


def _message(choices: Choices) -> bytes:
    kind = choices.pick([SOCK_DIAG_BY_FAMILY] * 4 + [NLMSG_DONE, NLMSG_ERROR, 1, 0xFFFF])
    sequence = choices.pick([1, 1, 2, 2, 3, 0])
    if kind == SOCK_DIAG_BY_FAMILY:
        payload = _sock_diag_payload(choices)
    else:
        payload = choices.pick([bytes(4), struct.pack("=i", -16), choices.take(8)])
    right = NETLINK_HEADER.size + 4 + len(payload)
    length = choices.pick([right, right, right, right + 1, 0, choices.number(4)])
    return NETLINK_HEADER.pack(length, kind, 2, sequence) + bytes(4) + payload


def _sock_diag_payload(choices: Choices) -> bytes:
    family = choices.pick([socket.AF_INET, socket.AF_INET6, 0])
    state = choices.pick([SS_ESTABLISHED, SS_LISTEN, 8, 0])
    told = bytes([family, state]) + choices.take(8)
    attributes = b"".join(_attribute(choices) for _ in range(choices.number() % 4))
    return told.ljust(DIAG_MESSAGE.itemsize - 20, b"\0") + attributes


def _attribute(choices: Choices) -> bytes:
    kind = choices.pick([INET_DIAG_INFO, INET_DIAG_SKV6ONLY, 8])
    size = choices.pick([1, TCP_INFO.itemsize, 4, 0])
    length = choices.pick([4 + size, 4 + size, 0, choices.number(2)])
    return struct.pack("=HH", length, kind) + choices.exactly(size + -size % 4)


def procfs(data: bytes) -> None:
    """The text of /proc/net/tcp or tcp6, read in pieces of any size."""
    choices = Choices(data)
    words = choices.pick([1, 4])
    size = 8 * (1 + choices.number())
    text = choices.rest()
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    with refused(SocketTableError, saying=r"^/proc/net/tcp6?: .* at byte \d+$"):
        entries = _look(decode_procfs_table(pieces, words, NETNS))
        assert entries == text.count(b"\n") - 1


# --- What a user writes ---

SAYS_WHERE = r"^(flag|environment variable|settings|the settings file|web.yml) ?"
CONF = Path("tcpexporter.conf")


def _check(chosen: settings.Settings) -> None:
    assert list(chosen.ports) == sorted(set(chosen.ports))
    assert all(0 < port < 65536 for port in (*chosen.ports, chosen.listen_port))
    assert 0 <= chosen.duration_s * 10**9 < 1 << 63
    assert 0.1 <= chosen.interval_s <= 3600
    assert 0 <= chosen.reconcile_interval_s <= 86400


def setting(data: bytes) -> None:
    """A name and a value: of ports, durations, addresses to listen on and others."""
    name, _, text = data.decode(errors="surrogateescape").partition(" ")
    known = {each.name: each for each in settings._SETTINGS}
    chosen = known.get(name) or settings._SETTINGS[len(name) % len(known)]
    with refused(SettingsError, saying=f"^flag --{chosen.name}: {chosen.name} takes "):
        value: Any = chosen.value(text, None)
        values = {chosen.field: value}
        if chosen.name == "listen":
            values = dict(zip(("listen_address", "listen_port"), value, strict=True))
        _check(settings.Settings(**values))


def settings_file(data: bytes) -> None:
    """The text of the file that --conf names."""
    told = data.decode(errors="surrogateescape")
    with refused(SettingsError, saying=f"^{CONF} line "):
        for name, text in settings._items(told, CONF).items():
            settings._FILE_SETTINGS[name].value(text, text.origin)


_PARSER = settings._parser(None)


def settings_given(data: bytes) -> None:
    """Flags, variables and a file at once, a line for each."""
    argv, environ, lines = [], {}, []
    for line in data.decode(errors="surrogateescape").replace("\0", "").split("\n"):
        if line.startswith("-"):
            argv.append(line)
        elif line[:1] in string.ascii_uppercase:
            name, _, environ[name] = line.partition("=")
        else:
            lines.append(line)
    text = "\n".join(lines)
    with (
        mock.patch.multiple(
            settings, _read=lambda _path: text, _parser=lambda _file: _PARSER
        ),
        contextlib.redirect_stdout(io.StringIO()),
        refused(SettingsError),
    ):
        with contextlib.suppress(SystemExit):  # --help and --version
            _check(settings.parse(argv, environ))


def web_config(data: bytes) -> None:
    """The YAML of --web-config, as its reader decodes it."""
    text = data.decode(errors="surrogateescape")
    with refused(WebConfigError, saying=r"^web.yml"):
        found = webformat.parse(text, "web.yml", lambda name: f"content of {name}")
        for each in found.users:
            each.encode()
        if found.tls:
            found.tls.cert.encode(errors="surrogateescape")
        if found.rate_limit:
            access.Limiter(found.rate_limit).allow()


# --- What a client sends ---


def authorization(data: bytes) -> None:
    """The value of an Authorization header, as the server decodes it."""
    credentials = access._basic(data.decode("latin-1"))
    assert credentials is None or sum(map(len, credentials)) < len(data)


# --- What an exporter before this one left ---

PLACE_OF_PIN = Path("/sys/fs/bpf/tcpexporter/1/layout")
MOST_RECORD_BYTES = 4096


def pinned(data: bytes) -> None:
    """The words of a layout, and records of that."""
    choices = Choices(data)
    words = np.frombuffer(choices.exactly(4 * pins.LAYOUT_WORDS), np.uint32)
    with refused(PinError, saying="is not an object that an exporter has pinned"):
        record = pins._record(PLACE_OF_PIN, words)
        if record.itemsize <= MOST_RECORD_BYTES:
            content = choices.rest()
            content = content[: len(content) // record.itemsize * record.itemsize]
            known = pins.settled(np.frombuffer(content, record))
            check_connections(known)
            assert known["group"].all()


def fdinfo(data: bytes) -> None:
    """What the kernel shows of a pinned object."""
    shown = pins._shown(data)
    with refused(PinError, saying="is not an object that an exporter has pinned"):
        pins._require(PLACE_OF_PIN, shown, value_size=64, max_entries=1)
    with refused(PinError, saying="is not an object that an exporter has pinned"):
        pins._number(PLACE_OF_PIN, shown, "max_entries")


def state(data: bytes) -> None:
    """An area of the file of --state, as it is or with the checksum that it should have."""
    choices = Choices(data)
    is_mended, area = choices.pick([False, True]), choices.rest()
    if is_mended and len(area) >= saves.HEADER.itemsize:
        header = np.frombuffer(area, saves.HEADER, 1).copy()
        rows = area[saves.HEADER.itemsize :]
        rows = rows[: int(header["count"][0]) * saves.ROW.itemsize]
        header["checksum"] = saves._checksum(header, zlib.crc32(rows))
        area = header.tobytes() + rows
    with refused(StateError, saying="^its? "):
        save = saves.parse(area)
        assert saves.parse(saves.compose(save)).rows.tobytes() == save.rows.tobytes()


# --- What the kernel and the loader tell ---

BTF_HEADER = struct.Struct("=HBBIIIII")
BTF_NAMES = b"\0sock_common\0skc_net\0inum\0btf_trace_inet_sock_set_state\0\xff\0"
BTF_PLACES = (0, 1, 13, 21, 26, len(BTF_NAMES) - 2, 10**6)


def btf(data: bytes) -> None:
    """Types that refer to any others, in a file that libbpf takes."""
    choices = Choices(data)
    types = b"".join(_type(choices) for _ in range(choices.number() % 16))
    names = BTF_NAMES
    header = (0xEB9F, 1, 0, BTF_HEADER.size, 0, len(types), len(types), len(names))
    content = BTF_HEADER.pack(*header) + types + names
    libbpf = load_libbpf()
    libbpf.btf__new.restype = ctypes.c_void_p
    read = ctypes.c_void_p(libbpf.btf__new(content, ctypes.c_uint32(len(content))))
    try:
        with refused(LoadError, saying="this kernel"):
            found = Btf(libbpf, read)
            found.has("sock_common", "missing")
            assert found.offset("sock_common", "skc_net") < 1 << 26
            found.function("inet_sock_set_state")
    finally:
        libbpf.btf__free(read)


def _type(choices: Choices) -> bytes:
    kind = choices.pick([KIND_STRUCT, KIND_UNION, KIND_TYPEDEF, KIND_FUNC])
    has_members = kind in (KIND_STRUCT, KIND_UNION)
    count = choices.number() % 4 if has_members else 0
    head = (choices.pick(BTF_PLACES), kind << 24 | count, choices.number(2))
    members = [
        (choices.pick(BTF_PLACES), choices.number() % 20, choices.number(2))
        for _ in range(count)
    ]
    return b"".join(struct.pack("=III", *each) for each in (head, *members))


def loaded(data: bytes) -> None:
    """What the loader sends its parent: a number of descriptors, and a message."""
    number, message = data[0] % 32 if data else 0, data[1:]
    lowest = _lowest_descriptor()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, refused(LoadError), contextlib.ExitStack() as undo:
        with theirs:
            if number:
                socket.send_fds(theirs, [message], [theirs.fileno()] * number)
            elif message:
                theirs.send(message)
        received = loader_protocol.receive_descriptors(ours)
        undo.callback(received.close)
    assert _lowest_descriptor() == lowest, "descriptors are left"


def _lowest_descriptor() -> int:
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (
        sock_diag,
        sock_diag_dump,
        procfs,
        setting,
        settings_file,
        settings_given,
        web_config,
        authorization,
        pinned,
        fdinfo,
        state,
        btf,
        loaded,
    )
}
