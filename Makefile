# Targets of a checkout. `make demo` and `make test` do all set-up themselves; they need python3 (3.11), make, a package index, and on Debian apt.
# The closed side of the demo runs as uid 1000: under root, a python3 that lies in a private home (0700) is passed over if there is another.
REACHABLE = import ensurepip, os, pathlib, sys; p = pathlib.Path(sys.base_prefix).resolve(); sys.exit(sys.version_info < (3, 11) or not all(d.stat().st_mode & 1 for d in (p, *p.parents)))
PYTHON ?= $(shell for p in python3 /usr/bin/python3 /usr/local/bin/python3; do $$p -c '$(REACHABLE)' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
ENGINE := build/engines/vllm
# Where a plain package index cannot resolve the `+cpu` builds of torch.
PYTORCH_INDEX ?= https://download.pytorch.org/whl/cpu
SYSTEM := docker-registry skopeo iproute2 gcc
SOURCES := artifact registry mirror runtime migrations tests demo tools benchmarks

export PYTORCH_INDEX

.PHONY: setup system engine demo test test-fast test-full lint fix bench

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/dev.lock pyproject.toml
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# System programs of the tests and the demo. Present ones are left alone; without root, sudo is used and said.
system:
	@missing=; for p in docker-registry skopeo ip gcc; do command -v $$p >/dev/null || missing="$$missing $$p"; done; \
	test -n "$$missing" || exit 0; as=; \
	if ! command -v apt-get >/dev/null; then echo "system: missing:$$missing (proven on Debian 12; install them by hand)"; exit 1; fi; \
	if [ "$$(id -u)" != 0 ]; then as=sudo; echo "system: installing with sudo:$$missing"; fi; \
	$$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM) >/dev/null

engine: setup
	$(BIN)/python tools/engine_env.py --to $(ENGINE)

demo: system setup engine
	$(BIN)/python -m demo

test: system setup engine
	$(BIN)/python -m pytest -m 'not full'

test-fast: setup
	$(BIN)/python -m pytest -n 2 -m 'not server and not engine and not full'

test-full: system setup engine
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/sizes.py $(SOURCES)

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	@set -e; ls benchmarks/*.py >/dev/null 2>&1 || { echo "bench: no benchmark yet"; exit 0; }; \
	for f in benchmarks/[a-z]*.py; do echo "== $$f"; $(BIN)/python "$$f"; done
