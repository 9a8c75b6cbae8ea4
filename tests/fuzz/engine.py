# SPDX-License-Identifier: GPL-3.0-only
"""Has atheris fuzz one target: python -m tests.fuzz.engine TARGET RUNS SECONDS.

All that it takes of atheris is here. It is libFuzzer within: that counts lines reached,
writes an input that raises, is slow or takes much memory to a file, and ends the process.
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
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415  what it reaches is counted

    warnings.simplefilter("error")  # numpy's too
    os.environ["LANGUAGE"] = "C"  # argparse looks for translations each time
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
