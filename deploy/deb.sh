#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds a package of this tree for the release of Debian or Ubuntu that it runs on, into a
# directory (dist). It requires SOURCE_DATE_EPOCH, which `make deb` sets to the time of the
# commit. There are two kinds of packages:
#
# - For Debian 13, it has the exporter's modules and requires Debian's Python packages. It can
#   be built on each release, with FOR_RELEASE=debian13.
# - For other releases, whose Python packages are too old, it has a virtual environment for the
#   distribution's Python. FOR_ARCH is its architecture, amd64 or arm64, by default this
#   machine's.
#
# REVISION is the last part of its version, 1. DEBEMAIL, as in "Name <name@example.org>", is
# the maintainer, by default that in deploy/maintainer.
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
here=$ID${VERSION_ID-}
release=${FOR_RELEASE:-$here}
upstream=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# The same version for a newer release is an upgrade: ~debian12 is less than ~debian13.
version=$upstream-${REVISION:-1}~$release
native=$(dpkg --print-architecture)
maintainer=${DEBEMAIL:-$(cat deploy/maintainer)}

main() {
	case $release in
	debian13)
		architecture=all
		stage_modules
		;;
	"$here")
		architecture=${FOR_ARCH:-$native}
		stage_venv
		;;
	*)
		echo "deb: this is $here: build a package for $release on $release" >&2
		exit 1
		;;
	esac
	add_changelogs
	pack
}

# Adds the exporter's modules where Debian's Python finds them.
stage_modules() {
	modules=/usr/lib/python3/dist-packages
	DESTDIR=$root PREFIX=/usr MODULES=$modules ZSH_DIR=vendor-completions \
		deploy/install.sh stage
	# dpkg has the list of files. Without RECORD, pip refuses to uninstall the exporter.
	rm "$root$modules"/tcpexporter-*.dist-info/RECORD
	echo debian >"$(echo "$root$modules"/tcpexporter-*.dist-info/INSTALLER)"
	mkdir -p "$doc"
	cp deploy/deb/copyright "$doc"
	# The lowest versions are those of pyproject.toml. python3-h11 is patched: CVE-2025-43859.
	depends="python3 (>= 3.11), python3-bcrypt (>= 4.1.1), python3-bpfcc,
 python3-h11 (>= 0.14.0-1.1), python3-numpy (>= 1:1.26), python3-prometheus-client (>= 0.21.1),
 python3-pyroute2 (>= 0.7.7), python3-pythonjsonlogger (>= 3.1), python3-seccomp,
 python3-yaml (>= 6)"
	# The description is that of the other kind.
	edit='s/^ virtual environment\. The service/ The service/; /^ The package contains/d'
}

# Adds a virtual environment.
stage_venv() {
	DESTDIR=$root PREFIX=/usr ZSH_DIR=vendor-completions deploy/install.sh stage
	# In a package, a link within /usr must be relative.
	ln -sfn ../../../bin/python3 "$root/usr/lib/tcpexporter/bin/python3"
	mkdir -p "$doc" "$root/usr/share/lintian/overrides"
	cp deploy/deb/overrides "$root/usr/share/lintian/overrides/tcpexporter"
	site=$(echo "$root"/usr/lib/tcpexporter/lib/python3*/site-packages)
	write_copyright
	depends="$(python_range), $(libraries), python3-bpfcc, libseccomp2"
	edit=
}

# Adds the licences of the other Python packages from their metadata.
write_copyright() {
	{
		cat deploy/deb/copyright
		cat <<-END

			The virtual environment /usr/lib/tcpexporter also contains the following Python
			packages, as their authors have published them.

		END
		for metadata in "$site"/*.dist-info; do
			case $metadata in */tcpexporter-*) continue ;; esac
			sed -n '/^$/q; /^\(Name\|Version\|License\|License-Expression\|Author\): /p' \
				"$metadata/METADATA"
			echo "Texts:"
			find "$metadata" -iname 'LICEN[CS]E*' -type f | sed "s|^$root| |" | sort
			echo
		done
	} >"$doc/copyright"
}

# Prints the dependency on the version of Python that the virtual environment is for.
python_range() {
	/usr/bin/python3 -c 'import sys
major, minor = sys.version_info[:2]
print(f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1})")'
}

# Prints the packages of the libraries that the virtual environment requires and does not
# contain.
libraries() {
	mkdir "$scratch/debian" "$scratch/libraries"
	touch "$scratch/debian/control"
	[ "$architecture" = "$native" ] || fetch_libraries "$scratch/libraries" >&2
	libraries=$(find "$root/usr/lib/tcpexporter" -name '*.so*' -type f)
	# shellcheck disable=SC2046,SC2086  # one word for each library
	(
		cd "$scratch"
		DEB_HOST_ARCH=$architecture dpkg-shlibdeps -O --ignore-missing-info -l"$site/numpy.libs" \
			$(find libraries -mindepth 1 -maxdepth 1 -printf '-S%p ') $libraries \
			2>"$scratch/shlibdeps"
	) >"$scratch/shlibs" || {
		cat "$scratch/shlibdeps" >&2
		exit 1
	}
	sed 's/^shlibs:Depends=//' "$scratch/shlibs"
}

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

add_changelogs() {
	gzip -9n <CHANGELOG.md >"$doc/changelog.gz"
	gzip -9n >"$doc/changelog.Debian.gz" <<-END
		tcpexporter ($version) unstable; urgency=medium

		  * Package of tcpexporter $upstream: its changes are in changelog.gz.

		 -- $maintainer  $(date -R -d "@$SOURCE_DATE_EPOCH")
	END
}

pack() {
	mkdir -p "$root/DEBIAN" "$into"
	cp deploy/deb/postinst deploy/deb/prerm deploy/deb/postrm "$root/DEBIAN"
	echo /etc/default/tcpexporter >"$root/DEBIAN/conffiles"
	(cd "$root" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
	sed "
		s|@VERSION@|$version|
		s|@ARCHITECTURE@|$architecture|
		s|@MAINTAINER@|$maintainer|
		s|@DEPENDS@|$(echo "$depends" | paste -s -d '')|
		s|@SIZE@|$(find "$root" -type f -printf '%s\n' | awk '{ sum += int(($1 + 1023) / 1024) }
			END { print sum }')|
		$edit" \
		deploy/deb/control >"$root/DEBIAN/control"
	dpkg-deb --root-owner-group --build "$root" "$into/tcpexporter_${version}_$architecture.deb"
}

main
