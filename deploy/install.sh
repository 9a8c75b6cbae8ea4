#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Installs the exporter of this tree on this system, or removes it. `make install` and
# `make uninstall` call it with one of:
#
#   install     install the files, and compile the Python modules
#   stage       only install the files: deploy/deb.sh and deploy/rpm.sh make packages of them
#   uninstall   stop the service, and remove the files
#
# PREFIX is the directory of the installation, by default /usr/local. DESTDIR is written before
# each path, so that another program can pack the files. ZSH_DIR is the directory under share/zsh
# for completions. FOR_PYTHON, as in 3.13, makes "stage" install Python packages for another
# version than this system's, and FOR_ARCH, as in arm64, for another architecture. MODULES is a
# directory where the distribution's Python finds modules: "stage" installs only the exporter's
# own there, and makes no virtual environment. Building requires the packages of
# `deploy/setup.sh run`.
set -eu

cd "$(dirname "$0")/.."

prefix=${PREFIX:-/usr/local}
destdir=${DESTDIR-}
share=$prefix/share
settings=/etc/default/tcpexporter
# A virtual environment with the exporter and the packages of deploy/lock/run.txt.
venv=$prefix/lib/tcpexporter
modules=${MODULES-}
# The distribution's Python: another one could not import its BCC package.
python=/usr/bin/python3

main() {
	umask 022
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	case ${1-} in
	install)
		stage
		# -s: tracebacks show the paths without DESTDIR.
		"$python" -m compileall -q ${destdir:+-s "$destdir"} "$destdir$venv/lib"
		if [ -n "$destdir" ]; then
			say "installed in $destdir"
		else
			say "installed; to start the service: systemctl enable --now tcpexporter"
		fi
		;;
	stage) stage ;;
	uninstall) uninstall ;;
	*) fail "usage: $0 install|stage|uninstall" ;;
	esac
}

say() {
	echo "install: $*" >&2
}

fail() {
	say "$*"
	exit 1
}

# Prints a line for each installed file outside of the virtual environment: its source, its
# mode, and its path.
files() {
	cat <<-END
		$scratch/command 755 $prefix/bin/tcpexporter
		$scratch/unit 644 $prefix/lib/systemd/system/tcpexporter.service
		$scratch/man 644 $share/man/man8/tcpexporter.8.gz
		deploy/systemd/tcpexporter.default 644 $settings
		deploy/completion/tcpexporter.bash 644 $share/bash-completion/completions/tcpexporter
		deploy/completion/tcpexporter.zsh 644 $share/zsh/${ZSH_DIR:-site-functions}/_tcpexporter
		deploy/completion/tcpexporter.fish 644 $share/fish/vendor_completions.d/tcpexporter.fish
	END
	for file in deploy/prometheus/*.rules.yml deploy/grafana/*.json; do
		[ ! -e "$file" ] || echo "$file 644 $share/tcpexporter/${file#deploy/}"
	done
	for file in README.md docs/*.md; do
		echo "$file 644 $share/doc/tcpexporter/$file"
	done
}

stage() {
	make_files
	if [ -n "$modules" ]; then
		site=$destdir$modules
		add_exporter
	else
		fill_venv
	fi
	files | while read -r source mode path; do
		if [ "$path" = $settings ] && is_changed; then
			say "$settings has settings, so it is kept"
			continue
		fi
		mkdir -p "$destdir$(dirname "$path")"
		install -m "$mode" "$source" "$destdir$path"
	done
}

# Succeeds if the environment file has a line that is not a comment.
is_changed() {
	grep -qs '^[^#]' "$destdir$settings"
}

# Makes the files that depend on PREFIX, or are compressed.
make_files() {
	sed "s|^ExecStart=.*|ExecStart=$prefix/bin/tcpexporter|" \
		deploy/systemd/tcpexporter.service >"$scratch/unit"
	gzip -9n <deploy/man/tcpexporter.8 >"$scratch/man"
	# Not a link into the virtual environment: SELinux in Fedora allows systemd to execute files
	# in bin, but not in lib.
	interpreter=$venv/bin/python3
	[ -z "$modules" ] || interpreter=$python
	cat >"$scratch/command" <<-END
		#!$interpreter -I
		import sys

		from tcpexporter.__main__ import main

		sys.exit(main())
	END
}

fill_venv() {
	deploy/setup.sh wheels
	version=${FOR_PYTHON:-$("$python" -c 'import sys
print("%d.%d" % sys.version_info[:2])')}
	platforms=$(deploy/platforms.sh "${FOR_ARCH-}")
	site=$destdir$venv/lib/python$version/site-packages
	rm -rf "$destdir$venv"
	mkdir -p "$destdir$venv/bin"
	ln -s "$python" "$destdir$venv/bin/python3"
	# BCC is a package of the distribution.
	printf 'home = /usr/bin\ninclude-system-site-packages = true\n' >"$destdir$venv/pyvenv.cfg"
	# setuptools has built the exporter, and is not required any more.
	sed '/^setuptools==/,/[^\\]$/d' deploy/lock/run.txt >"$scratch/run.txt"
	# shellcheck disable=SC2086  # one word for each platform
	pip_install --python-version "$version" $platforms --require-hashes \
		--find-links .cache/wheels -r "$scratch/run.txt"
	add_exporter
}

# Adds the exporter's modules to the directory of installed packages, and cleans it.
add_exporter() {
	SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(date +%s)} deploy/wheel.sh "$scratch/wheel"
	pip_install --no-deps --find-links "$scratch/wheel" tcpexporter
	# Libraries and modules are not executed by their name.
	find "$site" -type f -perm /111 -exec chmod a-x {} +
	find "$site" -type d -name tests -prune -exec rm -r {} +
	# Remove the deleted files from the lists of installed files too.
	find "$site" -name RECORD -exec sed -i -E '/^\.\.\/|(^|\/)tests\//d' {} +
}

# Installs packages even if the system has the same ones: the system can upgrade or remove its
# own.
pip_install() {
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-index \
		--only-binary=:all: --no-compile --target "$site" "$@"
	# The commands of these packages contain a path of the build.
	rm -rf "${site:?}/bin"
}

uninstall() {
	if [ -z "$destdir" ] && [ -d /run/systemd/system ]; then
		systemctl disable --now tcpexporter || say "there is no service to stop"
	fi
	rm -rf "$destdir$venv"
	files | while read -r _ _ path; do
		if [ "$path" = $settings ] && is_changed; then
			say "$settings has settings, so it is kept"
			continue
		fi
		rm -f "$destdir$path"
	done
	for directory in "$destdir$share/tcpexporter" "$destdir$share/doc/tcpexporter"; do
		[ ! -d "$directory" ] || find "$directory" -depth -type d -empty -delete
	done
	say "to remove ages and pinned maps too: rm -rf /var/lib/tcpexporter" \
		"/var/lib/private/tcpexporter /sys/fs/bpf/tcpexporter"
}

main "$@"
