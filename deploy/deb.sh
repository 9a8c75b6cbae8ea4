#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds a package of this tree for the release of Debian or Ubuntu that it runs on, into a
# directory (dist). The package contains a virtual environment for the distribution's Python.
# FOR_ARCH is its architecture, amd64 or arm64, by default this machine's.
# REVISION is the last part of its version, 1. It requires SOURCE_DATE_EPOCH, which `make deb`
# sets to the time of the commit. DEBEMAIL, as in "Name <name@example.org>", is the maintainer,
# by default that in deploy/maintainer.
set -eu

cd "$(dirname "$0")/.."
into=${1:-dist}

export LC_ALL=C TZ=UTC
umask 022
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
root=$scratch/root
doc=$root/usr/share/doc/tcpexporter

# shellcheck source=/dev/null
. /etc/os-release
upstream=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# The same version for a newer release is an upgrade: ~debian12 is less than ~debian13.
version=$upstream-${REVISION:-1}~$ID${VERSION_ID-}
native=$(dpkg --print-architecture)
architecture=${FOR_ARCH:-$native}
maintainer=${DEBEMAIL:-$(cat deploy/maintainer)}

DESTDIR=$root PREFIX=/usr ZSH_DIR=vendor-completions deploy/install.sh stage

# In a package, a link within /usr must be relative.
ln -sfn ../../../bin/python3 "$root/usr/lib/tcpexporter/bin/python3"

mkdir -p "$doc" "$root/DEBIAN" "$root/usr/share/lintian/overrides"
cp deploy/deb/overrides "$root/usr/share/lintian/overrides/tcpexporter"
gzip -9n <CHANGELOG.md >"$doc/changelog.gz"
gzip -9n >"$doc/changelog.Debian.gz" <<-END
	tcpexporter ($version) unstable; urgency=medium

	  * Package of tcpexporter $upstream: its changes are in changelog.gz.

	 -- $maintainer  $(date -R -d "@$SOURCE_DATE_EPOCH")
END

# Add the licences of the other Python packages from their metadata.
{
	cat deploy/deb/copyright
	for metadata in "$root"/usr/lib/tcpexporter/lib/python3*/site-packages/*.dist-info; do
		case $metadata in */tcpexporter-*) continue ;; esac
		sed -n '/^$/q; /^\(Name\|Version\|License\|License-Expression\|Author\): /p' \
			"$metadata/METADATA"
		echo "Texts:"
		find "$metadata" -iname 'LICEN[CS]E*' -type f | sed "s|^$root| |" | sort
		echo
	done
} >"$doc/copyright"

# Unpacks the release's packages of libraries for another architecture into directories in $1:
# dpkg-shlibdeps reads the names and the versions of their symbols.
fetch_libraries() {
	deploy/setup.sh require "$(dpkg-architecture -A "$architecture" -q DEB_TARGET_GNU_TYPE)-objdump"
	mkdir -p "$scratch/apt/lists/partial" "$scratch/apt/archives/partial"
	touch "$scratch/apt/status"
	foreign_apt update
	for package in libc6 libgcc-s1 libstdc++6 zlib1g; do
		(cd "$scratch/apt" && foreign_apt download $package)
		mkdir -p "$1/$package"
		dpkg-deb --raw-extract "$scratch/apt/$package"_*.deb "$1/$package"
	done
}

# Runs apt-get with the sources of this machine, for the other architecture. It changes nothing
# outside of $scratch.
foreign_apt() {
	apt-get -qq -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" \
		-o Dir::State="$scratch/apt" -o Dir::State::status="$scratch/apt/status" \
		-o Dir::Cache="$scratch/apt" -o APT::Sandbox::User=root \
		-o Acquire::Languages=none "$@"
}

mkdir "$scratch/libraries"
[ "$architecture" = "$native" ] || fetch_libraries "$scratch/libraries"

# The packages of the libraries that the virtual environment requires and does not contain.
libraries=$(find "$root/usr/lib/tcpexporter" -name '*.so*' -type f)
mkdir "$scratch/debian"
touch "$scratch/debian/control"
# shellcheck disable=SC2046,SC2086  # one word for each library
shlibs=$(cd "$scratch" && DEB_HOST_ARCH=$architecture dpkg-shlibdeps -O --ignore-missing-info \
	-l"$(echo "$root"/usr/lib/tcpexporter/lib/python3*/site-packages/numpy.libs)" \
	$(find libraries -mindepth 1 -maxdepth 1 -printf '-S%p ') $libraries 2>"$scratch/shlibdeps") || {
	cat "$scratch/shlibdeps" >&2
	exit 1
}
python=$(/usr/bin/python3 -c 'import sys
major, minor = sys.version_info[:2]
print(f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1})")')

cp deploy/deb/postinst deploy/deb/prerm deploy/deb/postrm "$root/DEBIAN"
echo /etc/default/tcpexporter >"$root/DEBIAN/conffiles"
(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
sed "
	s|@VERSION@|$version|
	s|@ARCHITECTURE@|$architecture|
	s|@MAINTAINER@|$maintainer|
	s|@PYTHON@|$python|
	s|@SHLIBS@|${shlibs#shlibs:Depends=}|
	s|@SIZE@|$(du -sk --apparent-size "$root" | cut -f 1)|" \
	deploy/deb/control >"$root/DEBIAN/control"

mkdir -p "$into"
dpkg-deb --root-owner-group --build "$root" "$into/tcpexporter_${version}_$architecture.deb"
