# SPDX-License-Identifier: GPL-3.0-only
"""TLS: what a client has to prove, and the layer between its socket and HTTP.

asyncio's own layer tells nobody of a client before its handshake is done, and takes 256
KiB for each. This one lets HTTP's bounds on time and places hold from the first byte.
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
"""Read from a client at once."""

_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}

# What OpenSSL says, and what that means.
_REASONS = {
    None: "one of them is not PEM, or not what it should be",
    "KEY_VALUES_MISMATCH": "they do not belong together",
    "NO_CERTIFICATE_OR_CRL_FOUND": "there is no certificate in it",
}

_PLAIN_HTTP = (
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n"
    b"this port speaks HTTPS only\n"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """What new connections are made on."""

    context: ssl.SSLContext
    allowed_sans: frozenset[str] | None
    """A client's certificate must have one of them; None: it need not."""

    def admit(self, certificate: Any) -> bool:
        """Whether a client may come in with this one, as `ssl.SSLObject.getpeercert`."""
        if self.allowed_sans is None:
            return True
        names = (certificate or {}).get("subjectAltName", ())
        return not self.allowed_sans.isdisjoint(_as_go_writes(*name) for name in names)


def _as_go_writes(kind: str, name: str) -> str:
    return str(ip_address(name)) if kind == "IP Address" else name


def make_terms(tls: Tls) -> Terms:
    """The terms of a configuration.

    Raises:
        WebConfigError: OpenSSL does not take them.
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
            _told("the certificate and its key do not do"),
            _as_file(tls.cert) as cert,
            _as_file(tls.key) as key,
        ):
            context.load_cert_chain(cert, key, password=_refuse_password)
        _set_verification(context, tls)
    except (ssl.SSLError, ValueError) as error:
        raise WebConfigError(f"OpenSSL does not take the configuration: {error}") from error
    sans = tls.client_allowed_sans
    return Terms(context, None if sans is None else frozenset(sans))


def _set_versions(context: ssl.SSLContext, tls: Tls) -> None:
    minimum = tls.min_version
    if tls.cipher_suites and not set(tls.cipher_suites) & CIPHERS.keys():
        minimum = "TLS13"  # the only version that has any of them
    with warnings.catch_warnings():
        # Of those before TLS 1.2: whoever configures one knows.
        warnings.simplefilter("ignore", DeprecationWarning)
        context.maximum_version = _VERSIONS[tls.max_version]
        context.minimum_version = _VERSIONS[minimum]


def _set_ciphers(context: ssl.SSLContext, tls: Tls) -> None:
    suites = [CIPHERS[each] for each in tls.cipher_suites or CIPHERS if each in CIPHERS]
    if tls.min_version < "TLS12":
        suites.append("@SECLEVEL=0")  # where OpenSSL still has those versions
    if suites:
        context.set_ciphers(":".join(suites))
    if not tls.prefer_server_cipher_suites:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE


def _set_verification(context: ssl.SSLContext, tls: Tls) -> None:
    if tls.client_auth_type == NO_CERTIFICATE:
        return
    given = tls.client_auth_type == VERIFIED_IF_GIVEN
    context.verify_mode = ssl.CERT_OPTIONAL if given else ssl.CERT_REQUIRED
    # As in Go, whatever is in the file is trusted, not only what has signed itself.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if tls.client_ca is None:
        context.set_default_verify_paths()
        return
    with _told("the client CA does not do"), _as_file(tls.client_ca) as authorities:
        context.load_verify_locations(authorities)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        raise WebConfigError(
            f"{what}: {_REASONS.get(error.reason, error.reason)}"
        ) from error
    except (OSError, ValueError) as error:
        raise WebConfigError(f"{what}: {error}") from error


@contextlib.contextmanager
def _as_file(pem: str) -> Iterator[str]:
    """A file that only this process has: ssl takes nothing else."""
    with os.fdopen(os.memfd_create("pem"), "wb") as file:
        file.write(pem.encode(errors="surrogateescape"))
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _refuse_password() -> str:
    raise ValueError("the key is encrypted: it has to be stored without a passphrase")


class Http(Protocol):
    """What is above: told of a client at once, and of a connection when it is secure."""

    def take_place(self, transport: asyncio.Transport) -> None: ...
    def connection_made(self, transport: asyncio.Transport) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def get_buffer(self, sizehint: int) -> bytearray: ...
    def buffer_updated(self, nbytes: int) -> None: ...
    def eof_received(self) -> bool: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class TlsTransport(asyncio.BufferedProtocol, asyncio.Transport):
    """A socket's protocol, and the transport of what is above.

    What is written is encrypted and handed on at once, so the socket's own flow
    control does for both.
    """

    _raw: asyncio.Transport

    def __init__(self, terms: Terms, http: Http) -> None:
        """One connection."""
        super().__init__()
        self._terms = terms
        self._http = http
        self._buffer = bytearray(READ_BYTES)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = terms.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._secure = False
        self._paused = False

    # As the socket's protocol

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        self._http.take_place(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)
        # What is above has us, and we have that: without this, what OpenSSL keeps for each
        # client, 10 kB at least, would wait for Python's garbage collector.
        del self._tls, self._incoming, self._outgoing

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._incoming.write(memoryview(self._buffer)[:nbytes])
        self._go_on()

    def eof_received(self) -> bool:
        return self._secure and self._http.eof_received()

    def pause_writing(self) -> None:
        if self._secure:
            self._http.pause_writing()

    def resume_writing(self) -> None:
        if self._secure:
            self._http.resume_writing()

    def _go_on(self) -> None:
        """Do what can be done with what has come."""
        if self._raw.is_closing():
            return
        try:
            if not self._secure:
                self._shake_hands()
            self._read()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            log.debug("a client is turned away: %s", error.reason)
            if error.reason == "HTTP_REQUEST":
                self._raw.write(_PLAIN_HTTP)
            self._flush()  # the alert, that a client may be told why
            self._raw.close()

    def _shake_hands(self) -> None:
        self._tls.do_handshake()
        self._flush()
        if self._terms.admit(self._tls.getpeercert()):
            self._secure = True
            self._http.connection_made(self)
        else:
            log.debug("a client is turned away: its certificate is not for an allowed name")
            self._raw.close()

    def _read(self) -> None:
        while not self._paused and not self._raw.is_closing():
            buffer = self._http.get_buffer(-1)
            # Typeshed does not know that it gives a number here.
            count = cast("int", self._tls.read(len(buffer), buffer))
            if not count:  # close_notify, which ends one direction only: RFC 8446, 6.1
                if not self._http.eof_received():
                    self.close()
                return
            self._http.buffer_updated(count)

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._raw.write(self._outgoing.read())

    # As the transport of what is above

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if data and not self._raw.is_closing():
            self._tls.write(data)
            self._flush()

    def close(self) -> None:
        if self._raw.is_closing():
            return
        taken = not self._raw.get_write_buffer_size()
        if self._secure:
            with contextlib.suppress(ssl.SSLError):  # it would like an answer
                self._tls.unwrap()
            self._flush()
        self._raw.close()
        if taken and self._raw.get_write_buffer_size():
            # A client that does not even take the farewell has no place for it.
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
        # Something may have come before.
        asyncio.get_running_loop().call_soon(self._go_on)

    def set_write_buffer_limits(
        self, high: int | None = None, low: int | None = None
    ) -> None:
        self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "sslcontext":
            return self._terms.context
        return self._raw.get_extra_info(name, default)
