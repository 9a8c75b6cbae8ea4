#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds the wheel of this tree into a directory (dist). The bytes do not depend on the user,
# path, time or umask. Requires SOURCE_DATE_EPOCH, which `make wheel` sets to the time of the
# commit, and the packages installed here, but no network.
set -eu

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
into=${1:-dist}

export LC_ALL=C TZ=UTC
umask 022
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/tree"
# setuptools packs every file that it finds, with its mode.
git ls-files -z >"$scratch/names"
tar --null --files-from="$scratch/names" --mode=u=rwX,go=rX -cf "$scratch/tree.tar"
tar -C "$scratch/tree" -xf "$scratch/tree.tar"
# Without compression: its output depends on the version of zlib.
"$python" -m pip wheel -q --disable-pip-version-check --no-index --no-deps \
	--no-build-isolation --config-settings=--build-option=--compression=stored \
	--wheel-dir "$into" "$scratch/tree"
