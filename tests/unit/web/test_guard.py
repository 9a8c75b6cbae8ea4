# SPDX-License-Identifier: GPL-3.0-only
"""--web-config over real sockets on loopback: TLS, passwords, headers, reading again."""

import base64
import contextlib
import gc
import http.client
import itertools
import json
import logging
import os
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from prometheus_client import CollectorRegistry

from tcpexporter.config.reader import WEB_CONFIG, Reader
from tcpexporter.config.reload import Reloading, Reloads, ReloadSignal
from tcpexporter.errors import SettingsError
from tcpexporter.host.systemd import Supervisor
from tcpexporter.web import server
from tcpexporter.web.guard import Web
from tests.pki import (
    CA,
    CLIENT,
    MTLS,
    STRANGER,
    TLS,
    client_context,
    users,
    write_pair,
    write_web,
)
from tests.support import eventually
from tests.unit.web.test_server import (
    LOOPBACK,
    PATIENCE_S,
    Answer,
    Flaky,
    dial,
    dropped_while_sending,
    read_all,
    serving,
)

INTERVAL_S = 0.05


def basic(name: str, password: str) -> dict[str, str]:
    told = base64.b64encode(f"{name}:{password}".encode()).decode()
    return {"Authorization": f"Basic {told}"}


ALICE = basic("alice", "wonderland")


def make_web(path: str) -> Web:
    reader = Reader(None, web_config=path)
    with contextlib.closing(reader):
        return Web(path, reader.receive())


class Served:
    """A configuration in a directory of its own, and what serves with it."""

    def __init__(self, directory: Path, config: str) -> None:
        self.directory = directory
        self.path = write_web(directory, config)
        self.reader = Reader(None, web_config=self.path, interval_s=INTERVAL_S)
        self.web = Web(self.path, self.reader.receive())
        self.following = Reloading(
            self.reader,
            ReloadSignal(),
            Supervisor(None, None),
            Reloads(),
        )
        self.following.follow({WEB_CONFIG: self.web.replace})
        registry = CollectorRegistry()
        registry.register(Flaky())
        self.app = server.App(
            registry, ready=lambda: None, settings={}, version="1", web=self.web
        )
        self.sockets = server.listen(LOOPBACK, 0)
        self.port: int = self.sockets[0].getsockname()[1]

    def ask(
        self, context: ssl.SSLContext | None = None, path: str = "/metrics", **headers: str
    ) -> Answer:
        connection = self.connect(context)
        with contextlib.closing(connection):
            return ask_on(connection, path, **headers)

    def connect(self, context: ssl.SSLContext | None = None) -> http.client.HTTPConnection:
        if context is None:
            return http.client.HTTPConnection(LOOPBACK, self.port, timeout=PATIENCE_S)
        return http.client.HTTPSConnection(
            LOOPBACK, self.port, timeout=PATIENCE_S, context=context
        )

    def close(self) -> None:
        self.following.close()
        self.reader.close()

    def write(self, config: str) -> None:
        """In place, not by a rename."""
        Path(self.path).write_text(config)


def ask_on(connection: http.client.HTTPConnection, path: str, **headers: str) -> Answer:
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


Serve = Callable[[str], Served]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serve with a configuration, until the end of the test."""
    monkeypatch.setattr(server._Server, "capture_signals", contextlib.nullcontext)
    with contextlib.ExitStack() as running:

        def serve_one(config: str) -> Served:
            served = Served(tmp_path, config)
            running.enter_context(contextlib.closing(served))
            running.enter_context(serving(served.app, served.sockets))
            return served

        yield serve_one


def certificate_of(served: Served) -> bytes:
    """What it shows to a new client."""
    with (
        dial(served.port) as sock,
        client_context(CLIENT).wrap_socket(sock, server_hostname=LOOPBACK) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def handshake(served: Served, context: ssl.SSLContext) -> tuple[str, str] | None:
    """The TLS version and cipher that are agreed upon; None: none are."""
    with dial(served.port) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=LOOPBACK) as secure:
                cipher = secure.cipher()
                assert cipher
                return secure.version() or "", cipher[0]
        except (ssl.SSLError, ConnectionError):
            return None


# Who gets in


def test_plain(serve: Serve) -> None:
    """An empty file changes nothing."""
    assert serve("").ask().status == 200


def test_tls(serve: Serve) -> None:
    """A client that trusts our authority gets the page, again and again."""
    served = serve(TLS)
    connection = served.connect(client_context())
    with contextlib.closing(connection):
        for _ in range(3):
            answer = ask_on(connection, "/metrics")
            assert (answer.status, b"connections 7" in answer.body) == (200, True)


@pytest.mark.parametrize(("notify", "fin"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_request_and_the_end_of_its_direction(
    serve: Serve, version: ssl.TLSVersion, *, notify: bool, fin: bool
) -> None:
    """Requests followed by close_notify, FIN or both are answered, and the end is told.

    A fault of this kind takes the end of one direction for the end of both.
    """
    served = serve(TLS)
    context = client_context()
    context.minimum_version = context.maximum_version = version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=LOOPBACK)
    with dial(served.port) as sock:

        def until_done(step: Callable[[], object]) -> None:
            while True:
                try:
                    step()
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
                else:
                    return sock.sendall(outgoing.read())

        until_done(tls.do_handshake)
        tls.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        if notify:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.unwrap()
        sock.sendall(outgoing.read())
        if fin:
            sock.shutdown(socket.SHUT_WR)
        incoming.write(read_all(sock))
        incoming.write_eof()
    received = b""
    with contextlib.suppress(ssl.SSLZeroReturnError, ssl.SSLEOFError):
        while chunk := tls.read(65536):
            received += chunk
    assert received.count(b"\nconnections 7.0\n") == 3


def test_inline_pem(serve: Serve, tmp_path: Path) -> None:
    """The certificate and its key, in the file itself."""
    pair = write_pair(tmp_path)
    cert = pair.cert_chain_pems[0].bytes().decode()
    key = pair.private_key_pem.bytes().decode()
    served = serve("tls_server_config: " + json.dumps({"cert": cert, "key": key}))
    assert certificate_of(served) == ssl.PEM_cert_to_DER_cert(cert)


def test_a_password_that_is_checked_after_fin(serve: Serve) -> None:
    """The response comes when a thread has checked the password, be it right or wrong."""
    served = serve(users(alice="wonderland"))
    for password, status in (("looking-glass", 401), ("wonderland", 200)):
        authorization = basic("alice", password)["Authorization"]
        with dial(served.port) as sock:
            sock.sendall(
                f"GET /metrics HTTP/1.0\r\nAuthorization: {authorization}\r\n\r\n".encode()
            )
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock).startswith(f"HTTP/1.1 {status} ".encode())


def test_plain_http_to_a_tls_port(serve: Serve) -> None:
    """A client that forgot the s is told so, and let go."""
    served = serve(TLS)
    with dial(served.port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTPS" in read_all(sock)
    assert served.ask(client_context()).status == 200


@pytest.mark.parametrize(
    ("policy", "bare", "ours", "strangers"),
    [
        ("", True, True, True),
        ("client_auth_type: NoClientCert", True, True, True),
        ("client_auth_type: VerifyClientCertIfGiven", True, False, False),
        (
            "client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.pem",
            True,
            True,
            False,
        ),
        (
            "client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem",
            False,
            True,
            False,
        ),
        ("client_auth_type: RequireAndVerifyClientCert", False, False, False),
    ],
)
def test_client_auth_type(
    serve: Serve, policy: str, *, bare: bool, ours: bool, strangers: bool
) -> None:
    """Clients without a certificate, with one of our authority's, with another's."""
    served = serve(f"{TLS}  {policy}\n")
    assert admitted(served, None) == bare
    assert admitted(served, CLIENT) == ours
    assert admitted(served, STRANGER) == strangers


def admitted(served: Served, certificate: trustme.LeafCert | None) -> bool:
    try:
        return served.ask(client_context(certificate)).status == 200
    except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected):
        return False


@pytest.mark.parametrize(
    ("allowed", "admits"),
    [
        ("[scraper.example]", True),
        ("[one, prometheus@example.org, two]", True),
        ("[192.0.2.7]", True),
        ("['2001:db8::7']", True),
        ("[bad]", False),
        ("['*.example', example, SCRAPER.EXAMPLE]", False),
        ("[]", False),
    ],
)
def test_client_allowed_sans(serve: Serve, allowed: str, *, admits: bool) -> None:
    """A certificate must be for one of the names, exactly; others see no page at all."""
    served = serve(f"{MTLS}  client_allowed_sans: {allowed}\n")
    assert admitted(served, CLIENT) == admits


def test_allowed_sans_ask_for_a_certificate(serve: Serve) -> None:
    """Where a certificate may be left out, the names still must be there."""
    policy = "client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.pem"
    served = serve(f"{TLS}  {policy}\n  client_allowed_sans: [scraper.example]\n")
    assert admitted(served, CLIENT)
    assert not admitted(served, None)


def client_of(*, version: str | None = None, ciphers: str | None = None) -> ssl.SSLContext:
    context = client_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if version:
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        context.set_ciphers(ciphers or "DEFAULT:@SECLEVEL=0")
    return context


@pytest.mark.parametrize(
    ("lines", "versions"),
    [
        ("", ["TLSv1_2", "TLSv1_3"]),
        ("min_version: TLS13", ["TLSv1_3"]),
        ("max_version: TLS12", ["TLSv1_2"]),
        ("min_version: TLS10", ["TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"]),
        ("min_version: TLS11\n  max_version: TLS12", ["TLSv1_1", "TLSv1_2"]),
        ("cipher_suites: [TLS_AES_128_GCM_SHA256]", ["TLSv1_3"]),
    ],
)
def test_versions(serve: Serve, lines: str, versions: list[str]) -> None:
    """The versions of TLS that are spoken."""
    served = serve(f"{TLS}  {lines}\n")
    every = ["TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"]
    spoken = [each for each in every if handshake(served, client_of(version=each))]
    assert spoken == versions


AES128, AES256 = "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"
GO128, GO256 = (
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
)


@pytest.mark.parametrize(
    ("lines", "offered", "agreed"),
    [
        (f"cipher_suites: [{GO128}, {GO256}]", [AES128], AES128),
        (f"cipher_suites: [{GO128}, {GO256}]", ["ECDHE-ECDSA-AES256-SHA"], None),
        ("", ["ECDHE-ECDSA-AES256-SHA"], "ECDHE-ECDSA-AES256-SHA"),
        ("", ["ECDHE-ECDSA-AES256-CCM", "AES128-SHA"], None),
        (f"cipher_suites: [{GO256}, {GO128}]", [AES128, AES256], AES256),
        (
            f"cipher_suites: [{GO256}, {GO128}]\n  prefer_server_cipher_suites: false",
            [AES128, AES256],
            AES128,
        ),
    ],
)
def test_cipher_suites(
    serve: Serve, lines: str, offered: list[str], agreed: str | None
) -> None:
    """Which is agreed upon with TLS 1.2, and by whose preference."""
    served = serve(f"{TLS}  {lines}\n")
    client = client_of(version="TLSv1_2", ciphers=":".join(offered))
    found = handshake(served, client)
    assert (found and found[1]) == agreed


@pytest.mark.parametrize(
    ("ours", "curve", "agreed"),
    [
        ("CurveP521", "secp521r1", True),
        ("CurveP521", "secp384r1", False),
        ("CurveP256", "prime256v1", True),
        ("CurveP384", "secp384r1", True),
    ],
)
def test_curve_preferences(serve: Serve, ours: str, curve: str, *, agreed: bool) -> None:
    """One curve, and no other."""
    served = serve(f"{TLS}  min_version: TLS13\n  curve_preferences: [{ours}]\n")
    client = client_context()
    client.set_ecdh_curve(curve)
    assert bool(handshake(served, client)) == agreed


# What a page takes and has besides


def test_passwords(serve: Serve) -> None:
    """Every page takes a known name with its password, health and readiness too."""
    served = serve(users(alice="wonderland"))
    for path in ("/", "/metrics", "/-/healthy", "/-/ready", "/nowhere"):
        for headers in ({}, basic("alice", "wrong"), basic("eve", "wonderland")):
            refused = served.ask(None, path, **headers)
            assert refused.status == 401
            assert refused.headers["www-authenticate"].startswith("Basic ")
            assert b"connections" not in refused.body
        expected = 404 if path == "/nowhere" else 200
        assert served.ask(None, path, **ALICE).status == expected


def test_headers(serve: Serve) -> None:
    """All responses have them, and ours where they are the same."""
    served = serve(f"""
http_server_config:
  headers:
    X-Frame-Options: deny
    Content-Security-Policy: default-src 'self'
{users(alice="wonderland")}""")
    for path, headers in itertools.product(("/", "/metrics"), ({}, ALICE)):
        answer = served.ask(None, path, **headers)
        assert answer.headers.get_all("x-frame-options") == ["deny"]
        assert answer.headers.get_all("content-security-policy") == ["default-src 'self'"]


def test_rate_limit(serve: Serve) -> None:
    """Of more requests than the burst the rest are refused, whoever asks."""
    served = serve("rate_limit: {interval: 1h, burst: 3}")
    statuses = [served.ask().status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]


# What clients cannot do


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.5)


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("begun", [b"", HELLO])
def test_half_a_handshake(serve: Serve, begun: bytes) -> None:
    """Who sends nothing, or the beginning of a hello, is dropped like others."""
    served = serve(TLS)
    with dial(served.port) as sock:
        sock.sendall(begun)
        assert read_all(sock) == b""
    assert served.ask(client_context()).status == 200


@pytest.mark.usefixtures("short")
def test_a_drop_at_a_time_does_not_help(serve: Serve) -> None:
    """Nor is who sends the hello byte by byte given more time."""
    served = serve(TLS)
    with dial(served.port) as sock:
        sock.sendall(HELLO)
        assert dropped_while_sending(sock, b"\0", every_s=0.05)


@pytest.mark.usefixtures("short")
def test_who_is_silent_after_the_handshake(serve: Serve) -> None:
    """The time that the handshake took counts: the request has to come in the rest."""
    served = serve(TLS)
    with (
        dial(served.port) as sock,
        client_context().wrap_socket(sock, server_hostname=LOOPBACK) as secure,
        contextlib.suppress(ssl.SSLError),  # no farewell for such
    ):
        assert secure.recv(1) == b""


def test_half_handshakes_take_places_like_others(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are places: who has waited longest goes, and a scrape gets in."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 8)
    served = serve(TLS)
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(dial(served.port)) for _ in range(20)]
        for sock in socks[:12]:
            assert read_all(sock) == b""
        assert served.ask(client_context()).status == 200
        socks[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # it still has its place
            socks[-1].recv(1)


def test_nothing_of_openssl_is_left_to_collect(serve: Serve) -> None:
    """What it has for a client is freed with the connection: Python collects seldom."""
    served = serve(TLS)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            assert served.ask(client_context()).status == 200
            with dial(served.port) as sock:
                sock.sendall(HELLO)
        end = time.monotonic() + PATIENCE_S
        while of_the_server() > 2:
            assert time.monotonic() < end
            assert served.ask(client_context()).status == 200
    finally:
        gc.enable()


def of_the_server() -> int:
    return sum(
        isinstance(each, ssl.SSLObject) and each.server_side for each in gc.get_objects()
    )


@pytest.mark.usefixtures("short")
def test_who_does_not_take_the_page(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks and does not read is dropped, as without TLS."""
    page = server._Response(200, bytes(1 << 24))
    monkeypatch.setattr(server, "_exposition", lambda *_: page)
    served = serve(TLS)
    with (
        socket.socket() as sock,
        client_context().wrap_socket(sock, server_hostname=LOOPBACK) as secure,
    ):
        secure.settimeout(PATIENCE_S)
        secure.connect((LOOPBACK, served.port))
        secure.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.5)
        received = 0
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while chunk := secure.recv(1 << 16):
                received += len(chunk)
        assert received < 1 << 24


def test_a_large_page_arrives_whole(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many records and writes it takes."""
    body = os.urandom(5_000_003)
    monkeypatch.setattr(server, "_exposition", lambda *_: server._Response(200, body))
    assert serve(TLS).ask(client_context()).body == body


def test_requests_at_once_on_one_connection(serve: Serve) -> None:
    """What was sent without waiting is answered, though reading was paused between."""
    served = serve(TLS)
    with (
        dial(served.port) as sock,
        client_context().wrap_socket(sock, server_hostname=LOOPBACK) as secure,
    ):
        request = b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n"
        secure.sendall((request + b"\r\n") * 300 + request + b"Connection: close\r\n\r\n")
        received = b""
        while chunk := secure.recv(65536):
            received += chunk
    assert received.count(b"HTTP/1.1 200 ") == 301


def test_the_end_is_said(serve: Serve) -> None:
    """A closed connection ends with a close_notify, so it is not taken for cut off."""
    served = serve(TLS)
    with (
        dial(served.port) as sock,
        client_context().wrap_socket(
            sock, server_hostname=LOOPBACK, suppress_ragged_eofs=False
        ) as secure,
    ):
        secure.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while secure.recv(65536):
            pass


# Reading again


def read_again(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.messages.count("the web configuration has been read again")


def test_a_new_certificate(serve: Serve) -> None:
    """New connections have it; those from before go on."""
    served = serve(MTLS)
    before = certificate_of(served)
    connection = served.connect(client_context(CLIENT))
    with contextlib.closing(connection):
        assert ask_on(connection, "/metrics").status == 200
        write_pair(served.directory)
        eventually(lambda: certificate_of(served) != before)
        assert ask_on(connection, "/metrics").status == 200


def test_new_users(serve: Serve) -> None:
    """Who was admitted, and remembered, is not any more, even on the same connection."""
    served = serve(users(alice="wonderland"))
    connection = served.connect()
    with contextlib.closing(connection):
        assert ask_on(connection, "/metrics", **ALICE).status == 200
        served.write(users(alice="looking-glass"))
        eventually(lambda: ask_on(connection, "/metrics", **ALICE).status == 401)
        new = basic("alice", "looking-glass")
        assert ask_on(connection, "/metrics", **new).status == 200


def test_a_file_that_is_named_later(serve: Serve) -> None:
    """A configuration may name other files than at the start; they are watched, too."""
    served = serve(TLS)
    assert served.ask(client_context()).status == 200
    served.write(MTLS)
    eventually(lambda: not admitted(served, None))
    other = trustme.CA()
    other.cert_pem.write_to_path(served.directory / "ca.pem")
    eventually(lambda: not admitted(served, CLIENT))
    CA.cert_pem.write_to_path(served.directory / "ca.pem")
    eventually(lambda: admitted(served, CLIENT))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("rate_limit: {", "not YAML"),
        (f"{TLS}  client_ca_file: absent\n", "absent cannot be read"),
        (MTLS.replace("client_ca_file: ca.pem", "client_ca: x"), "client CA"),
        ("", "TLS is turned on or off"),
    ],
)
def test_what_cannot_be_used_leaves_all_as_it_was(
    serve: Serve, caplog: pytest.LogCaptureFixture, config: str, sentence: str
) -> None:
    """One warning that says why, and scrapes go on; until it can be used again."""
    caplog.set_level(logging.INFO)
    served = serve(TLS)
    served.write(config)
    eventually(lambda: any(sentence in each for each in caplog.messages))
    time.sleep(5 * INTERVAL_S)
    (warning,) = (each for each in caplog.records if each.levelname == "WARNING")
    assert "reload of web configuration failed" in warning.message
    assert served.ask(client_context()).status == 200
    served.write(TLS + users(alice="wonderland"))
    eventually(lambda: served.ask(client_context()).status == 401)
    assert read_again(caplog) == 1


def test_a_reader_that_has_gone(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """One warning with the remedy, and scrapes go on."""
    served = serve(TLS)
    os.kill(served.reader.process, 9)
    eventually(lambda: any("restart" in each for each in caplog.messages))
    assert served.ask(client_context()).status == 200


def test_no_scrape_fails_while_all_is_replaced(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Scrapes in a loop, one always in progress, while certificates and users change."""
    caplog.set_level(logging.INFO)
    keep = users(alice="wonderland", bob="looking-glass")
    drop = users(alice="wonderland")
    served = serve(MTLS + keep)
    context = client_context(CLIENT)
    done = threading.Event()
    outcomes: list[object] = []
    shown: set[bytes] = set()

    def scrape() -> None:
        kept = served.connect(context)
        while not done.is_set():
            try:
                outcomes.append(served.ask(context, **ALICE).status)
                outcomes.append(ask_on(kept, "/metrics", **ALICE).status)
            except Exception as error:
                outcomes.append(error)
                raise
        kept.close()

    def hold() -> None:
        """Begin a request under one configuration and end it under another."""
        while not done.is_set():
            with (
                dial(served.port) as sock,
                context.wrap_socket(sock, server_hostname=LOOPBACK) as secure,
            ):
                shown.add(secure.getpeercert(binary_form=True) or b"")
                secure.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
                time.sleep(3 * INTERVAL_S)
                secure.sendall(f"Authorization: {ALICE['Authorization']}\r\n\r\n".encode())
                outcomes.append(200 if b" 200 " in secure.recv(65536) else "no answer")

    threads = [threading.Thread(target=each) for each in (scrape, scrape, hold)]
    for each in threads:
        each.start()
    try:
        for turn in range(20):
            write_pair(served.directory)
            served.write(MTLS + (drop if turn % 2 else keep))
            expected = read_again(caplog) + 1
            eventually(lambda: read_again(caplog) >= expected)  # noqa: B023
    finally:
        done.set()
        for each in threads:
            each.join()
    assert len(outcomes) > 40
    assert set(outcomes) == {200}
    assert len(shown) > 3


# At the start


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (f"{TLS}x: 1", "web.yml line 4: the file has no 'x'"),
        (TLS.replace("server.key", "ca.pem"), "the certificate and its key do not do: one"),
        (TLS.replace("server.crt", "ca.pem"), "they do not belong together"),
        (TLS.replace("server.crt", "nowhere"), "nowhere cannot be read: No such file"),
        (TLS.replace("server.crt", "."), "cannot be read: Is a directory"),
        (
            TLS.replace("server.crt", "/dev/null"),
            "/dev/null cannot be read: it is not a regular file",
        ),
        (MTLS.replace("ca.pem", "server.key"), "there is no certificate in it"),
    ],
)
def test_refused_at_the_start(tmp_path: Path, config: str, sentence: str) -> None:
    """One sentence that begins with the file."""
    path = write_web(tmp_path, config)
    with pytest.raises(SettingsError) as refused:
        make_web(path)
    told = str(refused.value)
    assert told.startswith(path)
    assert sentence in told
    assert "\n" not in told


def test_no_file(tmp_path: Path) -> None:
    """The file itself is not there."""
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        make_web(str(tmp_path / "absent"))


def test_a_key_with_a_passphrase(tmp_path: Path) -> None:
    """It is refused, not asked for on a terminal that nobody looks at."""
    path = write_web(tmp_path, TLS)
    pem = write_pair(tmp_path).private_key_pem.bytes()
    encrypted = serialization.load_pem_private_key(pem, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "server.key").write_bytes(encrypted)
    with pytest.raises(SettingsError, match="the key is encrypted"):
        make_web(path)
