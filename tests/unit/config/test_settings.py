# SPDX-License-Identifier: GPL-3.0-only
"""Settings from flags, environment and file: precedence, valid values and errors."""

import contextlib
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpexporter.config.misleading import misleading
from tcpexporter.config.reread import reread
from tcpexporter.config.settings import Settings, naming_origins, parse
from tcpexporter.config.values import LABELS
from tcpexporter.errors import SettingsError, quoted

SAMPLES: list[tuple[str, str, dict[str, Any]]] = [
    ("simple", "true", {"simple": True}),
    ("tcpv6", "false", {"tcpv6": False}),
    ("port", "443,8000-8002", {"ports": (443, 8000, 8001, 8002)}),
    ("listen", "[::1]:9000", {"listen_address": "::1", "listen_port": 9000}),
    ("duration", "1m30s", {"duration_s": 90}),
    ("direction", "outbound", {"direction": "outbound"}),
    ("netns", "all", {"netns": "all"}),
    ("source", "sock_diag", {"source": "sock_diag"}),
    ("interval", "0.5", {"interval_s": 0.5}),
    ("labels", "direction,port", {"labels": ("port", "direction")}),
    ("clients", "false", {"clients": False}),
    ("client-prefix", "24,56", {"client_prefix": (24, 56)}),
    ("histograms", "true", {"histograms": True}),
    ("buckets", "1m,0.5", {"buckets": (0.5, 60.0)}),
    ("max-series", "101", {"max_series": 101}),
    ("web-config", "/etc/web.yml", {"web_config": "/etc/web.yml"}),
    ("max-connections", "1000", {"max_connections": 1000}),
    ("max-connections", "auto", {"max_connections": None}),
    ("reconcile-interval", "5m", {"reconcile_interval_s": 300.0}),
    ("reconcile-cpu", "0.5", {"reconcile_cpu_percent": 0.5}),
    ("user", "prometheus", {"user": "prometheus"}),
    ("log-level", "debug", {"log_level": "debug"}),
    ("log-format", "json", {"log_format": "json"}),
    ("once", "true", {"once": True}),
    ("features", "true", {"features": True}),
    ("check", "true", {"check": True}),
    ("pin", "/sys/fs/bpf/x", {"pin": "/sys/fs/bpf/x"}),
    ("unpin", "true", {"unpin": True}),
    ("state", "/var/lib/x/state", {"state": "/var/lib/x/state"}),
]
"""The name of a setting, a text that is not its default, and the resulting fields."""

FROM_GO = ["simple", "tcpv6", "port", "listen", "duration"]
GO_SAMPLES = [sample for sample in SAMPLES if sample[0] in FROM_GO]
OTHER_SAMPLES = [sample for sample in SAMPLES if sample[0] not in FROM_GO]

REFUSED = [
    *[
        (name, value, "true or false")
        for name in (
            *("simple", "tcpv6", "once", "features", "unpin", "histograms", "clients"),
        )
        for value in ("", "yes", "on", "TrUe", "2")
    ],
    *[
        ("port", value, "all (or -1), or ports from 1 to 65535")
        for value in (
            *(
                "",
                "http",
                "0",
                "-2",
                "65536",
                "443,",
                ",443",
                "443,-1",
                "443,all",
                "ALL",
                "90-80",
                "1-",
                "80-65536",
            ),
            *("80, 443", "80--90", "+80", "8_0", "٨٠", "4.5", "0x50", "9" * 5000),
        )
    ],
    *[
        ("listen", value, "a port from 1 to 65535, alone or after a host")
        for value in (
            *("", ":", "0", "-1", "65536", "local host:9690", "127.0.0.1", "127.0.0.1:"),
            *("127.0.0.256:9690", "::1:9690", "[::1]", "[::1]9690", "[127.0.0.1]:9690"),
            *("[]:9690", "[::g]:9690", "[[::1]]:9690", "/x:9690", "http://[::1]:9690"),
        )
    ],
    *[
        ("duration", value, "whole seconds")
        for value in (
            *("", "-1", "1.5", "1.5s", "s", "1m30", "30s1m", "1 m", "1h1h", "1d", "."),
            *("5x", "1e3", "inf", "nan", "9223372037", "2562048h", "9" * 5000 + "h"),
        )
    ],
    *[
        ("interval", value, "a number of seconds from 0.1 to 3600")
        for value in ("", "0", "0.09", "3600.1", "2h", "-1", "nan", "inf", "1e0", "fast")
    ],
    *[
        ("max-connections", value, "auto, or a whole number from 1 to 16777216")
        for value in ("", "0", "16777217", "-1", "1e3", "1_000", "many")
    ],
    *[
        ("max-series", value, "a whole number from 1 to 16777216")
        for value in ("", "0", "16777217", "-1", "1e3", "1_000", "auto")
    ],
    *[
        ("labels", value, "auto, none, or some of port, tcp_version, direction, netns, ")
        for value in (
            *("", ",", "port,", ",port", "port,port", "port,none", "auto,port", "ports"),
            *("PORT", "port, direction", "port;direction", "pid", "remote-port"),
        )
    ],
    *[
        ("buckets", value, "at most 24 times from 0.001 seconds to 10 years, ")
        for value in (
            *("", ",", "1,", ",1", "0", "0,1", "0.0009", "-1", "1,-1", "1 2", "1, 2"),
            *("inf", "nan", "1e3", "1d", "1.2.3", "87601h", "315360000.1", "9" * 5000),
            ",".join(map(str, range(1, 26))),
        )
    ],
    *[
        ("client-prefix", value, "a number from 1 to 32, a comma, and a number from 1 to ")
        for value in (
            *("", ",", "24", "24,", ",64", "0,64", "32,0", "33,64", "32,129", "-1,64"),
            *("24,56,64", "24, 56", "/24,/56", "24.0,56", "+24,56", "2_4,56", "٢,64"),
        )
    ],
    *[("direction", value, "inbound, outbound or all") for value in ("", "in", "ALL")],
    *[("netns", value, "self, all, a name") for value in ("", "two words", "a:b")],
    *[
        ("reconcile-interval", value, "0 (only after missed events), seconds up to 86400")
        for value in ("", "-1", "86401", "25h", "often")
    ],
    *[
        ("reconcile-cpu", value, "a number from 0.1 to 100")
        for value in ("", "0", "101", "-2", "2%", "nan", "1e1", "1.2.3")
    ],
    *[("source", value, "auto, ebpf, sock_diag or procfs") for value in ("", "bpf")],
    *[
        ("log-level", value, "debug, info, warning or error")
        for value in ("", "INFO", "trace")
    ],
    *[("log-format", value, "text or json") for value in ("", "xml")],
    *[("user", value, "the name of a user") for value in ("", "no body", "root:root")],
]
"""The name of a setting, an invalid text, and how the error describes valid ones."""


WriteFile = Callable[[str | bytes], str]


@pytest.fixture(name="write_file", scope="session")
def _write_file(tmp_path_factory: pytest.TempPathFactory) -> WriteFile:
    path = tmp_path_factory.mktemp("settings") / "exporter.conf"

    def write(content: str | bytes) -> str:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def refusal(argv: list[str], environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        parse(argv, environ or {})
    message = str(caught.value)
    assert "\n" not in message
    return message


def in_environment(name: str) -> str:
    return name.replace("-", "_").upper()


# Precedence of flags, environment and file.


def test_an_empty_command_line_gives_the_defaults() -> None:
    """These are the defaults of the dataclass, which the help shows too."""
    assert parse([], {}) == Settings()


def test_settings_cannot_be_changed() -> None:
    """The dataclass is frozen."""
    with pytest.raises(FrozenInstanceError):
        parse([], {}).simple = True  # type: ignore[misc]


def test_the_samples_have_every_setting() -> None:
    """Only conf, output, expect and the texts are missing: they have their own tests."""
    covered = {field for _, _, expected in SAMPLES for field in expected}
    covered |= {"conf", "output", "expect", "given"}
    assert covered == {field.name for field in fields(Settings)}


@pytest.mark.parametrize(("name", "text", "expected"), SAMPLES)
@pytest.mark.parametrize("dashes", ["-", "--"])
def test_each_setting_is_a_flag(
    name: str, text: str, expected: dict[str, Any], dashes: str
) -> None:
    """A flag begins with one dash or two; an equals sign precedes the value."""
    assert parse([f"{dashes}{name}={text}"], {}) == replace(Settings(), **expected)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [sample for sample in SAMPLES if sample[1] not in {"true", "false"}],
)
@pytest.mark.parametrize("dashes", ["-", "--"])
def test_the_value_of_a_flag_may_be_the_next_argument(
    name: str, text: str, expected: dict[str, Any], dashes: str
) -> None:
    """This does not apply to switches."""
    assert parse([dashes + name, text], {}) == replace(Settings(), **expected)


@pytest.mark.parametrize(("name", "text", "expected"), SAMPLES)
def test_each_setting_is_an_environment_variable(
    name: str, text: str, expected: dict[str, Any]
) -> None:
    """The name of the variable has the prefix TCPEXPORTER_."""
    environ = {f"TCPEXPORTER_{in_environment(name)}": text}
    assert parse([], environ) == replace(Settings(), **expected)


@pytest.mark.parametrize(("name", "text", "expected"), GO_SAMPLES)
def test_settings_of_the_go_program_need_no_prefix(
    name: str, text: str, expected: dict[str, Any]
) -> None:
    """The Go program read these environment variables."""
    assert parse([], {in_environment(name): text}) == replace(Settings(), **expected)


@pytest.mark.parametrize(("name", "text", "expected"), GO_SAMPLES)
def test_a_variable_with_the_prefix_wins(
    name: str, text: str, expected: dict[str, Any]
) -> None:
    """The variable without the prefix is ignored, even if its value is invalid."""
    variable = in_environment(name)
    environ = {f"TCPEXPORTER_{variable}": text, variable: "nonsense"}
    assert parse([], environ) == replace(Settings(), **expected)


@pytest.mark.parametrize(("name", "text", "expected"), OTHER_SAMPLES)
def test_other_settings_require_the_prefix(
    name: str,
    text: str,
    expected: dict[str, Any],  # noqa: ARG001  (every sample has a value)
) -> None:
    """Shells set USER, for example, so only the Go program's variables work without it."""
    assert parse([], {in_environment(name): text}) == Settings()


def test_the_environment_of_the_process_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the environment passed as an argument is used."""
    for variable in ("PORT", "TCPEXPORTER_PORT", "TCPEXPORTER_TYPO"):
        monkeypatch.setenv(variable, "443")
    assert parse([], {}) == Settings()


@pytest.mark.parametrize("separator", [" ", "=", " = ", "\t", " =", "= ", "   "])
@pytest.mark.parametrize(("name", "text", "expected"), SAMPLES)
def test_each_setting_is_a_line_of_the_file(
    write_file: WriteFile, name: str, text: str, expected: dict[str, Any], separator: str
) -> None:
    """A line is "name value" or "name=value", and dashes in the name may be underscores."""
    for written in {name, name.replace("-", "_")}:
        conf = write_file(written + separator + text)
        assert parse(["--conf", conf], {}) == replace(Settings(), conf=conf, **expected)


def test_comments_and_blank_lines_are_ignored(write_file: WriteFile) -> None:
    """Indentation and the line ends of Windows editors are ignored too."""
    conf = write_file("# a comment\r\n\r\n   # another\r\n  simple\r\nport 443  \r\n\r\n")
    assert parse(["--conf", conf], {}) == Settings(conf=conf, simple=True, ports=(443,))


def test_a_switch_without_a_value_in_the_file_is_on(write_file: WriteFile) -> None:
    """A line with only the name of a switch means true."""
    conf = write_file("simple\nonce\ntcpv6")
    assert parse(["--conf", conf], {}) == Settings(conf=conf, simple=True, once=True)


def test_a_value_in_the_file_may_have_an_equals_sign(write_file: WriteFile) -> None:
    """Only the first separator of a line separates name and value."""
    assert parse(["--conf", write_file("user a=b")], {}).user == "a=b"


def test_a_value_in_the_file_may_begin_with_a_dash(write_file: WriteFile) -> None:
    """Such a value is not mistaken for a flag."""
    conf = write_file("port -1\nuser --simple")
    assert parse(["--conf", conf], {}) == Settings(conf=conf, user="--simple")


def test_a_value_in_the_environment_may_begin_with_a_dash() -> None:
    """Such a value is not mistaken for a flag."""
    environ = {"PORT": "-1", "TCPEXPORTER_USER": "-simple"}
    assert parse([], environ) == Settings(user="-simple")


@pytest.mark.parametrize("dashes", ["-", "--"])
@pytest.mark.parametrize("name", ["conf", "config"])
def test_a_flag_names_the_file(write_file: WriteFile, name: str, dashes: str) -> None:
    """Both --conf and --config name the settings file."""
    conf = write_file("simple")
    assert parse([dashes + name, conf], {}) == Settings(simple=True, conf=conf)


@pytest.mark.parametrize(
    "variable", ["TCPEXPORTER_CONF", "TCPEXPORTER_CONFIG", "CONF", "CONFIG"]
)
def test_a_variable_names_the_file(write_file: WriteFile, variable: str) -> None:
    """Both CONF and CONFIG name the settings file, with or without the prefix."""
    conf = write_file("simple")
    assert parse([], {variable: conf}) == Settings(simple=True, conf=conf)


def test_the_file_of_the_flag_wins(write_file: WriteFile) -> None:
    """If a flag names a file, the file that the environment names is not read."""
    conf = write_file("simple")
    assert parse(["--config", conf], {"CONF": "/absent"}).conf == conf


def test_the_path_of_the_file_may_begin_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tilde means the home directory."""
    (tmp_path / "x.conf").write_text("simple\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["--conf", "~/x.conf"], {}) == Settings(simple=True, conf="~/x.conf")


@pytest.mark.parametrize("argv", [["--conf="], []])
def test_an_empty_path_means_no_file(argv: list[str]) -> None:
    """The Go program did the same."""
    assert parse(argv, {"CONF": ""}) == Settings()


def test_flags_win_over_environment_and_file(write_file: WriteFile) -> None:
    """The order is: flag, prefixed variable, unprefixed variable, file, default."""
    conf = ["--conf", write_file("port 1")]
    variable, prefixed = {"PORT": "2"}, {"TCPEXPORTER_PORT": "3"}
    flag = ["--port", "4"]
    assert parse([], {}).ports == ()
    assert parse(conf, {}).ports == (1,)
    assert parse(conf, variable).ports == (2,)
    assert parse(conf, variable | prefixed).ports == (3,)
    assert parse(conf + flag, variable | prefixed).ports == (4,)


@pytest.mark.parametrize("text", ["true", "false"])
def test_a_switch_can_be_turned_off_by_precedence(write_file: WriteFile, text: str) -> None:
    """Either value of a switch overrides the opposite value from an origin with less
    precedence."""
    other = "false" if text == "true" else "true"
    conf = ["--conf", write_file(f"simple {other}")]
    expected = text == "true"
    assert parse([*conf, f"--simple={text}"], {}).simple is expected
    assert parse(conf, {"SIMPLE": text}).simple is expected
    assert parse([f"-simple={text}"], {"SIMPLE": other}).simple is expected


def test_settings_from_several_origins_are_combined(write_file: WriteFile) -> None:
    """Each setting may come from a different origin."""
    conf = write_file("duration 2h\ntcpv6 false")
    chosen = parse(["-conf", conf, "-simple"], {"PORT": "443", "TCPEXPORTER_NETNS": "all"})
    assert chosen == Settings(
        simple=True, tcpv6=False, ports=(443,), duration_s=7200, netns="all", conf=conf
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--port 443 --port 80", "flag --port is given a second time: write --port 443,80"),
        ("--port -1 --port 80", "flag --port is given a second time: give it once"),
        ("--labels port --labels unit", "second time: write --labels port,unit"),
        ("--buckets 1,2 --buckets 3", "second time: write --buckets 1,2,3"),
        (
            "--duration 5 --duration 6",
            "flag --duration is given a second time: give it once",
        ),
        ("--simple -simple=false", "flag --simple is given a second time: give it once"),
        ("--conf a --config b", "flag --conf is given a second time: give it once"),
    ],
)
def test_a_flag_that_is_given_twice_is_refused(argv: str, message: str) -> None:
    """Otherwise one of the values would be ignored; a settings file refuses it too."""
    assert refusal(argv.split()).endswith(message)


def test_a_flag_may_be_given_twice_with_the_same_value() -> None:
    """Nothing is ignored then, and the Go program accepts it."""
    given = parse(["--port=443", "-port", "443", "-simple", "--simple"], {})
    assert given == Settings(ports=(443,), simple=True)


def test_an_overridden_value_is_not_checked(write_file: WriteFile) -> None:
    """An invalid value without effect is no error, as in the Go program."""
    conf = write_file("port nonsense")
    assert parse(["--conf", conf, "--port=1"], {"PORT": "nonsense"}).ports == (1,)


# Valid values.


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_a_switch_without_a_value_is_on(dashes: str) -> None:
    """The next argument is not used as its value."""
    argv = [dashes + name for name in ("simple", "once", "tcpv6", "port=443")]
    environ = {"TCPV6": "false"}
    assert parse(argv, environ) == Settings(simple=True, once=True, ports=(443,))


@pytest.mark.parametrize(
    ("word", "expected"),
    [(word, True) for word in ("1", "t", "T", "TRUE", "true", "True")]
    + [(word, False) for word in ("0", "f", "F", "FALSE", "false", "False")],
)
def test_booleans_are_those_of_go(word: str, expected: bool) -> None:
    """The words of Go's ParseBool are valid in flags and in the environment."""
    assert parse([f"--simple={word}"], {}).simple is expected
    assert parse([], {"TCPV6": word}).tcpv6 is expected


@pytest.mark.parametrize(
    "argv", [["--port", "-1"], ["-port", "-1"], ["--port=-1"], ["-port=-1"], ["--port=all"]]
)
def test_port_all_or_minus_one_means_every_port(argv: list[str]) -> None:
    """The value -1 is not mistaken for a flag."""
    assert parse(argv, {"PORT": "443"}).ports == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("443", (443,)),
        ("1,65535", (1, 65535)),
        ("8000-8002", (8000, 8001, 8002)),
        ("443,80,443", (80, 443)),
        ("80-82,81-83", (80, 81, 82, 83)),
        ("80-80", (80,)),
        ("1-65535", tuple(range(1, 65536))),
    ],
)
def test_ports_are_sorted_and_unique(text: str, expected: tuple[int, ...]) -> None:
    """A list may have single ports and ranges, in any order and repeatedly."""
    assert parse(["--port", text], {}).ports == expected


RANGES = st.lists(
    st.tuples(st.integers(1, 65535), st.integers(0, 50)).map(
        lambda span: range(span[0], min(sum(span), 65535) + 1)
    ),
    min_size=1,
)


@given(RANGES)
def test_any_list_of_ports_is_parsed(ranges: list[range]) -> None:
    """Formatting ports and parsing the text gives the same ports."""
    text = ",".join(
        f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in ranges
    )
    assert parse([], {"PORT": text}).ports == tuple(
        sorted({p for span in ranges for p in span})
    )


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("9000", None, 9000),
        (":9000", None, 9000),
        ("127.0.0.1:9000", "127.0.0.1", 9000),
        ("localhost:9000", "localhost", 9000),
        ("node-1.example.org:9000", "node-1.example.org", 9000),
        ("0.0.0.0:9000", "0.0.0.0", 9000),
        ("[::1]:9000", "::1", 9000),
        ("[::]:9000", "::", 9000),
        ("[fe80::1%eth0]:9000", "fe80::1%eth0", 9000),
        ("[::ffff:127.0.0.1]:9000", "127.0.0.1", 9000),
    ],
)
def test_a_listen_address_may_have_a_host(
    text: str, address: str | None, port: int
) -> None:
    """The host is a name, an IPv4 address or an IPv6 address in brackets, or is absent."""
    assert parse(["--listen", text], {}) == Settings(
        listen_address=address, listen_port=port
    )


@given(st.ip_addresses(), st.integers(1, 65535))
def test_any_listen_address_is_parsed(address: Any, port: int) -> None:
    """Formatting an address and parsing the text gives the same address. A v4-mapped
    address becomes IPv4."""
    text = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    chosen = parse([], {"LISTEN": text})
    meant = getattr(address, "ipv4_mapped", None) or address
    assert (chosen.listen_address, chosen.listen_port) == (str(meant), port)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("90s", 90),
        ("1m30s", 90),
        ("90m", 5400),
        ("2h", 7200),
        ("1h1s", 3601),
        ("1h1m1s", 3661),
        ("9223372036", 9223372036),
    ],
)
def test_a_duration_is_seconds_or_has_units(text: str, seconds: int) -> None:
    """The units are hours, minutes and seconds."""
    duration_s = parse(["--duration", text], {}).duration_s
    assert duration_s == seconds
    assert isinstance(duration_s, int)


@given(st.integers(0, 9223372036))
def test_any_duration_is_parsed(seconds: int) -> None:
    """A duration in seconds and one with units are equal."""
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    for text in (f"{seconds}", f"{seconds}s", f"{hour}h{minute}m{second}s"):
        assert parse([], {"DURATION": text}).duration_s == seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0.1", 0.1),
        ("2", 2.0),
        ("0.5s", 0.5),
        ("1m30s", 90.0),
        ("1m0.5s", 60.5),
        ("1h", 3600.0),
    ],
)
def test_an_interval_may_have_a_fraction(text: str, seconds: float) -> None:
    """The smallest and the largest interval are valid."""
    interval_s = parse(["--interval", text], {}).interval_s
    assert interval_s == seconds
    assert isinstance(interval_s, float)


@given(st.floats(0.1, 3600))
def test_any_interval_is_parsed(seconds: float) -> None:
    """Formatting an interval and parsing the text gives the same interval."""
    assert parse([f"--interval={seconds!r}"], {}).interval_s == seconds


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", ("port", "tcp_version")),
        ("--labels auto", ("port", "tcp_version")),
        ("--netns all", ("port", "tcp_version", "netns")),
        ("--netns all --labels port", ("port",)),
        ("--labels remote_port,tcp_version,port", ("port", "tcp_version", "remote_port")),
        ("--labels none", ()),
        ("--simple", ()),
        ("--simple --netns all", ()),
        ("--simple --labels port", ()),
    ],
)
def test_labels_are_those_of_a_series(argv: str, expected: tuple[str, ...]) -> None:
    """Their order is that of the exposition, whatever order they are given in."""
    assert parse(argv.split(), {}).series_labels == expected


@given(st.permutations(LABELS), st.integers(0, len(LABELS)))
def test_any_set_of_labels_is_parsed(labels: list[str], number: int) -> None:
    """Each label may be there or not, in any order."""
    chosen = labels[:number]
    parsed = parse([f"--labels={','.join(chosen) or 'none'}", "--netns=all"], {})
    assert parsed.series_labels == tuple(each for each in LABELS if each in chosen)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--histograms", (1, 6, 60, 600, 3600, 21600, 86400, 604800)),
        ("--histograms --duration 30", (1, 6, 30, 60, 600, 3600, 21600, 86400, 604800)),
        ("--histograms --duration 0 --buckets 7", (7,)),
        ("--histograms --buckets 1h,0.5,5,5 --duration 5", (0.5, 5, 3600)),
        ("--histograms --buckets 0.001,87600h --duration 5", (0.001, 5, 315360000)),
        ("--buckets 7", ()),
        ("", ()),
    ],
)
def test_the_duration_is_a_bound_of_the_histograms(
    argv: str, expected: tuple[float, ...]
) -> None:
    """Bounds are ascending and unique. Without --histograms there are none."""
    assert parse(argv.split(), {}).bounds_s == expected


@pytest.mark.parametrize("number", [1, 16_777_216])
def test_the_bounds_of_max_connections_are_valid(number: int) -> None:
    """Both bounds are valid values."""
    assert parse([f"--max-connections={number}"], {}).max_connections == number


@pytest.mark.parametrize("number", [1, 16_777_216])
def test_the_bounds_of_max_series_are_valid(number: int) -> None:
    """Both bounds are valid values."""
    assert parse([f"--max-series={number}"], {}).max_series == number


# Invalid values and their errors.


@pytest.mark.parametrize(("name", "text", "allowed"), REFUSED)
def test_an_invalid_value_is_refused(
    write_file: WriteFile, name: str, text: str, allowed: str
) -> None:
    """The error has the setting, its origin, the valid values, and the invalid one."""
    variable = f"TCPEXPORTER_{in_environment(name)}"
    conf = write_file(f"# first\n{name}={text}\n")
    for origin, message in {
        f"flag --{name}": refusal([f"-{name}={text}"]),
        f"environment variable {variable}": refusal([], {variable: text}),
        f"{conf} line 2": refusal([f"--conf={conf}"]),
    }.items():
        assert message.startswith(f"{origin}: {name} must be {allowed}")
        assert f", not {quoted(text)}" in message


@pytest.mark.parametrize(
    ("name", "text", "remedy"),
    [
        ("port", "443, 80", "write '443,80', without spaces"),
        ("port", "443 80", "write '443,80', without spaces"),
        ("labels", "port, unit", "write 'port,unit', without spaces"),
        ("client-prefix", "24, 56", "write '24,56', without spaces"),
        ("port", "443 # web", "a comment requires a line of its own"),
        ("direction", "all\t# both", "a comment requires a line of its own"),
        ("duration", '"30"', "write it without quotes"),
        ("port", "443,80-20", "80-20 is a descending range, write 20-80"),
        ("labels", "port,netns,port", "port is given twice"),
    ],
)
def test_a_frequent_mistake_in_a_value_has_its_own_explanation(
    write_file: WriteFile, name: str, text: str, remedy: str
) -> None:
    """The general sentence, which has the valid values, precedes it."""
    conf = write_file(f"{name} {text}\n")
    for message in (refusal([f"--{name}={text}"]), refusal([f"--conf={conf}"])):
        assert message.endswith(f", not {quoted(text)}: {remedy}")


def test_two_dashes_are_a_value(write_file: WriteFile) -> None:
    """The value "--" has no special meaning: --pin accepts it, and --port refuses it."""
    conf = write_file("port --\n")
    for message in (
        refusal(["--port=--"]),
        refusal([], {"PORT": "--"}),
        refusal([f"--conf={conf}"]),
    ):
        assert message.endswith(" as in 443 or 443,8000-8100, not '--'")
    assert parse(["--pin=--"], {}).pin == "--"


@pytest.mark.parametrize("name", ["pin", "web-config"])
def test_a_path_with_a_null_character_is_refused(write_file: WriteFile, name: str) -> None:
    """No file can have that name, and Python would raise ValueError."""
    conf = write_file(f"{name} /a\0b\n")
    assert refusal([f"--conf={conf}"]).startswith(
        f"{conf} line 1: {name} must be the path of"
    )


def test_many_ranges_of_ports_are_parsed_fast() -> None:
    """The time for a hundred thousand overlapping ranges is proportional to the length
    of the text."""
    ranges = ["1-65535", "2-65535", "65535"] * 33_333
    assert parse(["--port", ",".join(ranges)], {}).ports == tuple(range(1, 65536))


@pytest.mark.parametrize(
    "name", ["port", "duration", "interval", "max-connections", "listen"]
)
def test_a_million_digits_give_a_short_error(write_file: WriteFile, name: str) -> None:
    """The error has the first and the last digits of the value."""
    conf = write_file(f"{name} {'9' * 1_000_003}\n")
    sentence = refusal([f"--conf={conf}"])
    assert sentence.endswith("999'")
    assert len(sentence) < 400


@pytest.mark.parametrize("name", FROM_GO)
def test_an_invalid_go_variable_is_named(name: str) -> None:
    """The error has the name of the variable that is set, without the prefix."""
    message = refusal([], {in_environment(name): "nonsense"})
    assert message.startswith(
        f"environment variable {in_environment(name)}: {name} must be "
    )


@pytest.mark.parametrize(
    "argument",
    [
        *("--prot=443", "--po=443", "-po=443", "-p", "--simpl", "-simpl", "--max-conn=1"),
        *("--no-simple", "--max_connections=1", "443", "false", "-", "-1", ""),
    ],
)
def test_an_unknown_flag_is_refused(argument: str) -> None:
    """The error has the argument, which may be an abbreviated flag."""
    message = refusal(["--simple", argument])
    assert message.startswith("unrecognized arguments: ")
    assert argument.lstrip("-") in message
    assert "--help" in message


def test_a_switch_has_no_value_as_next_argument() -> None:
    """Such a value is refused, because the Go program would ignore all later flags."""
    assert "false" in refusal(["--simple", "false", "--port=443"])


@pytest.mark.parametrize(
    "argv", [["--port"], ["-port"], ["--port", "--simple"], ["--conf"]]
)
def test_a_flag_without_its_value_is_refused(argv: list[str]) -> None:
    """The error has the name of the flag."""
    message = refusal(argv, {"PORT": "443", "CONF": ""})
    assert f"argument --{argv[0].lstrip('-')}" in message
    assert "expected one argument" in message


@pytest.mark.parametrize(
    "variable",
    ["TCPEXPORTER_PROT", "TCPEXPORTER_", "TCPEXPORTER_HELP", "TCPEXPORTER_MAX-CONNECTIONS"],
)
def test_an_unknown_variable_with_the_prefix_is_refused(variable: str) -> None:
    """The error has the name of the variable."""
    message = refusal(["--simple"], {variable: "1"})
    assert message == (
        f"environment variable {variable}: there is no such setting; --help lists them"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TCPEXPORTER_SERVICE_HOST", "10.0.0.7"),
        ("TCPEXPORTER_SERVICE_PORT", "9690"),
        ("TCPEXPORTER_SERVICE_PORT_HTTP_METRICS", "9690"),
        ("TCPEXPORTER_PORT", "tcp://10.0.0.7:9690"),
        ("TCPEXPORTER_PORT", "udp://[fd00::7]:9690"),
        ("TCPEXPORTER_PORT_9690_TCP", "tcp://10.0.0.7:9690"),
        ("TCPEXPORTER_PORT_9690_TCP_PROTO", "tcp"),
        ("TCPEXPORTER_PORT_9690_TCP_PORT", "9690"),
        ("TCPEXPORTER_PORT_9690_TCP_ADDR", "10.0.0.7"),
        ("TCPEXPORTER_WEB_SERVICE_HOST", "10.0.0.11"),
        ("TCPEXPORTER_WEB_PORT", "tcp://10.0.0.11:80"),
        ("TCPEXPORTER_WEB_PORT_80_TCP_ADDR", "10.0.0.11"),
    ],
)
def test_variables_of_a_kubernetes_service_are_ignored(name: str, value: str) -> None:
    """Kubernetes sets them for a service named tcpexporter or tcpexporter-web.

    The exporter would otherwise not start in any pod of that namespace. The kind of fault:
    variables of other programs have our prefix.
    """
    assert parse([], {name: value, "PORT": "443"}) == Settings(ports=(443,))
    assert parse([], {name: value, "TCPEXPORTER_DURATION": "7"}).duration_s == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TCPEXPORTER_SERVICE", "x"),
        ("TCPEXPORTER_SERVICE_HOSTS", "10.0.0.7"),
        ("TCPEXPORTER_SERVICE_PORTS", "9690"),
        ("TCPEXPORTER_SERVICEHOST", "10.0.0.7"),
        ("TCPEXPORTER_PORTS", "tcp://10.0.0.7:9690"),
        ("TCPEXPORTER_PORT_9690", "tcp://10.0.0.7:9690"),
        ("TCPEXPORTER_PORT_9690_TCP_HOST", "10.0.0.7"),
        ("TCPEXPORTER_PORT_TCP", "443"),
        ("TCPEXPORTER_WEB_PORT", "443"),
    ],
)
def test_variables_like_those_of_a_kubernetes_service_are_refused(
    name: str, value: str
) -> None:
    """They may be misspelt settings."""
    assert "there is no such setting" in refusal([], {name: value})


def test_an_invalid_port_variable_is_refused() -> None:
    """Only the value that Kubernetes sets is ignored."""
    for value in ("tcp", "http://10.0.0.7:9690", "443/tcp"):
        assert refusal([], {"TCPEXPORTER_PORT": value}).startswith(
            "environment variable TCPEXPORTER_PORT: port must be "
        )


def test_unknown_variables_without_the_prefix_are_ignored() -> None:
    """They belong to other programs."""
    environ = {"TCPEXPORTER": "x", "PROT": "443", "tcpexporter_port": "1", "HELP": "1"}
    assert parse([], environ) == Settings()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("prot 443", "prot"),
        ("-----!", "-----!"),
        ("[tcp]", "[tcp]"),
        ("= 443", ""),
        ("help", "help"),
        ("version", "version"),
        ("conf /etc/other.conf", "conf"),
        ("config /etc/other.conf", "config"),
        ("\ufeffport 443", "\ufeffport"),
    ],
)
def test_an_unknown_name_in_the_file_is_refused(
    write_file: WriteFile, line: str, name: str
) -> None:
    """A settings file cannot name another settings file, so conf is unknown too."""
    conf = write_file(f"simple\n\n{line}\n")
    assert refusal(["--conf", conf]) == (
        f"{conf} line 3: {name!r} is not a setting that a file can have; --help lists them"
    )


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("TCPEXPORTER_PORT=443", "port 443"),
        ('TCPEXPORTER_PORT="443"', "port 443"),
        ("TCPEXPORTER_LOG_LEVEL=debug", "log-level debug"),
        ("--port 443", "port 443"),
        ("-port=443", "port 443"),
        ("--simple", "simple"),
        ("port: 443", "port 443"),
        ("port:443", "port 443"),
        ("Port 443", "port 443"),
    ],
)
def test_a_line_in_another_form_is_refused_with_the_right_form(
    write_file: WriteFile, line: str, remedy: str
) -> None:
    """Operators copy flags, and lines of /etc/default/tcpexporter."""
    conf = write_file(f"{line}\n")
    assert refusal(["--conf", conf]).endswith(
        f" is not a setting that a file can have; write '{remedy}'"
    )


def test_an_unknown_name_in_the_file_is_refused_before_flags(
    write_file: WriteFile,
) -> None:
    """The error is about the file, although an unknown flag has the same name."""
    conf = write_file("prot 443")
    assert f"{conf} line 1: 'prot'" in refusal(["--conf", conf, "--prot=443"])


@pytest.mark.parametrize("name", ["port", "user"])
def test_a_name_without_a_value_in_the_file_is_refused(
    write_file: WriteFile, name: str
) -> None:
    """Only switches need no value."""
    conf = write_file(name)
    assert refusal(["--conf", conf]).startswith(f"{conf} line 1: {name} must be ")


@pytest.mark.parametrize(
    ("first", "second"), [("port 1", "port 1"), ("log-level info", "log_level=error")]
)
def test_a_name_given_twice_in_the_file_is_refused(
    write_file: WriteFile, first: str, second: str
) -> None:
    """Names with dashes and with underscores are equal."""
    conf = write_file(f"{first}\n#\n{second}")
    name, _ = first.split()
    assert refusal(["--conf", conf]) == f"{conf} line 3: {name} is set a second time"


@pytest.mark.parametrize(
    ("conf", "reason"),
    [
        ("/absent/x.conf", "No such file or directory"),
        ("/", "Is a directory"),
        ("\0", "embedded null"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(conf: str, reason: str) -> None:
    """The error has the place where the path was given, the path and the reason."""
    for origin, message in {
        "flag --conf": refusal(["--conf", conf]),
        "environment variable CONF": refusal([], {"CONF": conf}),
        "environment variable TCPEXPORTER_CONFIG": refusal(
            [], {"TCPEXPORTER_CONFIG": conf}
        ),
    }.items():
        assert message.startswith(f"{origin}: the settings file {conf} cannot be read: ")
        assert reason in message


def test_an_error_about_a_value_gets_the_place_where_the_value_was_given(
    write_file: WriteFile,
) -> None:
    """Only the start finds out that a user or a network namespace does not exist."""
    conf = write_file("simple\nnetns blue\n")
    settings = parse([f"--conf={conf}", "--pin=x"], {"TCPEXPORTER_STATE": "y"})
    for name, origin in {
        "netns": f"{conf} line 2",
        "pin": "flag --pin",
        "state": "environment variable TCPEXPORTER_STATE",
        "user": "the default of --user",
    }.items():
        with pytest.raises(SettingsError) as caught, naming_origins(settings):
            raise SettingsError("it does not exist", setting=name)
        assert str(caught.value) == f"{origin}: it does not exist"
    with pytest.raises(SettingsError, match=r"^another$"), naming_origins(settings):
        raise SettingsError("another")


def test_an_endless_file_is_refused() -> None:
    """Reading stops at the size limit, before memory is exhausted."""
    assert "/dev/zero" in refusal(["--conf=/dev/zero"])
    assert "larger than 1048576 bytes" in refusal(["--conf=/dev/zero"])


def test_a_binary_file_is_refused(write_file: WriteFile) -> None:
    """The error has the path and the reason."""
    conf = write_file(b"port \xff\n")
    assert f"the settings file {conf} " in refusal(["--conf", conf])


# Help and version.


def test_the_help_has_every_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the valid values and the default of each, and explains environment and
    file."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as exited:
        parse(["--help"], {})
    assert exited.value.code == 0
    text = capsys.readouterr().out
    names = {name for name, _, _ in SAMPLES} | {"conf", "output", "expect"}
    for name in names | {"help", "version"}:
        assert f"--{name}" in text
    assert text.count(". Value: ") == text.count(" (default: ") == len(names)
    assert "[env var: " not in text
    assert "TCPEXPORTER_PORT" in text
    assert "port=443" in text
    assert "variables of simple, tcpv6, port, duration, listen, conf are also read" in text


@pytest.mark.parametrize("flag", ["-h", "-help", "--help"])
def test_the_help_is_printed_despite_invalid_settings(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Operators with invalid settings can read the help."""
    environ = {"CONF": "/absent", "PORT": "nonsense", "TCPEXPORTER_PROT": "443"}
    with pytest.raises(SystemExit) as exited:
        parse([flag], environ)
    assert exited.value.code == 0
    assert "--max-connections" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-version", "--version"])
def test_the_version_is_that_of_the_package(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is the name and the version of the installed package."""
    with pytest.raises(SystemExit) as exited:
        parse([flag], {})
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"tcpexporter {metadata.version('tcpexporter')}\n"


# Random input.

NAMES = st.sampled_from(
    [name for name, _, _ in SAMPLES] + ["conf", "max_connections", "help"]
)
CHARACTERS = st.characters(codec="utf-8")
VALUES = st.sampled_from([text for _, text, _ in SAMPLES]) | st.text(CHARACTERS)
LINES = st.tuples(NAMES, st.sampled_from(["", " ", "=", "\t", ":"]), VALUES).map("".join)


@given(
    st.text(CHARACTERS) | st.lists(LINES | st.text(CHARACTERS)).map("\n".join) | st.binary()
)
def test_any_file_is_parsed_or_refused(write_file: WriteFile, content: str | bytes) -> None:
    """No other exception is raised."""
    conf = write_file(content)
    with contextlib.suppress(SettingsError):
        assert parse(["--conf", conf], {}).conf == conf


ARGUMENTS = st.tuples(st.sampled_from(["-", "--"]), NAMES, st.just("="), VALUES).map(
    "".join
)


@given(st.lists(ARGUMENTS | st.text() | NAMES.map("-{}".format)))
def test_any_arguments_are_parsed_or_refused(argv: list[str]) -> None:
    """The only other result is the text of --help or --version."""
    with contextlib.suppress(SettingsError, SystemExit):
        assert isinstance(parse(argv, {}), Settings)


@given(
    st.dictionaries(NAMES.map(lambda name: f"TCPEXPORTER_{in_environment(name)}"), VALUES)
)
def test_any_environment_is_parsed_or_refused(environ: dict[str, str]) -> None:
    """No other exception is raised."""
    with contextlib.suppress(SettingsError):
        assert isinstance(parse([], environ), Settings)


# Combinations that are refused, and settings without effect.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--output=x.prom"],
            "flag --output: output requires once: add --once, or leave out --output",
        ),
        (["--output=x", "--features"], "flag --output: output requires once"),
        (
            ["--once", "--features"],
            "once (flag --once) and features (flag --features) exclude each other: choose",
        ),
        (["--once", "--unpin"], "once (flag --once) and unpin (flag --unpin) exclude each"),
        (["--unpin", "--features"], "unpin (flag --unpin) and features (flag --features) "),
        (
            ["--labels=netns"],
            "flag --labels: labels has netns, but only one network namespace is ",
        ),
        (["--labels=port,netns", "--netns=blue"], "flag --labels: labels has netns, "),
        (["--simple", "--labels=netns"], "flag --labels: labels has netns, "),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    argv: list[str], message: str
) -> None:
    """Otherwise the exporter would silently ignore one of them."""
    assert refusal(argv).startswith(message)


def test_a_dash_is_no_name_of_an_output_file() -> None:
    """Other programs write to standard output then; this one did write to a file "-"."""
    assert refusal(["--once", "--output", "-"]) == (
        "flag --output: output must be the path of a file, not '-': without --output,"
        " --once prints the metrics"
    )


def test_output_is_accepted_with_once(write_file: WriteFile) -> None:
    """It may be a flag, a variable or a line of the file; an empty path means none."""
    expected = Settings(once=True, output="/x/y.prom")
    assert parse(["--once", "--output", "/x/y.prom"], {}) == expected
    assert parse(["--once"], {"TCPEXPORTER_OUTPUT": "/x/y.prom"}) == expected
    conf = write_file("once\noutput /x/y.prom\n")
    assert parse([f"--conf={conf}"], {}) == replace(expected, conf=conf)
    assert parse(["--output="], {}) == Settings()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--direction outbound --port 15432", "--port selects local ports, "),
        (
            "--direction outbound --port 15432 --labels direction",
            "--port selects local ports, ",
        ),
        ("--labels remote_port", "labels has remote_port, which is that of outbound "),
        ("--labels port,remote_port --port 443", "labels has remote_port, "),
        ("--simple --labels port", "labels has no effect with simple"),
        ("--simple --labels none", "labels has no effect with simple"),
        (
            "--simple --labels port --max-series 7",
            "max-series, labels has no effect with simple",
        ),
        ("--buckets 1,2", "buckets has no effect without --histograms"),
        (
            "--clients=false --client-prefix 24,56",
            "client-prefix has no effect with --clients=false",
        ),
        ("--port 443,9690", "--port selects 9690, the exporter's own port, "),
        ("--port 7 --listen [::1]:7", "--port selects 7, the exporter's own port, "),
        (
            "--once --source procfs --duration 3 --interval 5",
            "--interval is longer than --duration, ",
        ),
        ("--once --listen 7 --web-config x", "listen, web-config has no effect with once"),
        ("--simple --max-series 7", "max-series has no effect with simple"),
        ("--source ebpf --interval 7", "interval has no effect with source ebpf"),
        (
            "--source sock_diag --reconcile-interval 7 --reconcile-cpu 7",
            "reconcile-interval, reconcile-cpu has no effect with source sock_diag",
        ),
        (
            "--source sock_diag --max-connections 7 --pin x",
            "max-connections, pin has no effect with source sock_diag",
        ),
        ("--source procfs --pin x", "pin has no effect with source procfs"),
        (
            "--source procfs --state x",
            "state has no effect with source procfs, which cannot identify sockets",
        ),
    ],
)
def test_a_misleading_combination_is_reported(argv: str, message: str) -> None:
    """The kind of fault: a number that is always 0, or a setting without any effect."""
    (sentence,) = misleading(parse(argv.split(), {}))
    assert sentence.startswith(message)


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--direction all --port 443",
        "--direction outbound --port 15432 --labels remote_port",
        "--direction all --port 443 --labels port,remote_port",
        "--labels none --max-series 7",
        "--labels auto",
        "--histograms --buckets 1,2",
        "--buckets 1,6,1m,10m,1h,6h,24h,168h",
        "--netns all --labels netns",
        "--client-prefix 24,128",
        "--clients=false --client-prefix 32,64",
        "--direction outbound",
        "--once --port 9690",
        "--netns blue --port 9690",
        "--once --source procfs --duration 0 --interval 5",
        "--source procfs --duration 3 --interval 5",
        "--once --duration 30",
        "--pin x --state x --max-connections 7 --interval 7",
        "--source sock_diag --state x",
        "--source sock_diag --max-connections 262144",
        "--simple --port 443",
    ],
)
def test_a_useful_combination_is_not_reported(argv: str) -> None:
    """With the source auto, the settings of every source may have an effect."""
    assert list(misleading(parse(argv.split(), {}))) == []


# Reload


def test_a_given_text_replaces_the_file(tmp_path: Path) -> None:
    """The file is not read, but errors have its path and the line of the text."""
    path = tmp_path / "absent"
    assert parse(["--conf", str(path)], {}, "port 443").ports == (443,)
    with pytest.raises(SettingsError, match=f"{path} line 2: port must be"):
        parse(["--conf", str(path)], {}, "simple\nport x\n")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("port 443", "port 80,443,8000-8100,8102", "port is 80,443,8000-8100,8102"),
        ("port 443", "", "port is all"),
        ("port 443", "port 7001,7002,9,8001-8003", "port is 9,7001,7002,8001-8003"),
        (
            "duration 1m",
            "duration 60",
            "no change, or flags and environment variables override it",
        ),
        ("", "duration 1m\nlog-level debug", "duration is 60, log-level is debug"),
        ("listen 9690", "listen 127.0.0.1:9690", "restart required for listen"),
        (
            "",
            "listen 1\nuser x\nduration 1",
            "duration is 1; restart required for listen, user",
        ),
        (
            "labels port\nhistograms",
            "buckets 7",
            "restart required for labels, histograms, buckets",
        ),
        (
            "clients=false",
            "client-prefix 24,56",
            "restart required for clients, client-prefix",
        ),
        (
            "reconcile-interval 5",
            "interval 2",
            "restart required for interval, reconcile-interval",
        ),
    ],
)
def test_a_reload_changes_what_it_can_and_names_the_rest(
    before: str, after: str, message: str
) -> None:
    """Some settings change at once, the others require a restart; the text has both."""
    argv = ["--conf", "conf"]
    was, wanted = parse(argv, {}, before), parse(argv, {}, after)
    done = reread(was, wanted)
    assert str(done) == message
    assert done.settings.duration_s == wanted.duration_s
    assert done.settings.ports == wanted.ports
    assert done.settings.log_level == wanted.log_level
    assert reread(done.settings, wanted).changed == ()
    assert reread(done.settings, was).settings == was
