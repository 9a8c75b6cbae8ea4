# SPDX-License-Identifier: GPL-3.0-only
"""Runs atheris on one target.

    python -m tests.fuzz.engine TARGET RUNS SECONDS

Only this module uses atheris, which is libFuzzer for Python. It measures the coverage of
each input. If an input raises an exception, is slow or uses much memory, atheris writes it
to a file and ends the process.
"""

import os
import sys
import warnings

import atheris

from tests.fuzz.choices import FOUND, SEEDS

LONGEST_BYTES = 2048
SLOWEST_S = 20
MOST_MEMORY_MIB = 512


def main(target: str, runs: str, seconds: str) -> None:
    with atheris.instrument_imports(include=["tcpexporter"]):
        # atheris measures the coverage of the modules imported here
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415

    warnings.simplefilter("error")  # numpy's warnings too
    os.environ["LANGUAGE"] = "C"  # otherwise argparse searches for translations each time
    corpus = FOUND / target / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    arguments = [
        *(sys.argv[0], str(corpus), str(SEEDS / target)),
        *(f"-runs={runs}", f"-max_total_time={seconds}", "-print_final_stats=1"),
        *(f"-max_len={LONGEST_BYTES}", f"-timeout={SLOWEST_S}"),
        *(f"-rss_limit_mb={MOST_MEMORY_MIB}", "-verbosity=1"),
        f"-artifact_prefix={FOUND / target}/",
    ]
    atheris.Setup(arguments, TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
