#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds the files of a release into dist: wheel, source archive, packages for this release of
# Debian and for Debian 13, bill of materials, checksums, and the release notes from CHANGELOG.md.
# `make release` calls it.
#
# It requires a tree without changes. With TAG=1 it also tags the version; then CHANGELOG.md
# must have a section for that version. It pushes nothing.
set -eu

cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH

main() {
	umask 022
	[ -z "$(git status --porcelain)" ] || fail "the tree has changes: commit them first"
	[ -z "${TAG-}" ] || ! git rev-parse -q --verify "refs/tags/v$version" >/dev/null ||
		fail "the tag v$version exists: raise the version in pyproject.toml"
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	write_notes
	rm -rf dist
	mkdir dist
	deploy/wheel.sh dist
	pack_source
	deploy/deb.sh dist
	FOR_RELEASE=debian13 deploy/deb.sh dist
	.venv/bin/python -m deploy.sbom >dist/tcpexporter.cdx.json
	cp "$scratch/notes" dist/NOTES.md
	(cd dist && sha256sum -- * >"$scratch/sums" && mv "$scratch/sums" SHA256SUMS)
	[ -z "${TAG-}" ] || git tag -a --cleanup=verbatim -F dist/NOTES.md "v$version"
	say "built in dist:"
	ls dist
}

say() {
	echo "release: $*" >&2
}

fail() {
	say "$*"
	exit 1
}

# Writes the section of CHANGELOG.md for this version. Without a tag, it may be unreleased.
write_notes() {
	notes_of "$version" >"$scratch/notes"
	[ ! -s "$scratch/notes" ] || return 0
	[ -z "${TAG-}" ] || fail "CHANGELOG.md has no section [$version]"
	say "CHANGELOG.md has no section [$version]: the notes are those of [Unreleased]"
	notes_of Unreleased >"$scratch/notes"
}

notes_of() {
	awk -v heading="## [$1]" '
		/^## \[/ { is_wanted = index($0, heading) == 1; next }
		is_wanted' CHANGELOG.md
}

# A source archive for pip: the tree of the commit, the metadata of the wheel, and the commit.
pack_source() {
	.venv/bin/python -m zipfile -e "dist/tcpexporter-$version-py3-none-any.whl" "$scratch/wheel"
	cp "$scratch/wheel/tcpexporter-$version.dist-info/METADATA" "$scratch/PKG-INFO"
	git rev-parse HEAD >"$scratch/revision.txt"
	git archive --prefix="tcpexporter-$version/tcpexporter/" --add-file="$scratch/revision.txt" \
		--prefix="tcpexporter-$version/" --add-file="$scratch/PKG-INFO" HEAD |
		gzip -9n >"dist/tcpexporter-$version.tar.gz"
}

main "$@"
