# SPDX-License-Identifier: GPL-3.0-only
"""Tests --web-config: a real Prometheus scrapes with a certificate and a password."""

import socket
import ssl
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.support import COMMAND, Command, Prometheus
from tests.pki import CLIENT, MTLS, TLS, client_context, users, write_pair, write_web
from tests.support import DEADLINE_S, ESTABLISHED, Peers, eventually, inside, new_netns

NOBODY = 65534


class Guarded(Command):
    """The command with a web configuration, and a client with its credentials."""

    context: ssl.SSLContext | None = None
    password: str | None = None

    def get(self, path: str) -> str:
        scheme = "https" if self.context else "http"
        url = f"{scheme}://localhost:{self.port}{path}"
        manager = urllib.request.HTTPPasswordMgrWithPriorAuth()
        if self.password:
            manager.add_password(None, url, "alice", self.password, is_authenticated=True)
        opener = urllib.request.build_opener(
            urllib.request.HTTPBasicAuthHandler(manager),
            *([urllib.request.HTTPSHandler(context=self.context)] if self.context else []),
        )
        with opener.open(url, timeout=DEADLINE_S) as response:
            page: str = response.read().decode()
            return page


class Secure(Guarded):
    context = client_context(CLIENT)
    password = "wonderland"  # noqa: S105


class OfTls(Guarded):
    context = client_context()


class OfPasswords(Guarded):
    password = "wonderland"  # noqa: S105


def children(process: int) -> list[int]:
    shown = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(each) for each in shown.split()]


def status(process: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {
        name: value.split() for name, _, value in (line.partition(":") for line in lines)
    }


def scraper_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of Prometheus' scrape_configs for the web configuration."""
    CLIENT.private_key_pem.write_to_path(directory / "client.key")
    CLIENT.cert_chain_pems[0].write_to_path(directory / "client.crt")
    return {
        "scheme": "https",
        "basic_auth": {"username": "alice", "password": "wonderland"},
        "tls_config": {
            "ca_file": str(directory / "ca.pem"),
            "cert_file": str(directory / "client.crt"),
            "key_file": str(directory / "client.key"),
            "server_name": "localhost",
        },
    }


def test_prometheus_scrapes_with_a_certificate_and_a_password(tmp_path: Path) -> None:
    """Scrapes work before and after certificate and key, readable by root only, are
    replaced."""
    tmp_path.chmod(0o700)
    config = write_web(tmp_path, MTLS + users(alice="wonderland"))
    Path(config).chmod(0o600)
    scraper = scraper_settings(tmp_path)
    with Peers() as peers, Secure("--web-config", config) as exporter:
        assert status(exporter.process.pid)["Uid"] == [str(NOBODY)] * 4
        with Prometheus(tmp_path, exporter.target, **scraper) as prometheus:
            peers.connect(3)
            at = f'{ESTABLISHED}{{port="{peers.port}"}}'
            prometheus.wait_for(at, {("4",): 3}, "tcp_version")
            before = shown_certificate(exporter)
            write_pair(tmp_path)
            eventually(lambda: shown_certificate(exporter) != before)
            peers.connect(2)
            prometheus.wait_for(at, {("4",): 5}, "tcp_version")
            prometheus.wait_for("min_over_time(up[10m])", {(): 1})
            assert prometheus.failed_scrapes() == []
        code, log = exporter.stop()
    assert code == 0
    assert "WARNING" not in log
    assert log.count("web configuration reloaded") == 1


def shown_certificate(exporter: Guarded) -> str:
    return ssl.get_server_certificate(("127.0.0.1", exporter.port))


def read_all(sock: socket.socket) -> str:
    return b"".join(iter(lambda: sock.recv(65536), b"")).decode()


def test_a_wildcard_address_serves_ipv4_and_ipv6() -> None:
    """``--listen [::]:port`` means IPv4 and IPv6, and scrapes of both are not counted.

    The kind of fault: scrapes over IPv4 are refused, or scrapers are counted.
    """
    arguments = ("--duration", "0", "--direction", "all", "--source", "sock_diag")
    with new_netns() as name, inside(name), Command(*arguments, address="[::]") as exporter:
        for address in ("127.0.0.1", "::1"):
            with (
                socket.create_connection((address, exporter.port)) as kept,
                socket.create_connection((address, exporter.port)) as asking,
                Peers(address) as peers,
            ):
                peers.connect(3)
                asking.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                asking.shutdown(socket.SHUT_WR)
                page = read_all(asking)
                assert page.startswith("HTTP/1.1 200 ")
                assert f'port="{peers.port}"' in page
                assert f'port="{exporter.port}"' not in page
                assert kept.getpeername()[1] == exporter.port


def test_the_reader_process_can_only_read_files(tmp_path: Path) -> None:
    """It is not root, has only CAP_DAC_READ_SEARCH, and ends with its parent process."""
    config = write_web(tmp_path, TLS)
    with OfTls("--web-config", config) as exporter:
        (reader,) = children(exporter.process.pid)
        shown = status(reader)
        assert shown["Uid"] == shown["Gid"] == [str(NOBODY)] * 4
        assert shown["Groups"] == []
        assert int(shown["CapEff"][0], 16) == int(shown["CapPrm"][0], 16) == 1 << 2
        for held in ("CapInh", "CapBnd", "CapAmb"):
            assert int(shown[held][0], 16) == 0, held
        assert shown["NoNewPrivs"] == ["1"]
        exporter.process.kill()
        exporter.process.wait()
        eventually(lambda: not Path(f"/proc/{reader}/fd").exists())


def test_the_reader_process_stays_root_without_that_capability(tmp_path: Path) -> None:
    """In some containers the capability is missing. Then the reader can read root's
    files."""
    config = write_web(tmp_path, TLS)
    Path(config).chmod(0o600)
    command = ("setpriv", "--bounding-set=-dac_read_search", COMMAND)
    with OfTls("--web-config", config, command=command) as exporter:
        (reader,) = children(exporter.process.pid)
        shown = status(reader)
        assert shown["Uid"] == ["0"] * 4
        assert int(shown["CapPrm"][0], 16) == 0
        before = shown_certificate(exporter)
        write_pair(tmp_path)
        eventually(lambda: shown_certificate(exporter) != before)
        assert exporter.stop()[0] == 0
        eventually(lambda: not Path(f"/proc/{reader}").exists())


def test_a_signal_during_a_password_check_ends_the_exporter(tmp_path: Path) -> None:
    """It ends at once with exit code 0, although the check would take minutes."""
    costly = f"  bob: $2y$20${'.' * 53}\n"
    config = write_web(tmp_path, users(alice="wonderland") + costly)
    with OfPasswords("--web-config", config) as exporter:
        with socket.create_connection(("127.0.0.1", exporter.port)) as sock:
            sock.sendall(
                b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Basic Ym9iOng=\r\n\r\n"
            )
            # the check of alice's password has ended, and that of bob's is running
            assert exporter.get("/-/ready")
            code, log = exporter.stop()
    assert code == 0
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            "tls_server_config: {cert_filse: x}",
            "line 1: tls_server_config has no 'cert_filse'",
        ),
        ("http_server_config: {http2: true}", "line 1: http2 is not supported"),
        (TLS.replace("server.key", "absent"), "line 3: key_file"),
    ],
)
def test_an_invalid_configuration_is_refused(
    tmp_path: Path, config: str, sentence: str
) -> None:
    """The exporter ends with exit code 2 and one sentence, as for an invalid setting."""
    ended = subprocess.run(
        [COMMAND, "--web-config", write_web(tmp_path, config)],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 2
    (message,) = (line for line in ended.stderr.splitlines() if " INFO " not in line)
    assert sentence in message
