#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds the wheel of this tree into a directory (dist): the same bytes whoever builds it,
# where, when and with what umask. It takes SOURCE_DATE_EPOCH, which `make wheel` sets to the
# time of the commit, and what is installed here: no network.
set -eu

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
into=${1:-dist}

export LC_ALL=C TZ=UTC
umask 022
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/tree"
# setuptools takes what lies there, with the modes that it has.
git ls-files -z >"$scratch/names"
tar --null --files-from="$scratch/names" --mode=u=rwX,go=rX -cf "$scratch/tree.tar"
tar -C "$scratch/tree" -xf "$scratch/tree.tar"
# The exporter shows this commit, and does not run git for it.
if git rev-parse -q --verify HEAD >"$scratch/revision"; then
	cp "$scratch/revision" "$scratch/tree/tcpexporter/revision.txt"
fi
# Without compression: not every zlib makes the same of the same.
"$python" -m pip wheel -q --disable-pip-version-check --no-index --no-deps \
	--no-build-isolation --config-settings=--build-option=--compression=stored \
	--wheel-dir "$into" "$scratch/tree"
