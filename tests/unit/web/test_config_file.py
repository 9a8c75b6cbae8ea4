# SPDX-License-Identifier: GPL-3.0-only
"""The parser of the web configuration: valid values, and the errors for invalid ones."""

import json
from dataclasses import asdict

import pytest

from tcpexporter.errors import WebConfigError
from tcpexporter.web.config import CIPHERS, Tls, WebConfig
from tcpexporter.web.config_file import CURVES, TLS13_CIPHERS, parse

FILES = {"server.crt": "CRT", "server.key": "KEY", "ca.pem": "CA"}
PAIR = "  cert_file: server.crt\n  key_file: server.key\n"
HASH = "$2y$10$" + "a" * 53


def read(name: str) -> str:
    try:
        return FILES[name]
    except KeyError:
        raise WebConfigError(f"{name} cannot be read: No such file") from None


def parsed(text: str) -> WebConfig:
    return parse(text, "web.yml", read)


def with_tls(lines: str = "") -> str:
    return (
        "tls_server_config:\n"
        + PAIR
        + "".join(f"  {each}\n" for each in lines.splitlines())
    )


def of_tls(text: str) -> Tls:
    tls = parsed(text).tls
    assert tls is not None
    return tls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing but a comment\n",
        "{}",
        "tls_server_config:\nhttp_server_config:\nbasic_auth_users:\nrate_limit:\n",
        "tls_server_config: {}\nbasic_auth_users: ~\n",
        "http_server_config: {http2: false}",
        "rate_limit: {interval: 0, burst: 0}",
        "rate_limit: {interval: 0s, burst: 7}",
    ],
)
def test_an_empty_configuration_requires_nothing(text: str) -> None:
    """An empty file and empty sections require no TLS, header, user or limit."""
    assert parsed(text) == WebConfig()


def test_a_certificate_and_a_key_suffice() -> None:
    """The defaults of other keys are those of exporter-toolkit."""
    tls = of_tls(with_tls())
    assert (tls.cert, tls.key, tls.client_ca) == ("CRT", "KEY", None)
    assert (tls.min_version, tls.max_version) == ("TLS12", "TLS13")
    assert tls.client_auth_type == "NoClientCert"
    assert tls.client_allowed_sans is None
    assert tls.prefer_server_cipher_suites
    assert (tls.cipher_suites, tls.curve) == ((), None)


@pytest.mark.parametrize(
    ("lines", "name", "value"),
    [
        ("client_auth_type: NoClientCert", "client_auth_type", "NoClientCert"),
        ("client_auth_type: ''", "client_auth_type", "NoClientCert"),
        (
            "client_auth_type: VerifyClientCertIfGiven",
            "client_auth_type",
            "VerifyClientCertIfGiven",
        ),
        (
            "client_auth_type: RequireAndVerifyClientCert",
            "client_auth_type",
            "RequireAndVerifyClientCert",
        ),
        ("client_auth_type: VerifyClientCertIfGiven\nclient_ca: X", "client_ca", "X"),
        (
            "client_auth_type: VerifyClientCertIfGiven\nclient_ca_file: ca.pem",
            "client_ca",
            "CA",
        ),
        (
            "client_auth_type: VerifyClientCertIfGiven\nclient_allowed_sans: [a, 10.0.0.1]",
            "client_allowed_sans",
            ("a", "10.0.0.1"),
        ),
        (
            "client_auth_type: RequireAndVerifyClientCert\nclient_allowed_sans: []",
            "client_allowed_sans",
            (),
        ),
        ("min_version: TLS10", "min_version", "TLS10"),
        ("min_version: TLS13", "min_version", "TLS13"),
        ("max_version: TLS12", "max_version", "TLS12"),
        (f"cipher_suites: [{', '.join(CIPHERS)}]", "cipher_suites", tuple(CIPHERS)),
        (
            f"cipher_suites: [{', '.join(TLS13_CIPHERS)}]",
            "cipher_suites",
            TLS13_CIPHERS,
        ),
        ("cipher_suites: []", "cipher_suites", ()),
        ("prefer_server_cipher_suites: false", "prefer_server_cipher_suites", False),
        ("prefer_server_cipher_suites: True", "prefer_server_cipher_suites", True),
        *(
            (f"curve_preferences: [{go}]", "curve", openssl)
            for go, openssl in CURVES.items()
        ),
    ],
)
def test_each_tls_key_has_an_effect(lines: str, name: str, value: object) -> None:
    """The sample for each key of tls_server_config changes the result."""
    assert getattr(of_tls(with_tls(lines)), name) == value


def test_the_file_may_contain_certificate_and_key() -> None:
    """They are PEM texts in the file instead of paths."""
    tls = of_tls("tls_server_config:\n  cert: |\n    A\n    B\n  key: |\n    C\n")
    assert (tls.cert, tls.key) == ("A\nB\n", "C\n")


def test_each_header_can_be_added() -> None:
    """A header with an empty value is left out."""
    config = parsed("""
http_server_config:
  http2: no
  headers:
    X-Frame-Options: deny
    Strict-Transport-Security: max-age=31536000; includeSubDomains
    X-Content-Type-Options: nosniff
    X-XSS-Protection: 1
    Content-Security-Policy: ""
""")
    assert config.headers == {
        "Strict-Transport-Security": "max-age=31536000; includeSubDomains",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "deny",
        "X-XSS-Protection": "1",
    }


def test_user_names_are_text() -> None:
    """YAML would read some of them as another type."""
    config = parsed(f"basic_auth_users:\n  alice: {HASH}\n  no: {HASH}\n  1_0: '{HASH}'\n")
    assert config.users == {"alice": HASH, "no": HASH, "1_0": HASH}


@pytest.mark.parametrize(
    ("interval", "seconds"),
    [
        ("1s", 1),
        ("1m30s", 90),
        ("100ms", 0.1),
        ("1.5h", 5400),
        ("250us", 0.00025),
        (".5s", 0.5),
    ],
)
def test_the_rate_limit_is_parsed(interval: str, seconds: float) -> None:
    """The interval has the format of Go's durations."""
    limit = parsed(f"rate_limit: {{interval: '{interval}', burst: 0}}").rate_limit
    assert limit is not None
    assert limit.interval_s == pytest.approx(seconds)
    assert limit.burst == 0


TLS_REFUSED = [
    (
        "cert_filse: x",
        4,
        "tls_server_config has no 'cert_filse'; it can have cert, cert_file",
    ),
    ("cert: x", 2, "give one of cert or cert_file, not both"),
    ("key: x", 3, "give one of key or key_file, not both"),
    ("client_auth_type: x", 4, "client_auth_type must be NoClientCert, RequestClientCert"),
    ("client_auth_type: RequestClientCert", 4, "RequestClientCert is not supported"),
    ("client_auth_type: RequireAnyClientCert", 4, "RequireAnyClientCert is not supported"),
    ("client_auth_type: RequireClientCert", 4, "RequireClientCert is not supported"),
    ("client_ca_file: ca.pem", 2, "a client CA has no effect without client_auth_type"),
    ("client_ca_file: absent", 4, "client_ca_file absent cannot be read: No such file"),
    ("client_allowed_sans: [x]", 2, "client_allowed_sans has no effect"),
    ("client_allowed_sans: x", 4, "client_allowed_sans must be a list"),
    ("min_version: TLS111", 4, "min_version must be TLS10, TLS11, TLS12 or TLS13"),
    ("max_version: 1.2", 4, "max_version must be TLS10, TLS11, TLS12 or TLS13, not '1.2'"),
    ("min_version: TLS13\nmax_version: TLS12", 2, "TLS13 is above max_version TLS12"),
    ("max_version: TLS11", 2, "min_version TLS12 is above max_version TLS11"),
    (
        "cipher_suites: [TLS_RSA_WITH_AES_128_CBC_SHA]",
        4,
        "each of cipher_suites must be TLS_ECDHE_",
    ),
    ("cipher_suites: TLS_AES_128_GCM_SHA256", 4, "cipher_suites must be a list"),
    (
        "max_version: TLS12\ncipher_suites: [TLS_AES_128_GCM_SHA256]",
        2,
        "cipher_suites has no suite of TLS12",
    ),
    ("prefer_server_cipher_suites: maybe", 4, "must be true or false, not 'maybe'"),
    (
        "curve_preferences: [CurveP257]",
        4,
        "must be CurveP256, CurveP384 or CurveP521, not",
    ),
    ("curve_preferences: [X25519]", 4, "with X25519 or several curves is not supported"),
    ("curve_preferences: [CurveP256, CurveP384]", 4, "with X25519 or several curves"),
    ("min_version: [TLS12]", 4, "min_version must be a text"),
    ("min_version: TLS12\nmin_version: TLS13", 5, "has 'min_version' twice"),
]

REFUSED = [
    *((with_tls(lines), line, sentence) for lines, line, sentence in TLS_REFUSED),
    ("tls_server_config:\n  cert_file: ''\n  key_file: server.key", 2, "cert or cert_file"),
    (
        "tls_server_config:\n  cert: ''\n  key_file: server.key",
        2,
        "requires cert or cert_file",
    ),
    (
        "tls_server_config:\n  cert_file: server.crt\n  key: ''",
        2,
        "requires key or key_file",
    ),
    ("tls_server_config:\n  cert_file: server.crt", 2, "requires key or key_file"),
    ("tls_server_config:\n  min_version: TLS13", 2, "requires cert or cert_file"),
    ("tls_server_config:\n  cert_file: x\n  key_file: x", 2, "cert_file x cannot be read"),
    ("tls_server_config: x", 1, "tls_server_config must be lines of `name: value`"),
    ("http_server_config: {http2: true}", 1, "http2 is not supported"),
    ("http_server_config: {http3: true}", 1, "http_server_config has no 'http3'"),
    (
        "http_server_config: {headers: {Content-Type: x}}",
        1,
        "headers has no 'Content-Type'",
    ),
    ("http_server_config: {headers: {x-frame-options: deny}}", 1, "no 'x-frame-options'"),
    (
        "http_server_config: {headers: {X-Frame-Options: x}}",
        1,
        "must be deny or sameorigin",
    ),
    (
        "http_server_config: {headers: {X-Content-Type-Options: sniff}}",
        1,
        "must be nosniff,",
    ),
    (
        'http_server_config: {headers: {X-XSS-Protection: "1\\r\\nSet-Cookie: x"}}',
        1,
        "X-XSS-Protection must be one line of text",
    ),
    (
        "basic_auth_users:\n  john: doe",
        2,
        "user 'john' requires a bcrypt hash",
    ),
    ("basic_auth_users:\n  john:", 2, "user 'john' requires a bcrypt hash"),
    ("basic_auth_users:\n  john: [x]", 2, "user 'john' requires a bcrypt hash"),
    ("basic_auth_users: [john]", 1, "basic_auth_users must be lines of"),
    (f"basic_auth_users:\n  a: {HASH}\n  a: {HASH}", 3, "has 'a' twice"),
    ("rate_limit: {burst: 20}", 1, "rate_limit requires interval too"),
    ("rate_limit: {interval: 1s}", 1, "rate_limit requires burst too"),
    ("rate_limit: {interval: 5, burst: 1}", 1, "a time with its unit as in 1s"),
    ("rate_limit: {interval: -1s, burst: 1}", 1, "a time with its unit as in 1s"),
    ("rate_limit: {interval: 1s, burst: many}", 1, "burst must be a whole number"),
    ("rate_limit: {interval: 1s, burst: 1, x: 1}", 1, "rate_limit has no 'x'"),
    ("metrics: {}", 1, "the file has no 'metrics'; it can have tls_server_config"),
    ("hWkNKCp3fvIx3jKnsaBI\nTuEjdwNS8A2vYdFbiKqr\n", 1, "the file must be lines of"),
    ("- a\n- b\n", 1, "the file must be lines of `name: value`"),
    ("rate_limit: {", 1, "not YAML"),
    ("a: b: c", 1, "not YAML"),
    ("\t\n", 1, "not YAML"),
    ("rate_limit:\n---\nrate_limit:\n", 2, "not YAML"),
    ("? [a]\n: b\n", 1, "a key of the file must be a text"),
]


@pytest.mark.parametrize(("text", "line", "sentence"), REFUSED)
def test_an_invalid_configuration_is_refused(text: str, line: int, sentence: str) -> None:
    """One sentence has the place, the error and the valid values."""
    with pytest.raises(WebConfigError) as refused:
        parsed(text)
    message = str(refused.value)
    assert message.startswith(f"web.yml line {line}: ")
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "basic_auth_users: {john: s3cret}",
        "tls_server_config: {cert_file: server.crt, key: [s3cret]}",
        "tls_server_config: {key: s3cret}",
        "basic_auth_users:\n  john: s3cret\n s3cret",
    ],
)
def test_an_error_contains_no_secret(text: str) -> None:
    """Many people read logs, so a message never contains a password or a key."""
    with pytest.raises(WebConfigError) as refused:
        parsed(text)
    assert "s3cret" not in str(refused.value)


def test_a_file_that_is_not_text_is_refused() -> None:
    """YAML does not allow some characters."""
    with pytest.raises(WebConfigError, match=r"web\.yml: not YAML: "):
        parsed("a: \0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('a: "\\UFFFFFFFF"', "not YAML: a number in it is too large"),
        ('a: "\\U00110000"', "not YAML: a number in it is too large"),
        ("%YAML 1." + "9" * 5003 + "\n--- {}", "not YAML: a number in it is too large"),
        *((each * 503, "nested too deeply") for each in ("[", "{", "- ", "? ")),
        ("basic_auth_users: {" + "x" * 1009 + ": y}", "user 'xxxxxx"),
        (
            "rate_limit: {interval: " + "9" * 5003 + "h, burst: 1}",
            "must be a time with its",
        ),
        ("rate_limit: {interval: 2562048h, burst: 1}", "must be a time with its unit"),
        (
            'basic_auth_users: {"\\uD800": ' + HASH + "}",
            "must be a text without surrogates",
        ),
        (
            'tls_server_config: {key: x, cert: "\\uDC80"}',
            "must be a text without surrogates",
        ),
    ],
)
def test_input_at_the_limits_of_the_parser_is_refused(text: str, sentence: str) -> None:
    """The parser raises no other error, and returns no text that cannot be encoded."""
    with pytest.raises(WebConfigError, match=sentence) as refused:
        parsed(text)
    assert len(str(refused.value)) < 600


def test_aliases_are_not_multiplied() -> None:
    """Aliases that would expand to 10^30 nodes, and an alias that contains itself."""
    lines = ["- &a0 [x]", *(f"- &a{n} [{f'*a{n - 1}, ' * 10}]" for n in range(1, 31))]
    for text in ("\n".join(lines), "&a {basic_auth_users: *a}", "&a [*a]"):
        with pytest.raises(WebConfigError, match=r"must be|requires"):
            parsed(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        with_tls("client_auth_type: VerifyClientCertIfGiven\nclient_allowed_sans: [a, b]"),
        with_tls(f"cipher_suites: [{', '.join(CIPHERS)}]"),
        f"rate_limit: {{interval: 1s, burst: 2}}\nbasic_auth_users: {{a: {HASH}}}",
    ],
)
def test_a_configuration_survives_json(text: str) -> None:
    """The reader process sends it to the serving process as JSON."""
    config = parsed(text)
    assert WebConfig.from_json(json.loads(json.dumps(asdict(config)))) == config
