#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-only
#
# Installs the exporter as a service, and a Prometheus that scrapes it, on this machine. It
# requires root, and the tree in /tcpexporter. Vagrant runs this script; `make vm-test` runs it
# in its guests.
#
# It does not install a package again, so a second run requires no network. If systemd does not
# run, as while an image is built, the script installs the services but does not start them.
set -eu

cd /tcpexporter

exporter=http://localhost:9690
prometheus=http://localhost:9090
command=/usr/local/bin/tcpexporter

main() {
	[ "$(id -u)" -eq 0 ] || fail "this script requires root"
	deploy/setup.sh run
	# `make test` requires make, which the boxes do not have.
	deploy/setup.sh require make prometheus.service
	install_exporter
	install_prometheus
	systemctl --quiet enable tcpexporter prometheus
	if [ -d /run/systemd/system ]; then
		start
	else
		say "installed; the services start when the machine boots"
	fi
}

say() {
	echo "provision: $*" >&2
}

fail() {
	say "$*"
	exit 1
}

install_exporter() {
	# A script instead of a link: SELinux in Fedora allows systemd to execute files in
	# /usr/local/bin, but not files in directories without a label.
	printf '#!/bin/sh\nexec /tcpexporter/.venv/bin/tcpexporter "$@"\n' >$command
	chmod 755 $command
	put deploy/systemd/tcpexporter.service /etc/systemd/system
}

install_prometheus() {
	put vagrant/prometheus.yml /etc/prometheus
	put deploy/prometheus/tcpexporter.rules.yml /etc/prometheus
}

# Copies a file into a directory, and makes the copy readable by every user.
put() {
	install -C -m 644 "$1" "$2"
}

# Restarts a running service: the tree may have changed.
start() {
	systemctl daemon-reload
	systemctl restart tcpexporter
	wait_until "the exporter is ready" is_ready
	systemctl restart prometheus
	wait_until "Prometheus scrapes the exporter" is_scraped
	say "the exporter serves $exporter/metrics, Prometheus $prometheus"
}

is_ready() {
	fetch $exporter/-/ready
}

# Asks for the health of targets: `up{job="tcpexporter"}` may be from before the restart.
is_scraped() {
	fetch $prometheus/api/v1/targets | grep -q '"health":"up"'
}

# Prints the content of a URL. It uses Python: not every system has curl or wget.
fetch() {
	/usr/bin/python3 -I -c '
import sys
from urllib.request import urlopen
try:
    print(urlopen(sys.argv[1], timeout=5).read().decode())
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error}")' "$1"
}

# Tries a command ($2) until it succeeds, for a limited time.
wait_until() {
	left=60
	until $2 >/dev/null 2>&1; do
		left=$((left - 1))
		[ $left -gt 0 ] || give_up "$@"
		sleep 1
	done
}

give_up() {
	systemctl status --no-pager --full --lines=20 tcpexporter prometheus >&2 || :
	$2 >&2 || :
	fail "timeout while waiting until $1: the output of the services is above"
}

main "$@"
