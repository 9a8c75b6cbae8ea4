# SPDX-License-Identifier: GPL-3.0-only
"""Fuzz tests: random input for each input of the exporter.

`targets` has a function for each input, and ``seeds`` has real and odd examples for it.
``make fuzz`` runs atheris, which varies the seeds and is guided by code coverage. ``make
test`` runs the seeds and a few thousand fixed variations of them.
"""
