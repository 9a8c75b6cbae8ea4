# SPDX-License-Identifier: GPL-3.0-only
"""Implements TLS: its policy, and the asyncio protocol between a client's socket and HTTP.

asyncio's own TLS protocol reports a client to HTTP only after the handshake, and has a
buffer of 256 KiB per client. With this protocol, a client has a deadline and a connection
slot from the moment it connects.
"""

import asyncio
import contextlib
import logging
import os
import ssl
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Protocol, cast

from tcpexporter.errors import WebConfigError
from tcpexporter.web.config import CIPHERS, NO_CERTIFICATE, VERIFIED_IF_GIVEN, Tls

READ_BYTES = 4 * 1024
"""Size of the buffer for received data of a client, in bytes."""

_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}

# Our words for OpenSSL's reasons; the key None is for errors without a reason.
_REASONS = {
    None: "one of them is not PEM, or has the wrong type",
    "KEY_VALUES_MISMATCH": "the key does not match the certificate",
    "NO_CERTIFICATE_OR_CRL_FOUND": "it contains no certificate",
}

_PLAIN_HTTP = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n"
    b"this port requires HTTPS\n"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsPolicy:
    """The TLS parameters for new connections, and the allowed client certificates."""

    context: ssl.SSLContext
    allowed_sans: frozenset[str] | None
    """A client certificate must have one of these alternative names; None: any name."""

    def allows(self, certificate: Any) -> bool:
        """Return whether a client with this certificate may connect.

        Args:
            certificate: the certificate, as `ssl.SSLObject.getpeercert` returns it.
        """
        if self.allowed_sans is None:
            return True
        names = (certificate or {}).get("subjectAltName", ())
        return not self.allowed_sans.isdisjoint(_as_go_writes(*name) for name in names)


def _as_go_writes(kind: str, name: str) -> str:
    return str(ip_address(name)) if kind == "IP Address" else name


def make_policy(tls: Tls) -> TlsPolicy:
    """Return the policy that a configuration describes.

    Raises:
        WebConfigError: OpenSSL rejects the configuration.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        _set_versions(context, tls)
        _set_ciphers(context, tls)
        if tls.curve:
            context.set_ecdh_curve(tls.curve)
        with (
            _translated("cannot load the certificate and key"),
            _as_file(tls.cert) as cert,
            _as_file(tls.key) as key,
        ):
            context.load_cert_chain(cert, key, password=_refuse_password)
        _set_verification(context, tls)
    except (ssl.SSLError, ValueError) as error:
        raise WebConfigError(f"OpenSSL rejects the TLS configuration: {error}") from error
    sans = tls.client_allowed_sans
    return TlsPolicy(context, None if sans is None else frozenset(sans))


def _set_versions(context: ssl.SSLContext, tls: Tls) -> None:
    minimum = tls.min_version
    if tls.cipher_suites and not set(tls.cipher_suites) & CIPHERS.keys():
        minimum = "TLS13"  # the listed suites are for TLS 1.3 only
    with warnings.catch_warnings():
        # Python warns about versions before TLS 1.2, but the operator has configured them.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.maximum_version = _VERSIONS[tls.max_version]
        context.minimum_version = _VERSIONS[minimum]


def _set_ciphers(context: ssl.SSLContext, tls: Tls) -> None:
    suites = [CIPHERS[each] for each in tls.cipher_suites or CIPHERS if each in CIPHERS]
    if tls.min_version < "TLS12":
        suites.append("@SECLEVEL=0")  # OpenSSL's default level refuses old versions
    if suites:
        context.set_ciphers(":".join(suites))
    if not tls.prefer_server_cipher_suites:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE


def _set_verification(context: ssl.SSLContext, tls: Tls) -> None:
    if tls.client_auth_type == NO_CERTIFICATE:
        return
    given = tls.client_auth_type == VERIFIED_IF_GIVEN
    context.verify_mode = ssl.CERT_OPTIONAL if given else ssl.CERT_REQUIRED
    # As in Go, every certificate in the file is trusted, not only self-signed ones.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if tls.client_ca is None:
        context.set_default_verify_paths()
        return
    with _translated("cannot load the client CA"), _as_file(tls.client_ca) as authorities:
        context.load_verify_locations(authorities)


@contextlib.contextmanager
def _translated(failure: str) -> Iterator[None]:
    """Raise errors of the block as WebConfigError, in a message after ``failure``."""
    try:
        yield
    except ssl.SSLError as error:
        raise WebConfigError(
            f"{failure}: {_REASONS.get(error.reason, error.reason)}"
        ) from error
    except (OSError, ValueError) as error:
        raise WebConfigError(f"{failure}: {error}") from error


@contextlib.contextmanager
def _as_file(pem: str) -> Iterator[str]:
    """Yield the path of a file in memory with this content: ssl loads only from files."""
    with os.fdopen(os.memfd_create("pem"), "wb") as file:
        file.write(pem.encode(errors="surrogateescape"))
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _refuse_password() -> str:
    raise ValueError("the key is encrypted: store it without a passphrase")


class Http(Protocol):
    """The HTTP protocol above TLS.

    ``connection_made`` is called when the client connects, before its handshake. asyncio's
    documentation describes when the other methods are called.
    """

    def connection_made(self, transport: asyncio.Transport) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def get_buffer(self, sizehint: int) -> bytearray: ...
    def buffer_updated(self, nbytes: int) -> None: ...
    def eof_received(self) -> bool: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class TlsTransport(asyncio.BufferedProtocol, asyncio.Transport):
    """The protocol of the client's socket, and the transport of the HTTP protocol.

    Written data is encrypted and passed to the socket's transport at once. So the flow
    control of that transport applies to both.
    """

    _raw: asyncio.Transport

    def __init__(self, policy: TlsPolicy, http: Http) -> None:
        """Prepare for a client."""
        super().__init__()
        self._policy = policy
        self._http = http
        self._buffer = bytearray(READ_BYTES)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = policy.context.wrap_bio(
            self._incoming, self._outgoing, server_side=True
        )
        self._secure = False
        self._paused = False

    # Protocol of the socket

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        self._http.connection_made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)
        # This object and the HTTP protocol refer to each other. Without this deletion, only
        # the garbage collector would free OpenSSL's memory for the client, at least 10 kB.
        del self._tls, self._incoming, self._outgoing

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._incoming.write(memoryview(self._buffer)[:nbytes])
        self._process()

    def eof_received(self) -> bool:
        return self._secure and self._http.eof_received()

    def pause_writing(self) -> None:
        if self._secure:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        if self._secure:
            self._http.resume_writing()

    def _process(self) -> None:
        """Process received bytes: continue the handshake, or pass requests to HTTP."""
        if self._raw.is_closing():
            return
        try:
            if not self._secure:
                self._shake_hands()
            self._read()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            log.debug("TLS connection refused: %s", error.reason)
            if error.reason == "HTTP_REQUEST":
                self._raw.write(_PLAIN_HTTP)
            self._flush()  # sends the TLS alert, which has the reason
            self._raw.close()

    def _shake_hands(self) -> None:
        self._tls.do_handshake()
        self._flush()
        if self._policy.allows(self._tls.getpeercert()):
            self._secure = True
        else:
            log.debug("TLS connection refused: no allowed name in the client certificate")
            self._raw.close()

    def _read(self) -> None:
        while not self._paused and not self._raw.is_closing():
            buffer = self._http.get_buffer(-1)
            # Typeshed does not know that read(size, buffer) returns a number.
            count = cast("int", self._tls.read(len(buffer), buffer))
            if not count:  # close_notify closes one direction only: RFC 8446, section 6.1
                if not self._http.eof_received():
                    self.close()
                return
            self._http.buffer_updated(count)

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._raw.write(self._outgoing.read())

    # Transport of the HTTP protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if data and not self._raw.is_closing():
            self._tls.write(data)
            self._flush()

    def close(self) -> None:
        if self._raw.is_closing():
            return
        had_sent_all = not self._raw.get_write_buffer_size()
        if self._secure:
            # unwrap() raises, because it cannot wait for the client's close_notify.
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._flush()
        self._raw.close()
        if had_sent_all and self._raw.get_write_buffer_size():
            # The kernel did not accept close_notify, so the client does not read.
            self._raw.abort()

    def abort(self) -> None:
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._raw.is_closing()

    def pause_reading(self) -> None:
        self._paused = True
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._paused = False
        self._raw.resume_reading()
        # Data that arrived before the pause may still be in the buffer.
        asyncio.get_running_loop().call_soon(self._process)

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sslcontext":
            return self._policy.context
        return self._raw.get_extra_info(name, default)
