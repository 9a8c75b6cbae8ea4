# SPDX-License-Identifier: GPL-3.0-only
"""Runs each known attack on the exporter, one after another, while it is scraped.

    python -m tests.hostile [--seconds SECONDS] [NAME ...]

It prints the results as a table. The exit code is 1 in each of these cases: a scrape failed
or took a second; the exporter used too much memory or too many descriptors; it did not
recover.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from tests.hostile.attacking import (
    CONNECTIONS,
    Figures,
    attack,
    first_logins,
    start_exporter,
)
from tests.hostile.attacks import ATTACKS
from tests.hostile.watching import Scraped
from tests.support import Peers, inside, new_netns

HEAD = (
    *("attack", "clients", "connections", "requests", "MB sent"),
    *("scrapes failed", "slowest", "on a persistent connection", "first login"),
    *("failed from an attacker's address", "peak memory", "peak descriptors"),
    "memory afterwards",
)


def _row(figures: Figures) -> tuple[str, ...]:
    done, watched = figures.done, figures.watched
    return (
        figures.attack.text,
        f"{figures.attack.clients:,}",
        f"{done.connections:,}",
        f"{done.requests:,}",
        f"{done.sent_bytes / 1e6:,.0f}",
        _failed(*watched.judged),
        *(_slowest(each) for each in watched.judged),
        _failed(watched.attackers_network),
        f"{figures.peak_mib:.1f} MiB",
        str(watched.descriptors),
        f"{figures.growth_mib:+.1f} MiB".replace("-", "−"),
    )


def _failed(*scraped: Scraped) -> str:
    failed = sum(len(each.failures) for each in scraped)
    return f"{failed} of {sum(each.scrapes for each in scraped)}"


def _slowest(scraped: Scraped) -> str:
    return f"{scraped.slowest_s * 1000:.0f} ms" if scraped.scrapes else ""


def _write(cells: tuple[str, ...]) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", default=list(ATTACKS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=25)
    chosen = parser.parse_args()
    problems = []
    _write(HEAD)
    _write(("---",) * len(HEAD))
    with new_netns() as netns, inside(netns), Peers() as peers:
        peers.connect(CONNECTIONS)
        for web, names in itertools.groupby(chosen.names, lambda name: ATTACKS[name].web):
            with (
                tempfile.TemporaryDirectory() as directory,
                start_exporter(Path(directory), web, peers) as exporter,
            ):
                for name in names:
                    logins = first_logins() if web == "passwords" else ()
                    figures = attack(
                        exporter, peers, name, seconds=chosen.seconds, first_logins=logins
                    )
                    _write(_row(figures))
                    found = [*figures.problems, *figures.delays]
                    problems += [f"{name}: {each}" for each in found]
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
