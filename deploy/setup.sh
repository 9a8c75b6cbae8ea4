#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Prepares this machine and this tree; the Makefile calls it with one of:
#
#   run          install BCC and other requirements, and the exporter in .venv
#   guest        the same as "run", and the requirements of the kernel tests
#   test         the same as "guest", and the requirements of lint and the other tests
#   lowest       install the lowest versions that pyproject.toml allows, into .cache/lowest
#   fuzz         the same as "test", and the fuzzer
#   bench        the same as "test", and the programs that the benchmarks compare
#   deb          the same as "run", and the programs that build a Debian package
#   image        the same as "run", and the programs that build container images
#   container    the same as "test" and "image", and the programs that check manifests
#   vm           the same as "test", and the programs that boot other kernels
#   release      install the Python packages of "test", and the tools for lock files and audits
#   lock         the same as "release"; then write deploy/lock
#   wheels       the same as "run" if there is no .venv; then download the packages of "run"
#                into .cache/wheels, for FOR_PYTHON or this system's Python, and for FOR_ARCH
#                or this system's architecture
#   require X... install the packages of these commands or services: make prometheus.service
#
# It does not install a package again. If every package is installed, it requires neither root
# nor a network.
#
# Every file from the package index has a hash in deploy/lock.
set -eu

cd "$(dirname "$0")/.."

# Not the first python3 on PATH: only the distribution's Python can import its BCC package.
python=/usr/bin/python3
# Packages whose installation would start a service are only unpacked, in this directory.
unpacked=.cache
# Where Python packages are installed.
venv=.venv
# The command ip is in sbin, which is not on every user's PATH.
PATH=$PATH:/usr/sbin:/sbin
PATH=$PATH:$PWD/$unpacked/prometheus/usr/bin:$PWD/$unpacked/prometheus-node-exporter/usr/bin

main() {
	case ${1-} in
	run)
		require_python
		require bcc venv seccomp
		fill_venv run
		;;
	guest)
		require_python
		require bcc venv seccomp ip ss
		fill_venv guest
		;;
	test)
		require_for_tests
		fill_venv test
		fetch_wheels ""
		fetch_wheels "$(cat deploy/rpm/python-version)" # make rpm
		;;
	lowest)
		require_python
		require bcc venv seccomp
		venv=.cache/lowest
		fill_venv lowest
		;;
	fuzz)
		require_for_tests
		fill_venv fuzz
		;;
	bench)
		require_for_tests
		fill_venv bench
		;;
	deb)
		require_python
		require bcc venv seccomp dpkg-shlibdeps git
		fill_venv run
		;;
	image)
		require_python
		require bcc venv seccomp podman runc mmdebstrap
		fill_venv run
		;;
	container)
		require_for_tests
		require mmdebstrap catatonit # the first process of each Pod of podman
		fill_venv container
		"$venv/bin/python" -m tests.container.kubectl
		;;
	vm)
		require_for_tests
		require qemu-system-x86_64 qemu-system-aarch64 mmdebstrap mke2fs modprobe cpio xz
		require vagrant
		fill_venv test
		;;
	release)
		require_python
		require venv
		fill_venv release
		;;
	lock)
		require_python
		require venv
		fill_venv release
		write_locks
		;;
	wheels)
		require_python
		require bcc venv seccomp
		# Do not replace an old .venv: the tests that build packages run in it.
		[ -e "$venv/installed" ] || fill_venv run
		fetch_wheels "${FOR_PYTHON-}" "${FOR_ARCH-}"
		;;
	require)
		shift
		require "$@"
		;;
	*) fail "usage: $0 run|guest|test|lowest|fuzz|bench|deb|image|container|vm|release|lock|wheels|require X..." ;;
	esac
}

say() {
	echo "setup: $*" >&2
}

fail() {
	say "$*"
	exit 1
}

is_root() {
	[ "$(id -u)" -eq 0 ]
}

# --- Packages of the distribution ---

require_for_tests() {
	require_python
	# Without containers, the services and the timer of podman end at once. It requires crun or
	# runc; the tests use runc.
	require bcc venv seccomp seccomp-module ip ss iptables gcc libc git busybox podman runc
	require chromium zsh fish
	# Only make deb, make rpm and their tests require these.
	[ "$(system_family)" != debian ] || require dpkg-shlibdeps lintian rpmbuild rpmlint
	require_unpacked prometheus prometheus promtool
	require_unpacked prometheus-node-exporter prometheus-node-exporter
}

require_python() {
	[ -x "$python" ] || fail "$python is missing: install the distribution's Python"
	"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		fail "$("$python" --version) is too old: install Python 3.11 or later"
}

# Installs those of the given requirements that are missing.
require() {
	needs=$(lacking "$@")
	[ -n "$needs" ] || return 0
	system=$(system_family)
	# shellcheck disable=SC2086  # one word for each need
	packages=$(packages_for $needs | sort -u)
	[ "$system" != other ] ||
		fail "unknown system, install these packages by hand: $(one_line "$packages")"
	is_root || fail "install these packages, or use sudo: $(one_line "$packages")"
	# shellcheck disable=SC2086  # one word for each package
	"install_on_$system" $packages
	needs=$(lacking "$@")
	[ -z "$needs" ] || fail "installed, but still not found: $(one_line "$needs")"
}

lacking() {
	for need in "$@"; do
		is_there "$need" || echo "$need"
	done
}

one_line() {
	echo "$1" | paste -s -d , | sed 's/,/, /g'
}

is_there() {
	case $1 in
	bcc) has_module bcc ;;
	venv) has_module ensurepip ;; # Debian has venv itself in another package
	seccomp-module) has_module seccomp ;; # only tests require it: .venv has pyseccomp
	seccomp) ldconfig -p | grep -q 'libseccomp\.so\.2' ;;
	libc) [ -e /usr/include/stdlib.h ] ;;
	*.service) [ -e "/lib/systemd/system/$1" ] ;;
	# The command has this name in Debian, and the other name elsewhere.
	prometheus-node-exporter) has_command "$1" || has_command node_exporter ;;
	# Only a statically linked busybox works in an initramfs or a container without libraries.
	busybox) has_command "$1" && ! ldd "$(command -v "$1")" >/dev/null 2>&1 ;;
	*) has_command "$1" ;;
	esac
}

has_command() {
	command -v "$1" >/dev/null
}

# Finds the module without importing it: importing BCC loads LLVM, which is slow.
has_module() {
	"$python" -I -c '
import sys
from importlib.util import find_spec
sys.exit(find_spec(sys.argv[1]) is None)' "$1"
}

# Prints debian or fedora, also for their derivatives, or other.
system_family() (
	ID=other
	# shellcheck source=/dev/null
	[ ! -r /etc/os-release ] || . /etc/os-release
	case " $ID ${ID_LIKE-} " in
	*" debian "* | *" ubuntu "*) echo debian ;;
	*" fedora "* | *" rhel "*) echo fedora ;;
	*) echo other ;;
	esac
)

packages_for() {
	for need in "$@"; do
		case $system:$need in
		debian:bcc) echo python3-bpfcc ;;
		debian:venv) echo python3-venv ;;
		debian:ip | debian:ss) echo iproute2 ;;
		debian:seccomp) echo libseccomp2 ;;
		debian:seccomp-module) echo python3-seccomp ;;
		debian:libc) echo libc6-dev ;;
		debian:dpkg-shlibdeps) echo dpkg-dev ;;
		debian:aarch64-linux-gnu-objdump) echo binutils-aarch64-linux-gnu ;;
		debian:x86_64-linux-gnu-objdump) echo binutils-x86-64-linux-gnu ;;
		debian:rpmbuild) echo rpm ;;
		debian:qemu-aarch64-static) echo qemu-user-static binfmt-support ;;
		debian:qemu-system-x86_64) echo qemu-system-x86 ;;
		debian:qemu-system-aarch64) echo qemu-system-arm ;;
		debian:busybox) echo busybox-static ;;
		debian:mke2fs) echo e2fsprogs ;;
		debian:modprobe) echo kmod ;;
		debian:xz) echo xz-utils ;;
		*:vagrant) echo vagrant vagrant-libvirt ;; # the default provider's plugin
		debian:*.service) echo "${need%.service}" ;;
		fedora:bcc) echo python3-bcc ;;
		fedora:venv) echo python3-libs ;;
		fedora:ip | fedora:ss) echo iproute ;;
		fedora:seccomp) echo libseccomp ;;
		fedora:seccomp-module) echo python3-libseccomp ;;
		fedora:libc) echo glibc-devel ;;
		fedora:mke2fs) echo e2fsprogs ;;
		fedora:modprobe) echo kmod ;;
		# dnf finds a file's package, whatever its name.
		fedora:prometheus | fedora:promtool) echo "/usr/bin/$need" ;;
		fedora:*.service) echo "/usr/bin/${need%.service}" ;;
		fedora:prometheus-node-exporter) echo /usr/bin/node_exporter ;;
		other:bcc) echo "BCC for $python" ;;
		other:venv) echo "ensurepip for $python" ;;
		other:seccomp) echo libseccomp ;;
		other:seccomp-module) echo "libseccomp's module for $python" ;;
		other:libc) echo "the C library's headers" ;;
		*) echo "$need" ;;
		esac
	done
}

install_on_debian() {
	refresh_lists
	apt_get install --no-install-recommends "$@"
}

install_on_fedora() {
	dnf install -y --setopt=install_weak_deps=False "$@"
}

apt_get() {
	# A machine that has just booted may still run an upgrade: wait for the lock of apt.
	DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"
}

lists_are_fresh=no

# A new machine has no package lists, or old lists with packages that no longer exist. If some
# lists cannot be fetched, the packages may be in the other lists.
refresh_lists() {
	[ "$lists_are_fresh" = no ] || return 0
	apt_get update || say "some package lists cannot be fetched; continuing with the others"
	lists_are_fresh=yes
}

# Unpacks the commands of a package without installing it, which would start a service.
require_unpacked() {
	package=$1
	shift
	[ -n "$(lacking "$@")" ] || return 0
	case $(system_family) in
	debian) unpack_commands "$package" "$@" ;;
	*) require "$@" ;;
	esac
}

unpack_commands() {
	directory=$unpacked/$1
	say "fetching the package $1 into $directory"
	! is_root || refresh_lists
	rm -rf "$directory" "$directory.new"
	mkdir -p "$directory.new"
	(cd "$directory.new" && fetch_commands "$@") ||
		fail "cannot fetch the package $1: install its commands by hand"
	mv "$directory.new" "$directory"
}

fetch_commands() {
	unpack "$1" || return
	shift
	for command in "$@"; do
		# Since Debian 13 promtool is in its own package.
		[ -e "usr/bin/$command" ] || unpack "$command" || return
		"usr/bin/$command" --version >/dev/null || return
	done
}

unpack() {
	# Download as root: the user _apt may not write to this directory.
	apt_get -o APT::Sandbox::User=root download "$1" &&
		dpkg -x "$1"_*.deb . &&
		rm "$1"_*.deb
}

# --- Python packages, in .venv or .cache/lowest ---

# Prints the names of the files in deploy/lock that a purpose requires.
locks_of() {
	case $1 in
	lowest) echo lowest ;;
	# shellcheck disable=SC2046  # one word for each extra
	*) echo run $(extras_of "$1") ;;
	esac
}

# Prints the extras of pyproject.toml that a purpose requires. For each extra, deploy/lock has
# a file of the same name with its packages.
extras_of() {
	case $1 in
	run) ;;
	guest) echo test ;;
	test) echo test lint package browser dashboards ;;
	fuzz) echo test lint package browser dashboards fuzz ;;
	bench) echo test lint package browser dashboards bench ;;
	container) echo test lint package browser dashboards container ;;
	release) echo test lint package browser dashboards release ;;
	esac
}

# Prints the purposes whose packages are all installed after an installation for this purpose.
held_by() {
	case $1 in
	run | lowest) echo "$1" ;;
	guest) echo run guest ;;
	*) echo run guest test "$1" ;;
	esac
}

# Installs the packages that a purpose requires, unless the stamp file says that this is done.
fill_venv() {
	stamp=$venv/installed
	state=$(state)
	! grep -qsx "$state $1" "$stamp" || return 0
	say "installing Python packages into $venv"
	if ! grep -qs "^$state " "$stamp"; then
		"$python" -m venv --clear --system-site-packages "$venv"
	fi
	# No package is built here: pip would download build tools without a hash.
	# shellcheck disable=SC2046  # two words for each file
	pip_install --require-hashes --only-binary=:all: \
		$(printf -- '-r deploy/lock/%s.txt ' $(locks_of "$1"))
	# Only the exporter is built here, with the setuptools that was just installed.
	pip_install --no-index --no-deps --no-build-isolation -e .
	# shellcheck disable=SC2046  # one line for each purpose
	printf "$state %s\n" $(held_by "$1") >>"$stamp"
	sort -u -o "$stamp" "$stamp"
}

# Prints a checksum of all inputs of .venv. The path is an input, because .venv does not work
# after it is moved. File times are not used, because git checkout changes them.
state() {
	{
		cat pyproject.toml deploy/lock/*.txt deploy/setup.sh
		"$python" --version
		pwd
	} | sha256sum | cut -d ' ' -f 1
}

# Downloads the packages that make install, make deb and make rpm unpack, unless they are there:
# for a version of Python ($1) and an architecture ($2), or for those of this system if these are
# empty. The directory has the files for all of these: pip chooses the right ones by their names.
fetch_wheels() {
	state=$(state)
	platforms=$(deploy/platforms.sh "${2-}")
	# shellcheck disable=SC2086  # on one line
	made=$(echo $state $1 $platforms)
	! grep -qsxF "$made" .cache/wheels/state || return 0
	say "downloading Python packages into .cache/wheels${1:+ for Python $1}${2:+ on $2}"
	grep -qs "^$state" .cache/wheels/state || rm -rf .cache/wheels
	# shellcheck disable=SC2086  # one word for each platform
	"$venv/bin/python" -m pip download -q --disable-pip-version-check --require-hashes \
		--only-binary=:all: ${1:+--python-version "$1"} $platforms -r deploy/lock/run.txt \
		-d .cache/wheels
	echo "$made" >>.cache/wheels/state
}

pip_install() {
	"$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"
}

# Locks the newest versions that pyproject.toml allows. They are the same for every purpose,
# Python and machine, and are chosen for the oldest Python: they work with newer ones too.
write_locks() {
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	"$python" -c '
import tomllib
with open("pyproject.toml", "rb") as project:
    print(*tomllib.load(project)["build-system"]["requires"], sep="\n")' >"$scratch/build.in"
	resolve --all-extras >"$scratch/everything" # all lock files use these versions
	write_lock run --constraints "$scratch/everything"
	for extra in test lint package browser dashboards container fuzz bench release; do
		# shellcheck disable=SC2046  # two words for each package
		write_lock $extra --constraints "$scratch/everything" --extra $extra \
			$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' "$scratch/run.txt")
	done
	write_lock lowest --resolution lowest-direct --extra test
	mv "$scratch"/*.txt deploy/lock
}

write_lock() {
	{
		echo "# The packages that setup.sh installs for \"$1\", as tested."
		echo "# Written by \`make lock\`; the ranges are in pyproject.toml."
		shift
		resolve "$@"
	} >"$scratch/$1.txt"
}

# pip is not locked: .venv uses the pip of its Python.
resolve() {
	.venv/bin/uv pip compile -q --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --no-emit-package pip --no-header --no-annotate "$@" \
		pyproject.toml "$scratch/build.in"
}

main "$@"
