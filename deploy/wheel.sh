#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds the wheel of this tree into a directory (dist). The same commit gives the same bytes
# on every host, for every user and umask. It requires SOURCE_DATE_EPOCH, which `make wheel`
# sets to the time of the commit, and the installed build tools, but no network.
set -eu

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
into=${1:-dist}

export LC_ALL=C TZ=UTC
umask 022
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/tree"
# setuptools adds every file of the directory, with its mode. So copy only the files that git
# knows, with fixed modes.
git ls-files -z >"$scratch/names"
tar --null --files-from="$scratch/names" --mode=u=rwX,go=rX -cf "$scratch/tree.tar"
tar -C "$scratch/tree" -xf "$scratch/tree.tar"
# The exporter reads its commit from this file, because it does not run git.
if git rev-parse -q --verify HEAD >"$scratch/revision"; then
	cp "$scratch/revision" "$scratch/tree/tcpexporter/revision.txt"
fi
# Without compression: the versions of zlib compress the same input to different bytes.
"$python" -m pip wheel -q --disable-pip-version-check --no-index --no-deps \
	--no-build-isolation --config-settings=--build-option=--compression=stored \
	--wheel-dir "$into" "$scratch/tree"
