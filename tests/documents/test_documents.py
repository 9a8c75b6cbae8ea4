# SPDX-License-Identifier: GPL-3.0-only
"""The documents agree with the code and with each other, and their links and commands
work."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from deploy import documents
from tcpexporter.config.settings import parse
from tcpexporter.web import config_file
from tests.documents import messages

ROOT = Path(__file__).parents[2]
MAN_PAGE = ROOT / "deploy" / "man" / "tcpexporter.8"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README_LINES = 200

NOT_RUN = {
    "cd vagrant": "the lines after it are tested",
    "vagrant up": "it starts a VM; make vm-test checks the Vagrantfile",
    "vagrant ssh -c 'cd /tcpexporter && sudo make test'": "it requires that VM",
    "curl --cacert ca.crt --cert client.crt --key client.key -u prometheus"
    " https://HOST:9690/metrics": "it asks for a password",
    "curl -s http://localhost:9690/metrics '|' grep longterm": "it requires an exporter",
    "sleep '8;' curl -s http://localhost:9690/metrics '|'"
    " grep 'longterm_connections.*8765'": "it requires an exporter",
    """python3 -c 'import socket, time; at = "127.0.0.1", 8765;"""
    """ s = socket.create_server(at); c = socket.create_connection(at);"""
    """ time.sleep(60)' '&'""": "tests/e2e does this",
    "pip install --require-hashes -r deploy/lock/run.txt": "tests/packaging does this",
    "pip install --no-deps 'dist/*.whl'": "tests/packaging builds the wheel",
    "sed -i s,https://tcpexporter.example,https://wiki.example.org/tcpexporter,"
    " 'deploy/prometheus/*.rules.yml' 'deploy/grafana/*.json'": "it changes the rules",
    "sudo install -d -m 0700 /var/lib/tcpexporter": "it would change this host",
    "journalctl -u tcpexporter": "it requires the service, which make vm-test has",
    "sudo systemctl reload tcpexporter": "it requires the service, which make vm-test has",
    "sudo systemctl restart tcpexporter": "make vm-test has the service",
    "sudo systemctl enable --now tcpexporter": "make vm-test has the service",
    "sudo apt install './dist/tcpexporter_*~debian12_amd64.deb'": (
        "tests/packaging does this"
    ),
    "sudo apt remove tcpexporter": "tests/packaging does this",
    "sudo apt purge tcpexporter": "tests/packaging does this",
    "sudo dnf install './dist/tcpexporter-*.rpm'": "tests/packaging installs it with rpm",
    "sudo rm -rf /var/lib/tcpexporter /var/lib/private/tcpexporter"
    " /sys/fs/bpf/tcpexporter": "it would remove the ages of this host",
    "man -l deploy/man/tcpexporter.8": "other tests read the man page",
}
"""Commands that are not run here, each with the reason."""


def text_of(path: Path) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", path.read_text())


def commands_in(path: Path) -> list[str]:
    """Return the lines of a document's indented blocks, without comments."""
    lines = re.findall(r"(?m)^(?: {4}| {6})(\S.*)$", text_of(path))
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


COMMANDS = sorted({each for path in DOCUMENTS for each in commands_in(path)})


# --- Generated parts ---


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=lambda each: each.name)
def test_a_generated_document_is_up_to_date(path: Path) -> None:
    """After a change of a setting, metric or module, run `make documents`."""
    text = path.read_text()
    assert documents.DOCUMENTS[path](text) == text, "run make documents"


def test_the_runbook_has_an_entry_for_each_alert() -> None:
    """The document would leave out an entry of an alert that does not exist."""
    groups = [
        group
        for path in documents.RULES
        for group in yaml.safe_load(path.read_text())["groups"]
    ]
    alerts = [
        rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule
    ]
    assert sorted(yaml.safe_load(documents.RUNBOOK.read_text())) == sorted(alerts)


# --- Lengths, links and names ---


def test_the_readme_is_short() -> None:
    """Newcomers read the README first, so details are in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def anchors_of(path: Path) -> set[str]:
    """Return the anchors that a forge makes from the headings of a document."""
    headings = re.findall(r"(?m)^#+ (.*)$", text_of(path))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


def links_of(path: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if not target.startswith("https://"):
            yield target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda each: each.name)
def test_links_within_the_tree_resolve(path: Path) -> None:
    """A link is broken if a file was moved or a heading was reworded."""
    broken = []
    for link in links_of(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_linked_from_the_readme() -> None:
    """Otherwise readers would not find the page."""
    links = set(links_of(ROOT / "README.md"))
    assert {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")} <= links


def test_the_files_that_the_documents_name_exist() -> None:
    """A name is wrong if a module or test was moved or renamed."""
    named = {
        (document.name, path)
        for document in DOCUMENTS
        for path in re.findall(
            r"`((?:tcpexporter|tests|deploy|bpf)/[\w/.-]*)`", text_of(document)
        )
    }
    assert len(named) > 70
    assert not sorted(each for each in named if not (ROOT / each[1]).exists())


def test_the_metrics_that_the_documents_name_exist() -> None:
    """A name is wrong if a metric was renamed."""
    page = documents.metric_names()
    named = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"`((?:tcpexporter|netstat|tcp)_\w+)", text_of(path))
    }
    assert named - page <= {
        "tcp_established_exporter",
        "tcp_diag",
        "tcp_info",
        "tcp_version",
    }


def test_every_message_is_in_troubleshooting() -> None:
    """Operators search the page for the text of a message."""
    missing = messages.missing(messages.PAGE.read_text())
    assert not missing, "add to docs/troubleshooting.md:\n" + "\n".join(map(str, missing))


def test_a_message_that_the_page_lacks_is_reported() -> None:
    """With an empty page, messages of every kind are reported."""
    found = {each.path.name for each in messages.missing("")}
    assert {"settings.py", "loader.py", "config_file.py", "privileges.py"} <= found


# --- Commands ---


def try_command(command: str) -> bool:
    """Try a command, in part if it is slow; return whether that is possible."""
    words = shlex.split(command.removeprefix("sudo "))
    if words[0] == "make":
        dry_run = subprocess.run(
            ["make", "-n", *words[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert dry_run.returncode == 0, dry_run.stderr
    elif words[0].endswith("/tcpexporter"):
        parse(words[1:], {})
    elif words[:2] == [".venv/bin/python", "-m"]:
        assert find_spec(words[2])
        assert all((ROOT / each).exists() for each in words[3:])
    elif words[:2] == [".venv/bin/python", "-c"]:
        assert run_python(words[2]).startswith("$2b$10$")
    elif words[0] == "docker":  # tests/container runs them with podman
        assert words[1] in ("build", "run")
    elif words[0] == "kubectl":  # tests/container renders these directories
        assert (ROOT / words[-1] / "kustomization.yaml").exists()
    else:
        return False
    return True


def run_python(program: str) -> str:
    """Run a program without a terminal for password prompts; return its output."""
    return subprocess.run(
        [sys.executable, "-c", program],
        input="a password\n",
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    ).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works_or_has_a_reason_not_to_be_run(command: str) -> None:
    """A command fails if a make target, flag or file was removed."""
    assert command in NOT_RUN or try_command(command), "say in NOT_RUN why it is not run"


def test_each_reason_is_for_a_command_in_the_documents() -> None:
    assert NOT_RUN.keys() <= set(COMMANDS)


def test_the_manifests_in_the_documents_are_those_of_the_examples() -> None:
    """tests/container renders the examples, validates them and runs them."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    files = ROOT.glob("deploy/kubernetes/examples/*/kustomization.yaml")
    examples = {re.sub(r"(?m)^#.*\n", "", each.read_text()) for each in files}
    manifests = re.findall(r"(?ms)^```yaml\n(.*?)^```$", page)
    assert len(manifests) == 3
    assert set(manifests) <= examples


def test_the_web_configuration_in_the_documents_is_valid() -> None:
    """The scrape_config next to it is valid YAML with the same user."""
    web, scrape = re.findall(
        r"(?ms)^```yaml\n(.*?)^```$", (ROOT / "docs/tls.md").read_text()
    )
    config = config_file.parse(web, "web.yml", lambda _: "the content of a file")
    (user,) = config.users
    assert yaml.safe_load(scrape)["basic_auth"]["username"] == user


# --- The man page ---


def test_the_man_page_has_the_sections_of_man_pages() -> None:
    """Their order is that of man-pages(7)."""
    sections = re.findall(r"(?m)^\.SH (.*)$", MAN_PAGE.read_text())
    assert sections == [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "OPTIONS",
        "ENVIRONMENT",
        "FILES",
        "SIGNALS",
        "EXIT STATUS",
        "EXAMPLES",
        "SEE ALSO",
    ]


def test_the_man_page_has_every_flag_and_only_known_macros() -> None:
    text = MAN_PAGE.read_text()
    flags = {
        flag for _, group in documents.described() for each in group for flag in each.flags
    }
    assert all(flag.replace("-", r"\-") in text for flag in flags)
    assert "@" not in text  # no placeholder of the template remains
    macros = set(re.findall(r"(?m)^[.'](\S+)", text))
    assert macros <= {'\\"', "TH", "SH", "SS", "TP", "PP", "B", "BR", "RI", "RB", "I", "br"}


def test_the_man_page_can_be_formatted() -> None:
    """One of the installed formatters accepts it; without a formatter only its lines are
    checked."""
    for formatter in (
        ["mandoc", "-T", "lint", "-W", "warning"],
        ["groff", "-man", "-ww", "-z"],
    ):
        if shutil.which(formatter[0]):
            done = subprocess.run(
                [*formatter, MAN_PAGE], capture_output=True, text=True, check=False
            )
            assert not done.stdout + done.stderr
