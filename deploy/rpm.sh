#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds a package of this tree for Fedora, into a directory (dist). Debian has rpmbuild too, so
# this does not require Fedora. The package contains a virtual environment for Fedora's Python:
# FOR_PYTHON is its version, by default that in deploy/rpm/python-version. REVISION is the first
# part of the package's release, by default 1. The script requires SOURCE_DATE_EPOCH, which
# `make rpm` sets to the time of the commit. PACKAGER, as in "Name <name@example.org>", is the
# maintainer, by default that in deploy/maintainer. PAYLOAD is rpm's name of the compression, by
# default the one that Fedora uses.
set -eu

cd "$(dirname "$0")/.."
into=${1:-dist}

export LC_ALL=C TZ=UTC
umask 022
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
root=$scratch/root
venv=usr/lib/tcpexporter
doc=usr/share/doc/tcpexporter

python=${FOR_PYTHON:-$(cat deploy/rpm/python-version)}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# The same version for a newer Python is an upgrade: py313 is less than py314.
release=${REVISION:-1}.py$(echo "$python" | tr -d .)
maintainer=${PACKAGER:-$(cat deploy/maintainer)}

FOR_PYTHON=$python DESTDIR=$root PREFIX=/usr deploy/install.sh stage

mkdir -p "$root/$doc"
cp CHANGELOG.md LICENSE "$root/$doc"
# In a package, a link within /usr should be relative.
ln -sfn ../../../bin/python3 "$root/$venv/bin/python3"

# Fedora requires a package to name what it bundles: bundled(python3dist(NAME)) = VERSION.
bundled=$(sed -n 's/^\([a-z0-9-]*\)==\([^ ]*\).*/Provides: bundled(python3dist(\1)) = \2/p' \
	deploy/lock/run.txt | grep -v '(setuptools)')

# Prints the lines of the section %files. The package owns its own directories completely.
files() {
	echo "%config(noreplace) /etc/default/tcpexporter"
	(cd "$root" && find $venv usr/share/tcpexporter $doc -prune -printf '/%p\n')
	(cd "$root" && find usr \( -path $venv -o -path usr/share/tcpexporter -o -path $doc \) \
		-prune -o ! -type d -printf '/%p\n')
}

files | sed "s|^/$doc$|%doc &|; s|^/usr/share/man/|%doc &|" >"$scratch/files"
echo "$bundled" >"$scratch/bundled"
# The description of the Debian package, whose lines begin with a space.
sed -n '/^Description:/,$ { s/^ \.\{0,1\}//p; }' deploy/deb/control >"$scratch/description"
sed "
	/@BUNDLED@/ { r $scratch/bundled
		d
	}
	/@DESCRIPTION@/ { r $scratch/description
		d
	}
	s|@SUMMARY@|$(sed -n 's/^Description: //p' deploy/deb/control)|
	s|@VERSION@|$version|g
	s|@RELEASE@|$release|g
	s|@PYTHON@|$python|g
	s|@NEXT_PYTHON@|${python%.*}.$((${python#*.} + 1))|g
	s|@ROOT@|$root|g
	s|@FILES@|$scratch/files|g
	s|@DATE@|$(date -d "@$SOURCE_DATE_EPOCH" '+%a %b %d %Y')|g
	s|@MAINTAINER@|$maintainer|g" \
	deploy/rpm/tcpexporter.spec >"$scratch/tcpexporter.spec"

mkdir -p "$into"
rpmbuild -bb --quiet --define "_topdir $scratch/build" --define "_rpmdir $scratch/rpms" \
	--define "_binary_payload ${PAYLOAD:-w19.zstdio}" \
	--define "_rpmfilename %{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm" \
	"$scratch/tcpexporter.spec"
cp "$scratch"/rpms/*.rpm "$into"
