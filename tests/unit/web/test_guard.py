# SPDX-License-Identifier: GPL-3.0-only
"""--web-config over real sockets on loopback: TLS, passwords, headers, reloads."""

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
from tcpexporter.config.reload import Reloading, ReloadSignal
from tcpexporter.errors import SettingsError
from tcpexporter.host.systemd import Supervisor
from tcpexporter.metrics.reload_status import Reloads
from tcpexporter.web import connection, http1, http_clients, pages
from tcpexporter.web.guard import Guard
from tcpexporter.web.listen import listen
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
from tests.unit.web.support import (
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
    encoded = base64.b64encode(f"{name}:{password}".encode()).decode()
    return {"Authorization": f"Basic {encoded}"}


ALICE = basic("alice", "wonderland")


def make_guard(path: str) -> Guard:
    reader = Reader(None, web_config=path)
    with contextlib.closing(reader):
        return Guard(path, reader.receive().accepted())


class Served:
    """A configuration in its own directory, and a server that follows it."""

    def __init__(self, directory: Path, config: str) -> None:
        self.directory = directory
        self.path = write_web(directory, config)
        self.reader = Reader(None, web_config=self.path, interval_s=INTERVAL_S)
        self.guard = Guard(self.path, self.reader.receive().accepted())
        self.following = Reloading(
            self.reader,
            ReloadSignal(),
            Supervisor(None, None),
            Reloads(),
        )
        self.following.follow(
            {WEB_CONFIG: lambda read: self.guard.replace(read.accepted())}
        )
        registry = CollectorRegistry()
        registry.register(Flaky())
        self.app = pages.App(
            registry, ready=lambda: None, settings={}, version="1", guard=self.guard
        )
        self.sockets = listen(LOOPBACK, 0)
        self.port: int = self.sockets[0].getsockname()[1]

    def ask(
        self, context: ssl.SSLContext | None = None, path: str = "/metrics", **headers: str
    ) -> Answer:
        client = self.connect(context)
        with contextlib.closing(client):
            return ask_on(client, path, **headers)

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
        """Overwrite the file in place, without a rename."""
        Path(self.path).write_text(config)


def ask_on(client: http.client.HTTPConnection, path: str, **headers: str) -> Answer:
    client.request("GET", path, headers=headers)
    response = client.getresponse()
    return Answer(response.status, response.headers, response.read())


Serve = Callable[[str], Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve with a configuration, until the end of the test."""
    with contextlib.ExitStack() as running:

        def serve_one(config: str) -> Served:
            served = Served(tmp_path, config)
            running.enter_context(contextlib.closing(served))
            running.enter_context(serving(served.app, served.sockets))
            return served

        yield serve_one


def certificate_of(served: Served) -> bytes:
    """Return the certificate that a new client gets, as DER."""
    with (
        dial(served.port) as sock,
        client_context(CLIENT).wrap_socket(sock, server_hostname=LOOPBACK) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def handshake(served: Served, context: ssl.SSLContext) -> tuple[str, str] | None:
    """Return the negotiated TLS version and cipher; None if the handshake fails."""
    with dial(served.port) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=LOOPBACK) as secure:
                cipher = secure.cipher()
                assert cipher
                return secure.version() or "", cipher[0]
        except (ssl.SSLError, ConnectionError):
            return None


# Clients that may connect


def test_an_empty_configuration_serves_every_client(serve: Serve) -> None:
    """Neither TLS nor a password is required."""
    assert serve("").ask().status == 200


def test_tls_clients_that_trust_the_ca_are_served(serve: Serve) -> None:
    """One connection serves several requests."""
    served = serve(TLS)
    client = served.connect(client_context())
    with contextlib.closing(client):
        for _ in range(3):
            answer = ask_on(client, "/metrics")
            assert (answer.status, b"connections 7" in answer.body) == (200, True)


@pytest.mark.parametrize(("notify", "fin"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_requests_before_the_end_of_input_get_responses(
    serve: Serve, version: ssl.TLSVersion, *, notify: bool, fin: bool
) -> None:
    """The client ends with close_notify, FIN or both.

    The server responds first, and then sends close_notify. The kind of fault: the server
    closes both directions when one ends.
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


def test_the_configuration_may_contain_certificate_and_key(
    serve: Serve, tmp_path: Path
) -> None:
    """They are PEM texts in the file instead of paths."""
    pair = write_pair(tmp_path)
    cert = pair.cert_chain_pems[0].bytes().decode()
    key = pair.private_key_pem.bytes().decode()
    served = serve("tls_server_config: " + json.dumps({"cert": cert, "key": key}))
    assert certificate_of(served) == ssl.PEM_cert_to_DER_cert(cert)


def test_a_password_is_checked_after_a_fin(serve: Serve) -> None:
    """The response comes after the check, for a correct and for a wrong password."""
    served = serve(users(alice="wonderland"))
    for password, status in (("looking-glass", 401), ("wonderland", 200)):
        authorization = basic("alice", password)["Authorization"]
        with dial(served.port) as sock:
            sock.sendall(
                f"GET /metrics HTTP/1.0\r\nAuthorization: {authorization}\r\n\r\n".encode()
            )
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock).startswith(f"HTTP/1.1 {status} ".encode())


def test_plain_http_to_a_tls_port_gets_a_hint(serve: Serve) -> None:
    """The response names HTTPS, and the connection is closed."""
    served = serve(TLS)
    with dial(served.port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTPS" in read_all(sock)
    assert served.ask(client_context()).status == 200


@pytest.mark.parametrize(
    ("policy", "without", "trusted", "untrusted"),
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
def test_client_auth_type_selects_accepted_certificates(
    serve: Serve, policy: str, *, without: bool, trusted: bool, untrusted: bool
) -> None:
    """Clients have no certificate, one of the trusted CA, or one of another CA."""
    served = serve(f"{TLS}  {policy}\n")
    assert accepted(served, None) == without
    assert accepted(served, CLIENT) == trusted
    assert accepted(served, STRANGER) == untrusted


def accepted(served: Served, certificate: trustme.LeafCert | None) -> bool:
    try:
        return served.ask(client_context(certificate)).status == 200
    except (ssl.SSLError, ConnectionError, http.client.RemoteDisconnected):
        return False


@pytest.mark.parametrize(
    ("allowed", "accepts"),
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
def test_client_allowed_sans_selects_certificates(
    serve: Serve, allowed: str, *, accepts: bool
) -> None:
    """The certificate must have one of the names literally, without wildcards."""
    served = serve(f"{MTLS}  client_allowed_sans: {allowed}\n")
    assert accepted(served, CLIENT) == accepts


def test_client_allowed_sans_requires_a_certificate(serve: Serve) -> None:
    """This holds even if client_auth_type does not require one."""
    policy = "client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.pem"
    served = serve(f"{TLS}  {policy}\n  client_allowed_sans: [scraper.example]\n")
    assert accepted(served, CLIENT)
    assert not accepted(served, None)


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
def test_tls_versions_are_limited(serve: Serve, lines: str, versions: list[str]) -> None:
    """A handshake succeeds with each allowed version only."""
    served = serve(f"{TLS}  {lines}\n")
    every = ["TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"]
    succeeded = [each for each in every if handshake(served, client_of(version=each))]
    assert succeeded == versions


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
def test_the_cipher_suite_is_negotiated(
    serve: Serve, lines: str, offered: list[str], agreed: str | None
) -> None:
    """TLS 1.2 uses the server's or the client's preference, as configured."""
    served = serve(f"{TLS}  {lines}\n")
    client = client_of(version="TLSv1_2", ciphers=":".join(offered))
    found = handshake(served, client)
    assert (found and found[1]) == agreed


@pytest.mark.parametrize(
    ("configured", "curve", "agreed"),
    [
        ("CurveP521", "secp521r1", True),
        ("CurveP521", "secp384r1", False),
        ("CurveP256", "prime256v1", True),
        ("CurveP384", "secp384r1", True),
    ],
)
def test_the_curve_is_required(
    serve: Serve, configured: str, curve: str, *, agreed: bool
) -> None:
    """The handshake succeeds with the configured curve only."""
    served = serve(f"{TLS}  min_version: TLS13\n  curve_preferences: [{configured}]\n")
    client = client_context()
    client.set_ecdh_curve(curve)
    assert bool(handshake(served, client)) == agreed


# Passwords, headers, rate limit


def test_each_page_requires_a_password(serve: Serve) -> None:
    """The pages of health and readiness require a name and its password too."""
    served = serve(users(alice="wonderland"))
    for path in ("/", "/metrics", "/-/healthy", "/-/ready", "/nowhere"):
        for headers in ({}, basic("alice", "wrong"), basic("eve", "wonderland")):
            refused = served.ask(None, path, **headers)
            assert refused.status == 401
            assert refused.headers["www-authenticate"].startswith("Basic ")
            assert b"connections" not in refused.body
        expected = 404 if path == "/nowhere" else 200
        assert served.ask(None, path, **ALICE).status == expected


def test_configured_headers_are_in_all_responses(serve: Serve) -> None:
    """They replace the exporter's own headers of the same name."""
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


def test_requests_beyond_the_rate_limit_are_refused(serve: Serve) -> None:
    """As many requests as the burst are allowed at once."""
    served = serve("rate_limit: {interval: 1h, burst: 3}")
    statuses = [served.ask().status for _ in range(5)]
    assert statuses == [200, 200, 200, 429, 429]


# Limits for TLS clients


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_TIMEOUT_S", 0.5)


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("begun", [b"", HELLO])
def test_a_client_that_does_not_complete_the_handshake_is_dropped(
    serve: Serve, begun: bytes
) -> None:
    """The client sends nothing, or the beginning of a ClientHello."""
    served = serve(TLS)
    with dial(served.port) as sock:
        sock.sendall(begun)
        assert read_all(sock) == b""
    assert served.ask(client_context()).status == 200


@pytest.mark.usefixtures("short")
def test_a_client_that_sends_its_hello_slowly_is_dropped(serve: Serve) -> None:
    """Bytes that arrive do not extend the deadline."""
    served = serve(TLS)
    with dial(served.port) as sock:
        sock.sendall(HELLO)
        assert dropped_while_sending(sock, b"\0", every_s=0.05)


@pytest.mark.usefixtures("short")
def test_a_client_that_is_silent_after_the_handshake_is_dropped(serve: Serve) -> None:
    """The deadline begins with the connect and includes the handshake."""
    served = serve(TLS)
    with (
        dial(served.port) as sock,
        client_context().wrap_socket(sock, server_hostname=LOOPBACK) as secure,
        contextlib.suppress(ssl.SSLError, ConnectionResetError),  # no close_notify
    ):
        assert secure.recv(1) == b""


def test_unfinished_tls_handshakes_count_against_the_connection_limit(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clients that have waited longest are evicted, and a scrape gets its response."""
    monkeypatch.setattr(http_clients, "MAX_CONNECTIONS", 8)
    served = serve(TLS)
    with contextlib.ExitStack() as held:
        socks = [held.enter_context(dial(served.port)) for _ in range(20)]
        for sock in socks[:12]:
            assert read_all(sock) == b""
        assert served.ask(client_context()).status == 200
        socks[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # the last one still has its slot
            socks[-1].recv(1)


def test_openssl_objects_are_freed_without_the_garbage_collector(serve: Serve) -> None:
    """They are freed when the connection closes, by reference counting."""
    served = serve(TLS)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            assert served.ask(client_context()).status == 200
            with dial(served.port) as sock:
                sock.sendall(HELLO)
        end = time.monotonic() + PATIENCE_S
        while server_side_objects() > 2:
            assert time.monotonic() < end
            assert served.ask(client_context()).status == 200
    finally:
        gc.enable()


def server_side_objects() -> int:
    return sum(
        # Another thread can be creating one, which has no attributes yet.
        isinstance(each, ssl.SSLObject) and bool(vars(each)) and each.server_side
        for each in gc.get_objects()
    )


@pytest.mark.usefixtures("short")
def test_a_client_that_does_not_read_the_page_is_dropped(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit for slow readers also works with TLS."""
    page = http1.Response(200, bytes(1 << 24))
    monkeypatch.setattr(pages, "_exposition_response", lambda *_: page)
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


def test_a_large_page_arrives_completely(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of 5 MB needs many TLS records and writes."""
    body = os.urandom(5_000_003)
    monkeypatch.setattr(pages, "_exposition_response", lambda *_: http1.Response(200, body))
    assert serve(TLS).ask(client_context()).body == body


def test_pipelined_tls_requests_get_responses(serve: Serve) -> None:
    """Responses continue after reading was paused between requests."""
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


def test_a_connection_ends_with_close_notify(serve: Serve) -> None:
    """Without it a client cannot distinguish the end of a response from a truncated one."""
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


# Reloads


def reloads(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.messages.count("web configuration reloaded")


def test_new_connections_get_the_new_certificate(serve: Serve) -> None:
    """Existing connections continue with the old one."""
    served = serve(MTLS)
    before = certificate_of(served)
    client = served.connect(client_context(CLIENT))
    with contextlib.closing(client):
        assert ask_on(client, "/metrics").status == 200
        write_pair(served.directory)
        eventually(lambda: certificate_of(served) != before)
        assert ask_on(client, "/metrics").status == 200


def test_removed_users_are_refused_after_a_reload(serve: Serve) -> None:
    """A remembered password is refused too, even on the same connection."""
    served = serve(users(alice="wonderland"))
    client = served.connect()
    with contextlib.closing(client):
        assert ask_on(client, "/metrics", **ALICE).status == 200
        served.write(users(alice="looking-glass"))
        eventually(lambda: ask_on(client, "/metrics", **ALICE).status == 401)
        new = basic("alice", "looking-glass")
        assert ask_on(client, "/metrics", **new).status == 200


def test_a_file_named_by_a_reload_is_watched(serve: Serve) -> None:
    """A change of a file that only the second configuration names has an effect."""
    served = serve(TLS)
    assert served.ask(client_context()).status == 200
    served.write(MTLS)
    eventually(lambda: not accepted(served, None))
    other = trustme.CA()
    other.cert_pem.write_to_path(served.directory / "ca.pem")
    eventually(lambda: not accepted(served, CLIENT))
    CA.cert_pem.write_to_path(served.directory / "ca.pem")
    eventually(lambda: accepted(served, CLIENT))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("rate_limit: {", "not YAML"),
        (f"{TLS}  client_ca_file: absent\n", "absent cannot be read"),
        (MTLS.replace("client_ca_file: ca.pem", "client_ca: x"), "client CA"),
        ("", "turning TLS on or off"),
    ],
)
def test_after_a_failed_reload_the_previous_configuration_stays(
    serve: Serve, caplog: pytest.LogCaptureFixture, config: str, sentence: str
) -> None:
    """One warning has the reason, scrapes continue, and a later valid file is used."""
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
    assert reloads(caplog) == 1


def test_scrapes_continue_after_the_reader_process_ended(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning has the remedy."""
    served = serve(TLS)
    os.kill(served.reader.process, 9)
    eventually(lambda: any("restart" in each for each in caplog.messages))
    assert served.ask(client_context()).status == 200


def test_no_scrape_fails_during_reloads(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Scrapes run in loops, one always in progress, while certificates and users change."""
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
            expected = reloads(caplog) + 1
            eventually(lambda: reloads(caplog) >= expected)  # noqa: B023
    finally:
        done.set()
        for each in threads:
            each.join()
    assert len(outcomes) > 40
    assert set(outcomes) == {200}
    assert len(shown) > 3


# Configurations that are refused at the start


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (f"{TLS}x: 1", "web.yml line 4: the file has no 'x'"),
        (TLS.replace("server.key", "ca.pem"), "cannot load the certificate and key: one"),
        (TLS.replace("server.crt", "ca.pem"), "the key does not match the certificate"),
        (TLS.replace("server.crt", "nowhere"), "nowhere cannot be read: No such file"),
        (TLS.replace("server.crt", "."), "cannot be read: Is a directory"),
        (
            TLS.replace("server.crt", "/dev/null"),
            "/dev/null cannot be read: it is not a regular file",
        ),
        (MTLS.replace("ca.pem", "server.key"), "it contains no certificate"),
    ],
)
def test_an_invalid_configuration_is_refused_at_the_start(
    tmp_path: Path, config: str, sentence: str
) -> None:
    """The error is one sentence that begins with the path of the file."""
    path = write_web(tmp_path, config)
    with pytest.raises(SettingsError) as refused:
        make_guard(path)
    message = str(refused.value)
    assert message.startswith(path)
    assert sentence in message
    assert "\n" not in message


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    """The error has the path of the file."""
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        make_guard(str(tmp_path / "absent"))


def test_a_key_with_a_passphrase_is_refused(tmp_path: Path) -> None:
    """OpenSSL would otherwise ask for the passphrase on the terminal."""
    path = write_web(tmp_path, TLS)
    pem = write_pair(tmp_path).private_key_pem.bytes()
    encrypted = serialization.load_pem_private_key(pem, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "server.key").write_bytes(encrypted)
    with pytest.raises(SettingsError, match="the key is encrypted"):
        make_guard(path)
