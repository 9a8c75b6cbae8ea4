# SPDX-License-Identifier: GPL-3.0-only
"""A function for each input of the exporter, which must return for any bytes.

It accepts documented errors and checks their text. If there is no error, it checks the
result. Any other exception is a finding.
"""

import contextlib
import ctypes
import io
import itertools
import os
import re
import socket
import string
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
from pyroute2.netlink import NLMSG_DONE, NLMSG_ERROR
from pyroute2.netlink.diag import SOCK_DIAG_BY_FAMILY, SS_ESTABLISHED, SS_LISTEN

from tcpexporter.config import rules, settings, sources
from tcpexporter.config.values import LABELS, TEN_YEARS_S
from tcpexporter.connections.expected import End, Rule
from tcpexporter.connections.matching import count_expected
from tcpexporter.connections.memory_ledger import MemoryLedger
from tcpexporter.connections.parts import Direction, OutboundPort, Parts
from tcpexporter.connections.record import SOCKET, Records, numbers
from tcpexporter.connections.snapshot import valid_connections, valid_old_connections
from tcpexporter.ebpf import loader_protocol, pinned_layout, pins
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
from tcpexporter.socket_tables import entries, saved_ages
from tcpexporter.socket_tables.diag_messages import (
    DIAG_MESSAGE,
    INET_DIAG_INFO,
    INET_DIAG_SKV6ONLY,
    NETLINK_HEADER,
    TCP_INFO,
    decode_messages,
    split_messages,
)
from tcpexporter.socket_tables.procfs import decode_file
from tcpexporter.socket_tables.sock_diag import DumpSocket
from tcpexporter.web import config_file as webformat
from tcpexporter.web import passwords as access
from tests import rule_oracle as oracle
from tests.fuzz.choices import Choices

NETNS = 0x0BADCAFE
SEQUENCE = 7
"""Sequence number of the captured replies."""

LONGEST_SENTENCE = 2000


@contextlib.contextmanager
def refused(*errors: type[TcpExporterError], saying: str = "") -> Iterator[None]:
    """Ignore these errors, if their text is as documented and neither empty nor too
    long."""
    try:
        yield
    except errors as error:
        sentence = str(error)
        assert sentence.strip(), "the text of the error is empty"
        assert len(sentence) < LONGEST_SENTENCE, "the text of the error is too long"
        assert re.search(saying, sentence), f"not as documented: {sentence}"


def check_connections(connections: Records) -> None:
    """Check that these connections can be numbered: numbers are indices of an array."""
    assert connections.dtype == SOCKET
    assert (connections["is_outbound"] <= 1).all()
    ledger = MemoryLedger(Parts(OutboundPort.LOCAL, by_netns=True))
    found = numbers(ledger.count(connections).words)
    assert found.all()
    assert (found < len(ledger.snapshot().series)).all()


# --- The kernel's socket tables ---

PLACE = r" at byte \d+$|^sock_diag refuses: |^sock_diag does not answer "


def _make_records(chunks: Iterator[Records]) -> int:
    """Make connections and listeners of all entries; return the number of entries."""
    found = list(chunks)
    connections, _ = entries.connections(found)
    check_connections(connections)
    for chunk in found:
        entries.listeners(chunk)
    return sum(map(len, found))


def sock_diag(data: bytes) -> None:
    """Decode any bytes as a reply of sock_diag."""

    def chunks() -> Iterator[Records]:
        runs, _ = split_messages(np.frombuffer(data, np.uint8), SEQUENCE)
        assert sum(rows.size for rows in runs) <= len(data)
        for rows in runs:
            yield decode_messages(rows, NETNS, with_ages=True)

    with refused(SocketTableError, saying=PLACE):
        _make_records(chunks())


class Datagrams:
    """Replaces a socket: its other end sends these datagrams, and then nothing."""

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
    """Decode datagrams of messages with attributes, most of them like the kernel's."""
    choices = Choices(data)
    opened = Datagrams([_datagram(choices) for _ in range(choices.number() % 8)])
    dumps = DumpSocket(cast("socket.socket", opened))

    def chunks() -> Iterator[Records]:
        for rows in dumps.dump(1 << SS_ESTABLISHED | 1 << SS_LISTEN, 2):
            yield decode_messages(rows, NETNS, with_ages=True)

    for _ in range(2):  # the second dump ignores the rest of the first
        with refused(SocketTableError, saying=PLACE):
            _make_records(chunks())


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
    """Decode any text as /proc/net/tcp or tcp6, read in pieces of any size."""
    choices = Choices(data)
    words = choices.pick([1, 4])
    size = 8 * (1 + choices.number())
    text = choices.rest()
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    with refused(SocketTableError, saying=r"^/proc/net/tcp6?: .* at byte \d+$"):
        number = _make_records(decode_file(pieces, words, NETNS))
        assert number == text.count(b"\n") - 1


# --- What an operator writes ---

SAYS_WHERE = r"^(flag|environment variable|settings|the settings file|web.yml) ?"
CONF = Path("tcpexporter.conf")


def _check(chosen: settings.Settings) -> None:
    assert list(chosen.ports) == sorted(set(chosen.ports))
    assert all(0 < port < 65536 for port in (*chosen.ports, chosen.listen_port))
    assert 0 <= chosen.duration_s * 10**9 < 1 << 63
    assert 0.1 <= chosen.interval_s <= 3600
    assert 0 <= chosen.reconcile_interval_s <= 86400
    assert list(chosen.buckets) == sorted(set(chosen.buckets))
    assert 0.001 <= chosen.buckets[0] <= chosen.buckets[-1] <= TEN_YEARS_S
    assert 1 <= chosen.client_prefix[0] <= 32
    assert 1 <= chosen.client_prefix[1] <= 128
    assert set(chosen.series_labels) <= set(LABELS)
    assert len(set(chosen.series_labels)) == len(chosen.series_labels)


def setting(data: bytes) -> None:
    """Parse a value of a setting: ports, durations, addresses and others."""
    name, _, text = data.decode(errors="surrogateescape").partition(" ")
    known = {each.name: each for each in settings.SETTINGS}
    chosen = known.get(name) or settings.SETTINGS[len(name) % len(known)]
    of_rules = chosen.name == "expect"
    what = "rule ['\"]|two rules|there are" if of_rules else f"{chosen.name} must be "
    with refused(SettingsError, saying=f"^flag --{chosen.name}: ({what})"):
        value: Any = chosen.value(sources.Text(text, f"flag --{chosen.name}"))
        values = {chosen.field: value}
        if chosen.name == "listen":
            values = dict(zip(("listen_address", "listen_port"), value, strict=True))
        _check(settings.Settings(**values))


def expected(data: bytes) -> None:
    """Parse rules of --expect, and count connections at the limits of their conditions."""
    text = data.decode(errors="surrogateescape")
    found: tuple[Rule, ...] = ()
    place = r"^rule (['\"]).*\1, character \d+: |^two rules have |^there are \d+ rules: "
    with refused(SettingsError, saying=place):
        try:
            found = rules.parse_rules(text)
        except rules.RuleError as error:
            raise SettingsError(str(error)) from None
    assert len({each.name for each in found}) == len(found) <= rules.MOST_RULES
    for each in found:
        assert rules.parse_rules(str(each)) == (each,)
        assert 1 <= each.minimum <= rules.MOST_EXPECTED
        opened = list(_at_the_limits(each))
        records = oracle.records(opened)
        window = records, np.ones(len(records), np.uint64)
        result = count_expected(
            [window], [each], np.uint64(1), lambda _: np.ones(2, np.bool_)
        )
        assert result.established[0] == sum(oracle.matches(each, one) for one in opened)
        assert result.long_term[0] == 0


def _at_the_limits(rule: Rule) -> Iterator[oracle.Connection]:
    """Yield connections whose ends are just within those of a rule, or just outside."""
    locals_, remotes = (list(_near(each)) for each in (rule.local, rule.remote))
    for (local, port), (remote, remote_port) in itertools.product(locals_, remotes):
        if local.version == remote.version:
            for direction in Direction:
                yield oracle.Connection(local, port, remote, remote_port, direction)


def _near(end: End) -> Iterator[tuple[oracle.Address, int]]:
    addresses = [ip_address("192.0.2.1"), ip_address("2001:db8::1")]
    if end.network is not None:
        first, last = end.network[0], end.network[-1]
        addresses += [first, last]
        if int(first) > 1 << 64 or (int(first) and first.version == 4):
            addresses.append(first - 1)
    for address in addresses:
        for port in {end.first_port, end.last_port, end.last_port + 1 & 0xFFFF}:
            yield address, port


def settings_file(data: bytes) -> None:
    """Parse any text as the file of --conf."""
    told = data.decode(errors="surrogateescape")
    with refused(SettingsError, saying=f"^{CONF} line "):
        lines = sources.read_lines(settings.GROUPS, told, CONF)
        for each in settings.SETTINGS:
            if each.name in lines:
                each.value(lines[each.name])


_PARSER = sources.make_parser(settings.GROUPS)


def settings_given(data: bytes) -> None:
    """Parse flags, variables and a file together; each has some lines of the input."""
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
            sources, read_text=lambda *_: text, make_parser=lambda _groups: _PARSER
        ),
        contextlib.redirect_stdout(io.StringIO()),
        refused(SettingsError),
    ):
        with contextlib.suppress(SystemExit):  # --help and --version
            _check(settings.parse(argv, environ))


def web_config(data: bytes) -> None:
    """Parse any text as the file of --web-config."""
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
    """Parse any value of an Authorization header."""
    credentials = access._basic_credentials(data.decode("latin-1"))
    assert credentials is None or sum(map(len, credentials)) < len(data)


# --- Files of a previous exporter ---

PLACE_OF_PIN = Path("/sys/fs/bpf/tcpexporter/1/layout")
MOST_RECORD_BYTES = 4096
WORD_BYTES = 8
COUNTED = loader_protocol.Request(max_connections=3, netns=0, secret=(0, 0))


def pinned(data: bytes) -> None:
    """Read a pinned layout, and records of that layout."""
    choices = Choices(data)
    said = np.frombuffer(choices.exactly(4 * pinned_layout.LAYOUT_WORDS), np.uint32)
    with contextlib.suppress(ValueError):
        layout = pinned_layout.read(said, COUNTED)
        record_bytes = layout.record.itemsize
        if record_bytes > MOST_RECORD_BYTES:
            return
        content = choices.rest()
        slots = len(content) // (record_bytes + WORD_BYTES)
        records = np.frombuffer(content[: slots * record_bytes], layout.record)
        words = np.frombuffer(content[slots * record_bytes :], np.uint64, slots)
        if layout.is_old:
            check_connections(valid_old_connections(records))
        else:
            check_connections(valid_connections(records, words))


def fdinfo(data: bytes) -> None:
    """Parse any text as the kernel's description of a pinned object."""
    shown = pins._shown(data)
    with refused(PinError, saying="is not an object that an exporter has pinned"):
        pins._require(PLACE_OF_PIN, shown, value_size=64, max_entries=1)
    with refused(PinError, saying="is not an object that an exporter has pinned"):
        pins._number(PLACE_OF_PIN, shown, "max_entries")


def state(data: bytes) -> None:
    """Parse an area of the file of --state, some with a corrected checksum."""
    choices = Choices(data)
    is_mended, area = choices.pick([False, True]), choices.rest()
    if is_mended and len(area) >= saved_ages.HEADER.itemsize:
        header = np.frombuffer(area, saved_ages.HEADER, 1).copy()
        rows = area[saved_ages.HEADER.itemsize :]
        rows = rows[: int(header["count"][0]) * saved_ages.ROW.itemsize]
        header["checksum"] = saved_ages._checksum(header, zlib.crc32(rows))
        area = header.tobytes() + rows
    with refused(StateError, saying="^its? "):
        save = saved_ages.parse(area)
        again = saved_ages.parse(saved_ages.compose(save))
        assert again.rows.tobytes() == save.rows.tobytes()


# --- Data of the kernel and of the loader ---

BTF_HEADER = struct.Struct("=HBBIIIII")
BTF_NAMES = b"\0sock_common\0skc_net\0inum\0btf_trace_inet_sock_set_state\0\xff\0"
BTF_PLACES = (0, 1, 13, 21, 26, len(BTF_NAMES) - 2, 10**6)


def btf(data: bytes) -> None:
    """Read BTF that libbpf accepts, with types that refer to any others."""
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
    """Receive a number of descriptors and a message, as from the loader."""
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
    assert _lowest_descriptor() == lowest, "descriptors stay open"


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
        expected,
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
