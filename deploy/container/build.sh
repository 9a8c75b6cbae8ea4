#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Builds the images localhost/tcpexporter:bpf and localhost/tcpexporter:polling with podman. It
# requires root, podman, mmdebstrap, and .venv (deploy/setup.sh image installs all of these).
#
# If no registry has the base image, mmdebstrap makes it from the host's package mirror.
set -eu

cd "$(dirname "$0")/../.."

base=debian:bookworm-slim
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

main() {
	podman image exists "$base" || podman pull -q "$base" >/dev/null 2>&1 || make_base
	# On the host, because a container may lack the host's certificates and pip settings.
	.venv/bin/python -m pip download -q --disable-pip-version-check --dest "$scratch/wheels" \
		--python-version 3.11 --only-binary=:all: --require-hashes -r deploy/lock/run.txt
	build polling
	build bpf
}

make_base() {
	echo "image: no registry has $base; mmdebstrap makes it" >&2
	mirror=$(apt-get indextargets --format '$(REPO_URI)' \
		'Created-By: Packages' 'Label: Debian' 'Codename: bookworm' | head -n 1)
	mmdebstrap --quiet --mode=root --variant=minbase --aptopt='Acquire::Languages "none"' \
		bookworm "$scratch/base.tar" ${mirror:+"deb [signed-by=$keyring] $mirror bookworm main"}
	podman import -q "$scratch/base.tar" "$base"
}

# Isolation by chroot works where a container cannot be started, as in another container. The
# docker format has the health check, and the OCI format does not.
build() {
	podman build -q --isolation chroot --format docker --layers=true \
		--volume "$scratch/wheels:/wheels:ro" \
		--build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels \
		--build-arg "REVISION=$(git rev-parse HEAD)" --build-arg "VERSION=$(version)" \
		--target "$1" -f deploy/container/Containerfile -t "localhost/tcpexporter:$1" .
}

version() {
	sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml
}

main
