# Everything a developer or CI calls. `make` alone prints the list.
# PYTEST_ARGS is handed to pytest: make test PYTEST_ARGS='-k vduse -x'

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint unit bench-attach clean
# setup comes first in each list of prerequisites: never run them side by side.
.NOTPARALLEL:

VENV := .venv/bin
PYTEST_ARGS ?=

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

test: lint ## lint and all tests (root)
	$(VENV)/pytest $(PYTEST_ARGS)

bench-attach: setup ## how long attach and detach take (root)
	$(VENV)/python bench/attach.py

clean: ## remove everything that was made here: .venv, caches, Debian roots
	rm -rf --one-file-system .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
