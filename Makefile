# SPDX-License-Identifier: GPL-3.0-only
# deploy/setup.sh installs what the targets require.

# Flags for the exporter: make run ARGS="--port 443 --duration 30"
ARGS =

bin = .venv/bin
c_files = $(shell find bpf -name '*.[ch]')

.PHONY: help
# A text after two # is for users, and one after #- for developers.
help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "For developers:"
	@awk -F ':.*#- ' '/^[a-z-]+:.*#- / { printf "%-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
# exec: a signal to make must reach the exporter instead of a shell.
run: setup ## Set up, then run the exporter; ARGS="--port 443" are its flags
	@exec $(bin)/tcpexporter $(ARGS)

# make install DESTDIR=/tmp/root writes below that directory instead of /.
PREFIX = /usr/local
DESTDIR =

.PHONY: install
install uninstall: export PREFIX := $(PREFIX)
install uninstall: export DESTDIR := $(DESTDIR)
install: ## Install the exporter and its systemd unit on this system; PREFIX=/usr/local
	deploy/install.sh install

.PHONY: uninstall
uninstall: ## Remove what make install has installed
	deploy/install.sh uninstall

.PHONY: deb
deb image: export FOR_ARCH := $(ARCH)
deb: setup-deb ## Build a package for this release of Debian or Ubuntu into dist/; ARCH=arm64, FOR_RELEASE=debian13
	deploy/deb.sh

.PHONY: setup-deb
setup-deb:
	@deploy/setup.sh deb

.PHONY: rpm
rpm: setup-test #- Build a package for Fedora into dist/; FOR_PYTHON=3.14 for that Python
	deploy/rpm.sh

.PHONY: image
image: ## Build the container images tcpexporter:bpf and tcpexporter:polling; ARCH=arm64
	@deploy/setup.sh image
	deploy/container/build.sh

.PHONY: setup
setup: ## Install what the exporter requires, and .venv/bin/tcpexporter
	@deploy/setup.sh run

.PHONY: test
# If the system has no Prometheus or node_exporter, setup.sh unpacks them there.
test bench screenshot fleet container-test: export PATH := $(CURDIR)/.cache/prometheus/usr/bin:$(CURDIR)/.cache/prometheus-node-exporter/usr/bin:$(PATH):/usr/sbin:/sbin
test: lint #- Set up, then lint and run all tests; the kernel tests require root
	$(bin)/python -m pytest

.PHONY: lowest
lowest: #- Run the unit tests with the lowest versions that pyproject.toml allows
	@deploy/setup.sh lowest
	.cache/lowest/bin/python -m pytest tests/unit

.PHONY: lint
lint: setup-test #- Check style, types and the imports between packages
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/clang-format --dry-run -Werror $(c_files)
	$(bin)/mypy
	$(bin)/lint-imports

.PHONY: format
format: setup-test #- Format Python and C
	$(bin)/ruff format
	$(bin)/clang-format -i $(c_files)

.PHONY: bench
bench: #- Measure the figures in docs/performance.md; QUICK=1 takes less than two minutes
	@deploy/setup.sh bench
	$(bin)/python -m tests.benchmarks

.PHONY: figures
figures: #- Write the figures of a full bench into docs/performance.md and its picture
	$(bin)/python -m tests.benchmarks.table .cache/bench/figures.json --write docs/performance.md
	$(bin)/python -m tests.benchmarks.picture .cache/bench/figures.json tests/benchmarks/scrape.svg

.PHONY: fleet
fleet: setup-test #- Measure what many exporters cost a Prometheus; write the figures into docs/fleet.md
	$(bin)/python -m tests.benchmarks.fleet

.PHONY: kernels
kernels: #- Write the results of vm-test, also those with ARCH, into docs/kernels.md
	$(bin)/python -m tests.vm.table $(wildcard $(addprefix .cache/vm/,kernels.json amd64.json arm64.json)) --write docs/kernels.md

.PHONY: screenshot
screenshot: #- Write the pictures of the status page and the dashboards in docs/; requires root
	@deploy/setup.sh bench
	$(bin)/python -m tests.browser.screenshot
	$(bin)/python -m tests.e2e.dashboard_pictures

.PHONY: documents
documents: setup-test #- Write the documents that are generated from the code
	$(bin)/python -m deploy.documents
	$(bin)/python -m tests.benchmarks.large_machines --write docs/performance.md

.PHONY: dashboards
dashboards: setup-test #- Write the Grafana dashboards in deploy/grafana
	$(bin)/python -m deploy.dashboards

.PHONY: soak
soak: setup-test #- Open and close connections for ten minutes; check the counts and the memory afterwards
	$(bin)/python -m tests.kernel.churn

.PHONY: fuzz
fuzz: #- Try a million bad inputs for each parser, in an hour; TARGET=procfs for one parser
	@deploy/setup.sh fuzz
	$(bin)/python -m tests.fuzz $(TARGET) --runs $(or $(RUNS),1000000)

.PHONY: hostile
hostile: setup-test #- Attack the exporter with thousands of clients for five minutes; check that scrapes work
	$(bin)/python -m tests.hostile

.PHONY: container-test
container-test: #- Build the images, run them in containers and Pods, and check the manifests
	@deploy/setup.sh container
	deploy/container/build.sh
	$(bin)/python -m pytest tests/container

vm_options = $(if $(KERNEL),--kernel $(KERNEL)) $(if $(ARCH),--arch $(ARCH))

.PHONY: vm-test
# pdeathsig: the guests end when make ends.
vm-test vm-shell: export PATH := $(PATH):/usr/sbin:/sbin
vm-test: vagrant-validate #- Run kernel tests under Debian's kernels in emulation; KERNEL=6.12 ARCH=arm64 for one, ARCH=amd64 for all
	setpriv --pdeathsig TERM $(bin)/python -m tests.vm $(vm_options)

.PHONY: vm-shell
vm-shell: setup-vm #- Open a shell in a guest of vm-test: KERNEL=6.12 ARCH=arm64
	$(bin)/python -m tests.vm --shell $(vm_options)

.PHONY: vagrant-validate
vagrant-validate: export VAGRANT_HOME := $(CURDIR)/.cache/vagrant
vagrant-validate: export VAGRANT_DOTFILE_PATH := $(CURDIR)/.cache/vagrant/machines
vagrant-validate: export VAGRANT_CHECKPOINT_DISABLE := 1
vagrant-validate: export VAGRANT_DEFAULT_PROVIDER := libvirt
vagrant-validate: setup-vm
	cd vagrant && vagrant validate

.PHONY: setup-vm
setup-vm:
	@deploy/setup.sh vm

.PHONY: setup-test
setup-test:
	@deploy/setup.sh test

.PHONY: lock
lock: #- Lock the newest and the lowest versions that pyproject.toml allows, with hashes
	deploy/setup.sh lock

.PHONY: audit
audit: #- Ask the package index for known vulnerabilities of the locked packages
	@deploy/setup.sh release
	@$(bin)/pip-audit --strict --disable-pip $(patsubst %,-r %,$(filter-out %/lowest.txt,$(wildcard deploy/lock/*.txt))) || { \
		echo "audit: the message above names vulnerabilities, or says that the index did not answer" >&2; \
		exit 1; }

.PHONY: sbom
# SOURCE_DATE_EPOCH is the time of the last commit, so the same commit gives the same bytes.
sbom wheel deb rpm install: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
sbom: setup-test #- Write a bill of materials of the running exporter: dist/tcpexporter.cdx.json
	@mkdir -p dist
	$(bin)/python -m deploy.sbom >dist/tcpexporter.cdx.json

.PHONY: wheel
wheel: setup-test #- Build a reproducible wheel into dist/
	deploy/wheel.sh

.PHONY: release
release: setup-test #- Build wheel, source, packages, SBOM and checksums into dist/; TAG=1 also tags
	deploy/release.sh

.PHONY: clean
clean: #- Remove .venv, caches and build output
	rm -rf .venv .cache build dist *.egg-info
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find bpf deploy tcpexporter tests -name __pycache__ -prune -exec rm -rf {} +
