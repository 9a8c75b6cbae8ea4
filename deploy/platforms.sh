#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Prints pip's options for Python packages that run on an architecture of Debian, amd64 or
# arm64, with the C library of Debian 12 or later. Without an argument it prints nothing: pip
# chooses packages for this machine.
set -eu

case ${1-} in
"") exit ;;
amd64) machine=x86_64 ;;
arm64) machine=aarch64 ;;
*)
	echo "platforms: unknown architecture $1: choose amd64 or arm64" >&2
	exit 1
	;;
esac

# pip prefers the first platforms.
for minor in $(seq 36 -1 17); do
	echo "--platform=manylinux_2_${minor}_$machine"
done
echo "--platform=manylinux2014_$machine"
