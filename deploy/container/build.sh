#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds the images localhost/tcpexporter:bpf and localhost/tcpexporter:polling with podman. It
# requires root, podman, mmdebstrap, and .venv (deploy/setup.sh image installs all of these).
#
# FOR_ARCH, amd64 or arm64, is the architecture of the images, by default this machine's. Its
# name ends the tags: tcpexporter:bpf-arm64. This machine must run the programs of the
# architecture, by emulation (binfmt_misc).
#
# If no registry has the base image, mmdebstrap makes it from the host's package mirror.
set -eu

cd "$(dirname "$0")/../.."

arch=${FOR_ARCH-}
# A tag of podman has one architecture, so each has a base of its own.
case $arch in
amd64) base=docker.io/amd64/debian:bookworm-slim ;;
arm64) base=docker.io/arm64v8/debian:bookworm-slim ;;
*) base=debian:bookworm-slim ;;
esac
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

main() {
	# On the host, because a container may lack the host's certificates and pip settings.
	FOR_PYTHON=3.11 deploy/setup.sh wheels
	[ -z "$arch" ] || require_programs_of "$arch"
	podman image exists "$base" || pull_base || make_base
	build polling
	build bpf
}

# Fails unless this machine can run the programs of an architecture.
require_programs_of() {
	deploy/setup.sh require arch-test
	arch-test "$1" >/dev/null || deploy/setup.sh require qemu-aarch64-static
	arch-test "$1" >/dev/null || {
		echo "image: this machine cannot run programs of $1: mount binfmt_misc at" \
			"/proc/sys/fs/binfmt_misc, then run update-binfmts --enable" >&2
		exit 1
	}
}

pull_base() {
	podman pull -q ${arch:+"--arch=$arch"} "$base" >/dev/null 2>&1
}

make_base() {
	echo "image: no registry has $base; mmdebstrap makes it" >&2
	mirror=$(apt-get indextargets --format '$(REPO_URI)' \
		'Created-By: Packages' 'Label: Debian' 'Codename: bookworm' | head -n 1)
	mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Acquire::Languages "none"' \
		${arch:+"--architectures=$arch"} bookworm "$scratch/base.tar" \
		${mirror:+"deb [signed-by=$keyring] $mirror bookworm main"}
	podman import -q ${arch:+"--arch=$arch"} "$scratch/base.tar" "$base"
}

# Isolation by chroot works where a container cannot be started, as in another container. The
# docker format has the health check, and the OCI format does not.
build() {
	podman build -q --isolation chroot --format docker --layers=true \
		${arch:+"--arch=$arch"} --build-arg "BASE=$base" \
		--volume "$PWD/.cache/wheels:/wheels:ro" \
		--build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels \
		--build-arg "REVISION=$(git rev-parse HEAD)" --build-arg "VERSION=$(version)" \
		--target "$1" -t "localhost/tcpexporter:$1${arch:+-$arch}" \
		-f deploy/container/Containerfile .
}

version() {
	sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml
}

main
