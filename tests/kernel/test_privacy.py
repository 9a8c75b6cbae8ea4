# SPDX-License-Identifier: GPL-3.0-only
"""No client address, and no hash of one, is published, logged, saved or pinned.

The exception is documented: the pinned records of connections have addresses.
"""

import contextlib
import http.client
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest

from tcpexporter.connections.identity import client_hashes
from tcpexporter.connections.parts import client_masks
from tcpexporter.connections.record import KEY
from tcpexporter.ebpf.libbpf import call
from tcpexporter.ebpf.maps import Map
from tcpexporter.ebpf.pins import CONNECTIONS, LINK
from tests.kernel.helpers.borrowed import borrowed
from tests.kernel.helpers.many_clients import Server, route_ipv6
from tests.kernel.test_pins import GENERATION
from tests.kernel.test_state import wait_for_a_save
from tests.support import Exporter, eventually

pytestmark = pytest.mark.any_kernel

ADDRESSES = ("127.211.197.173", "2001:db8:c1a5:d15c:7ab1:e5e1:f00d:beef")
"""Addresses whose bytes and digits appear nowhere else."""

SECRET = (0x0123456789ABCDEF, 0xFEDCBA9876543210)

MAIN = f"""
from tcpexporter.connections import parts
parts.SECRET = {SECRET}
from tcpexporter.socket_tables import saved_ages
saved_ages.INTERVAL_S = 0.2
from tcpexporter.__main__ import main
main()
"""

WITH_KNOWN_SECRET = (sys.executable, "-c", MAIN)
"""A command of an exporter that hashes with `SECRET`, and saves ages often."""

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def packed(text: str) -> bytes:
    address = ip_address(text)
    return (b"" if address.version == 6 else bytes(10) + b"\xff\xff") + address.packed


def hashes() -> Iterator[int]:
    """Yield the hashes that the exporter has for the clients."""
    keys = np.zeros(len(ADDRESSES), KEY)
    for key, each in zip(keys, ADDRESSES, strict=True):
        key["remote_address"] = np.frombuffer(packed(each), np.uint8)
    for bits in ((32, 64), (32, 128)):
        yield from client_hashes(keys, client_masks(*bits), SECRET).tolist()


def found_in(content: bytes) -> list[str]:
    """Return what a text or binary content reveals about the clients."""
    ipv4, ipv6 = (ip_address(each).packed for each in ADDRESSES)
    values = {"IPv4 address": ipv4, "IPv6 address": ipv6, "IPv6 /64": ipv6[:8]}
    values |= {"half of an IPv6 address": ipv6[8:]}
    values |= {f"hash {each}": each.to_bytes(4, "big") for each in hashes()}
    patterns = {"text": "|".join(map(re.escape, (*ADDRESSES, "c1a5:d15c"))).encode()}
    for name, value in values.items():
        digits = (value.hex(), value[::-1].hex())
        numbers = (int.from_bytes(value, order) for order in ("big", "little"))
        texts = (*digits, *(rf"\b{each}\b" for each in numbers))
        words = b"".join(value[at : at + 4][::-1] for at in range(0, len(value), 4))
        raw = map(re.escape, (value, value[::-1], words))
        patterns[name] = b"(?i:" + "|".join(texts).encode() + b")|" + b"|".join(raw)
    return [name for name, each in patterns.items() if re.search(each, content, re.DOTALL)]


def elements(descriptor: int) -> bytes:
    """Return all elements of an array map."""
    shown = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    size, entries = (
        int(re.findall(rf"^{name}:\s+(\d+)$", shown, re.MULTILINE)[0])
        for name in ("value_size", "max_entries")
    )
    array = Map(descriptor, "array")
    found = np.zeros(entries, np.dtype((np.void, size)))
    for at in range(entries):
        array.read(np.uint32(at), found[at : at + 1])
    return found.tobytes()


def pinned_elements(path: Path) -> bytes:
    """Return all elements of a pinned array map, as root can read them."""
    descriptor = call("bpf_obj_get", os.fsencode(path))
    try:
        return elements(descriptor)
    finally:
        os.close(descriptor)


def page(exporter: Exporter, path: str, accept: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", exporter.port)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Accept": accept})
        return connection.getresponse().read()


@pytest.fixture
def server(netns: str) -> Iterator[Server]:
    del netns
    route_ipv6()
    with Server() as opened:
        yield opened


@pytest.mark.parametrize("value", [*ADDRESSES, *map(packed, ADDRESSES), *hashes()])
def test_the_search_finds_each_form(value: str | bytes | int) -> None:
    """An address or hash is found in text, and in bytes of both orders."""
    if isinstance(value, int):
        forms = [f"x {value}".encode(), f"{value:08x}".encode(), value.to_bytes(4, "big")]
        forms.append(value.to_bytes(8, "little"))
    elif isinstance(value, bytes):
        forms = [value, value[::-1], value.hex().encode(), value.hex().upper().encode()]
    else:
        forms = [f"client {value}:50000".encode()]
    for form in forms:
        assert found_in(b"before\0" + form + b"\0after"), form
    assert not found_in(b"before 127.0.0.1 [2001:db8::1]:50000 after")


@pytest.mark.parametrize(
    ("source", "keeping", "prefix"),
    [
        ("ebpf", "--pin", "32,64"),
        ("ebpf", "--state", "32,128"),
        ("sock_diag", "--state", "32,64"),
    ],
)
def test_clients_are_not_revealed(
    *,
    source: str,
    keeping: str,
    prefix: str,
    server: Server,
    directory: Path,
    tmp_path: Path,
) -> None:
    """All outputs are searched: pages, the log, and the saved ages or the pinned maps.

    The second run has connections of each kind: reported, seeded, and adopted or restored.
    """
    kept = directory if keeping == "--pin" else tmp_path / "state"
    arguments = (
        *("--source", source, keeping, str(kept), "--client-prefix", prefix),
        *(
            "--log-level",
            "debug",
            "--direction",
            "all",
            "--histograms",
            "--interval",
            "0.1",
        ),
        *("--labels", "port,tcp_version,direction,remote_port", "--duration", "0"),
        *("--max-connections", "8191", "--interval", "0.1"),
    )
    contents: dict[str, bytes] = {}
    server.connect([*ADDRESSES] * 3)
    for run in ("first", "second"):
        with Exporter(*arguments, command=WITH_KNOWN_SECRET) as exporter:
            server.connect([*ADDRESSES] * 5)
            eventually(partial(has_clients, exporter, server.port))
            if keeping == "--state":
                wait_for_a_save(exporter)
            for path in ("/metrics", "/", "/-/ready"):
                for accept in ("text/html", OPEN_METRICS):
                    contents[f"{run} {path} {accept}"] = page(exporter, path, accept)
            if source == "ebpf":
                with borrowed(exporter.process.pid) as (maps, _):
                    in_kernel = found_in(elements(maps["clients"][0]))
                assert [name for name in in_kernel if name.startswith("hash")]
            code, log = exporter.stop()
            assert code == 0
            contents[f"{run} log"] = log.encode()
        if keeping == "--state":
            contents[f"{run} state"] = kept.read_bytes()
        else:
            (generation,) = directory.iterdir()
            assert {each.name for each in generation.iterdir()} == {*GENERATION}
            for name in {*GENERATION} - {LINK, CONNECTIONS}:
                contents[f"{run} {name}"] = pinned_elements(generation / name)
            assert found_in(pinned_elements(generation / CONNECTIONS))
    assert all(contents.values())
    revealed = {name: found_in(content) for name, content in contents.items()}
    assert {name: found for name, found in revealed.items() if found} == {}


def has_clients(exporter: Exporter, port: int) -> bool:
    """Return whether one client of each IP version is counted."""
    labels = {"port": str(port), "direction": "inbound", "remote_port": ""}
    name = "tcp_established_clients"
    return all(
        exporter.value(name, tcp_version=version, **labels) == 1 for version in (4, 6)
    )


def test_only_root_opens_the_pinned_records(server: Server, directory: Path) -> None:
    """They have addresses. Another user cannot reach them."""
    server.connect(ADDRESSES)
    with Exporter("--source", "ebpf", "--pin", str(directory)) as exporter:
        assert exporter.stop()[0] == 0
    (records,) = directory.glob(f"*/{CONNECTIONS}")
    for each in (directory, records.parent):
        assert each.stat().st_mode & 0o777 == 0o700
    opened = f"from tcpexporter.ebpf.libbpf import call; call('bpf_obj_get', b'{records}')"
    ended = subprocess.run(
        [*AS_NOBODY, sys.executable, "-c", opened],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "PermissionError" in ended.stderr
