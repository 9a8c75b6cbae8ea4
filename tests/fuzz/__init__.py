# SPDX-License-Identifier: GPL-3.0-only
"""Bad input, by the million: each door of the exporter, tried with what no one sends.

`targets` has the doors, ``seeds`` for each what real and odd input looks like. ``make
fuzz`` has atheris go on from there, guided by which lines are reached; ``make test``
replays the seeds, and a few thousand variations of them that are always the same.
"""
