# SPDX-License-Identifier: GPL-3.0-only
"""Which process listens at a port, from a copy of /proc."""

from pathlib import Path

import pytest

from tcpexporter.host import port_users

TABLE = """\
  sl local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt uid timeout inode
   0: 00000000:25DA 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 101 1
   1: 0100007F:25DB 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 102 1
   2: 0100007F:25DC 0100007F:C000 01 00000000:00000000 00:00000000 00000000 0 0 103 1
"""


@pytest.mark.parametrize(
    ("command", "port", "is_exporter"),
    [
        ("/usr/bin/python3\0/usr/local/bin/tcpexporter\0", 9690, True),
        ("/usr/bin/python3\0-I\0-m\0tcpexporter\0--port=443\0", 9690, True),
        ("nginx: master process\0", 9690, False),
        ("vi\0-R\0-n\0-u\0tcpexporter\0", 9690, False),
        ("tcpexporter\0", 9691, False),  # another process listens there
        ("tcpexporter\0", 9692, False),  # a connection, not a listener
    ],
)
def test_an_exporter_is_identified_by_its_socket_and_command(
    command: str,
    port: int,
    is_exporter: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that ends meanwhile, or is hidden, is no error."""
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(TABLE)
    (tmp_path / "7" / "fd").mkdir(parents=True)
    (tmp_path / "7" / "fd" / "3").symlink_to("socket:[101]")
    (tmp_path / "7" / "fd" / "4").symlink_to("socket:[103]")
    (tmp_path / "7" / "cmdline").write_text(command)
    (tmp_path / "8").mkdir()
    monkeypatch.setattr(port_users, "PROC", tmp_path)
    assert port_users.has_exporter(port) == is_exporter
