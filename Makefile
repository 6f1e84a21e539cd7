# Everything a developer or CI calls. `make` alone prints the list.
# PYTEST_ARGS is handed to pytest: make test PYTEST_ARGS='-k vduse -x'

.DEFAULT_GOAL := help
.PHONY: help setup servers demo test test-host test-vm test-vm-contract test-vm-system test-vm-bookworm test-vm-boot test-boot test-faults fuzz vm-shell lint unit bench bench-costs bench-attach bench-vm bench-recovery bench-memory bench-metrics dkms deb deb-machines bench-backends clean
# setup comes first in each list of prerequisites: never run them side by side.
.NOTPARALLEL:

VENV := .venv/bin
PYTEST_ARGS ?=
# The Debian of the test machine: bookworm, trixie or sid. What of the tests runs in it. See docs/testing.md.
MACHINE ?= trixie
VM_CONTRACT := tests/contract/test_transport.py tests/contract/test_transport_removal.py \
	tests/contract/test_transport_accidents.py tests/contract/test_transport_trouble.py \
	tests/contract/test_transport_flush.py tests/contract/test_confinement.py
VM_SYSTEM := tests/vm
VM_TESTS ?= $(VM_SYSTEM) $(VM_CONTRACT)
export MACHINE
# The tests start thousands of programs: each would compile storaged anew.
unexport PYTHONDONTWRITEBYTECODE
SUITES ?= bookworm trixie

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the Debian packages and the .venv that are missing
	@scripts/setup

demo: setup ## attach a disk image as a block device, use it, take it away (root)
	@scripts/demo

lint: setup ## ruff and mypy
	$(VENV)/ruff check .
	$(VENV)/mypy

unit: setup ## the tests that need no root, in seconds
	$(VENV)/pytest tests/unit $(PYTEST_ARGS)

# One after the other; SECONDS_EACH for each. What it finds is a file crash-…; with it as an argument it is repeated.
SECONDS_EACH ?= 300
fuzz: setup ## look for input that ends in a bug, guided by coverage (an hour)
	@for target in $$($(VENV)/python -c 'from tests.fuzz.targets import TARGETS; print(*TARGETS)'); do \
		$(VENV)/python -m tests.fuzz $$target -max_total_time=$(SECONDS_EACH) || exit; done

test: test-host test-vm test-vm-bookworm ## lint and all tests, here and in the test machine (root)

servers: setup
	@scripts/setup servers

test-host: servers lint ## lint and the tests that run on this machine (root)
	$(VENV)/pytest $(PYTEST_ARGS)

test-vm: setup ## the tests that need the test machine, in it (root)
	@scripts/vm test $(VM_TESTS) $(PYTEST_ARGS)
	@scripts/power-cut --machine $(MACHINE)
	@scripts/reboot-test --machine $(MACHINE) --short --volumes 4

# The same in two machines, for CI: one waits more than half of the time, so that two side by side take little longer
# than the longer of them. Each leaves its logs in a directory of its own.
test-vm-system: setup
	@scripts/vm --logs last-system test $(VM_SYSTEM) $(PYTEST_ARGS)
	@scripts/power-cut --machine $(MACHINE) --logs last-power

test-vm-contract: setup
	@scripts/vm --logs last-contract test $(VM_CONTRACT) $(PYTEST_ARGS)

test-vm-boot: setup
	@scripts/reboot-test --machine $(MACHINE) --logs last-boot --short --volumes 4

test-boot: setup ## reboot and switch off with mounted volumes and dead servers, Debian 13 and 12 (root)
	@scripts/reboot-test --machine trixie --logs last-boot
	@scripts/reboot-test --machine bookworm --logs last-boot-bookworm

# Each fault with each transport, use and queue depth; CI runs a part of them within test-vm. A machine for each
# transport: what one of them does to its kernel is not the other's. The table is written whatever has failed.
test-faults: setup ## all faults under load, in test machines; writes docs/faults-matrix.md (root, hours)
	@rm -rf .cache/faults && mkdir -p .cache/faults
	@status=0; for transport in vduse nbd; do \
		scripts/vm --deadline 0 test tests/vm/faults -m 'matrix or not matrix' -k $$transport $(PYTEST_ARGS) \
			|| status=$$?; \
		cp .cache/vm/last/faults.log .cache/faults/$$transport.log || exit; \
	done; \
	scripts/power-cut --machine $(MACHINE) --cuts 3 --volumes 8 >.cache/faults/power.log || status=$$?; \
	scripts/faults-table .cache/faults/*.log >docs/faults-matrix.md || exit; \
	cat docs/faults-matrix.md; exit $$status

# Debian 12's kernel has no VDUSE: it comes from kernel-config/dkms there. QEMU is 7.2.
test-vm-bookworm: setup ## VDUSE on Debian 12, in a test machine of its own (root)
	@scripts/vm --machine bookworm --logs last-bookworm test tests/vm/test_dkms.py tests/contract/test_transport.py \
		tests/contract/test_transport_removal.py -k 'vduse or dkms' $(PYTEST_ARGS)

vm-shell: setup ## a shell in the test machine; with CMD='…': that command (root)
	@$(if $(value CMD),scripts/vm run "$$CMD",scripts/vm shell)

# Where real kernels are at hand: this one (mostly without VDUSE and NBD), the test machine's, User Mode Linux.
BENCH := python bench/sidebyside.py measure --runtime 1 --repeat 4
bench: setup ## all ways side by side, in all machines; writes bench/results (root, 20 minutes)
	@mkdir -p .cache/bench
	$(VENV)/$(BENCH) >.cache/bench/native.json
	@scripts/vm --deadline 0 run --steady '$(BENCH)' >.cache/bench/emulated.json
	@scripts/uml --deadline 0 '$(BENCH)' >.cache/bench/uml.json
	@for name in native emulated uml; do \
		$(VENV)/python bench/sidebyside.py publish $$name .cache/bench/$$name.json || exit; done
	@$(VENV)/python bench/sidebyside.py table

# One processor, so that time is instructions. The machine "profile" is trixie with perf.
bench-costs: setup ## what a request costs by each way, and where: profile, system calls (root, 15 minutes)
	@mkdir -p .cache/bench
	@scripts/vm --machine profile --deadline 0 run --steady --processors 1 'python bench/costs.py --json /run/json >&2 && \
		cat /run/json' >.cache/bench/costs.json

bench-attach: setup ## how long attach and detach take (root)
	$(VENV)/python bench/attach.py

bench-vm: setup ## VDUSE and NBD against the same by hand, in the test machine (root, 15 minutes)
	@mkdir -p .cache/bench
	@scripts/vm run 'python bench/attach_vm.py --json /run/json >&2 && cat /run/json' >.cache/bench/attach.json
	@scripts/vm run --steady 'python bench/transports.py --json /run/json >&2 && cat /run/json' \
		>.cache/bench/transports.json

bench-recovery: setup ## how long I/O waits when QSD dies or is rescued, in the test machine and here (root)
	@mkdir -p .cache/bench
	@scripts/vm run 'python bench/recovery.py --json /run/json pause:vduse pause:nbd \
		rescue:vduse rescue:nbd all:vduse all:nbd >&2 && cat /run/json' >.cache/bench/recovery.json
	$(VENV)/python bench/recovery.py calls:fuse all:fuse

bench-memory: setup ## what memory the daemon needs with 500 volumes (root, 8 GiB)
	$(VENV)/python bench/memory.py

bench-metrics: setup ## how long a scrape of 500 volumes takes, and what it holds up (root)
	$(VENV)/python bench/metrics.py --real 100

# The machine "bench" is trixie with the servers, and with a fio that has their engines, as it is built here.
bench-backends: servers ## devices against each backend's own library, here and in a test machine (root, 40 minutes)
	@bench/fio-engines .cache/bench/fio
	$(VENV)/python bench/backends.py --fio .cache/bench/fio/fio --json .cache/bench/backends-fuse.json
	@scripts/vm --machine bench run --steady 'python bench/backends.py --fio /opt/fio/fio --transport vduse,nbd \
		--rounds 3 --seconds 1 --mib 64 --json /run/json >&2 && cat /run/json' >.cache/bench/backends-vm.json

dkms: ## make the Debian package that gives Debian 12's kernel VDUSE (kernel-config/dkms)
	@scripts/dkms-deb

deb: setup ## make the Debian packages for SUITES="bookworm trixie", and try them in a fresh root (root)
	@scripts/deb $(SUITES)
	@for suite in $(SUITES); do scripts/try-deb $$suite >.cache/deb/$$suite/try.log || \
		{ cat .cache/deb/$$suite/try.log; exit 1; }; done

deb-machines: deb ## first volume on a fresh machine by two commands, upgrade under I/O (root, 25 minutes)
	@scripts/try-deb-upgrade
	@for suite in $(SUITES); do scripts/first-volume $$suite || exit; done

clean: ## remove everything that was made here: .venv, caches, Debian roots
	rm -rf --one-file-system .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
