# SPDX-License-Identifier: GPL-3.0-only
"""Certificates and web configurations for tests."""

import ssl
from pathlib import Path

import bcrypt
import trustme

CA = trustme.CA()
CLIENT = CA.issue_cert(
    "prometheus@example.org", "scraper.example", "192.0.2.7", "2001:db8::7"
)
STRANGER = trustme.CA().issue_cert("scraper.example")
HASHED = {
    password: bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()
    for password in ("wonderland", "looking-glass")
}

TLS = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
MTLS = f"""{TLS}  client_ca_file: ca.pem
  client_auth_type: RequireAndVerifyClientCert
"""


def write_pair(directory: Path) -> trustme.LeafCert:
    """Write a new certificate for localhost and its key; each file is renamed to its
    path."""
    issued = CA.issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.ECDSA)
    chain = b"".join(each.bytes() for each in issued.cert_chain_pems)
    for name, content in (
        ("server.key", issued.private_key_pem.bytes()),
        ("server.crt", chain),
    ):
        new = directory / f"{name}.new"
        new.touch(0o600)
        new.write_bytes(content)
        new.rename(directory / name)
    return issued


def write_web(directory: Path, config: str) -> str:
    """Write a web configuration and the files that it names; return its path."""
    write_pair(directory)
    CA.cert_pem.write_to_path(directory / "ca.pem")
    path = directory / "web.yml"
    path.write_text(config)
    return str(path)


def users(**passwords: str) -> str:
    lines = (f"  {name}: {HASHED[password]}\n" for name, password in passwords.items())
    return "basic_auth_users:\n" + "".join(lines)


def client_context(certificate: trustme.LeafCert | None = None) -> ssl.SSLContext:
    """Return the TLS context of a client that trusts the CA, with this certificate."""
    context = ssl.create_default_context()
    CA.configure_trust(context)
    if certificate:
        certificate.configure_cert(context)
    return context
