# make demo: fine-tune a real model here, now.   make test: all tests of one machine.   make check: lint and tests.
# make test-cluster: runs over several hosts, as root.   .ci/run: the whole gate.
# make chaos: runs that are killed, damaged files, racing writers, storage that refuses; a quarter of an hour.
# make image: the container image, VARIANT=cuda or cpu; make context: what it is built of, for builders of your own.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c requirements.lock
MODEL := models/SmolLM2-135M-Instruct
DEMO := configs/smollm2-135m-demo.yaml

# files side by side, since most of a test is one process after another; in the order of their names, or those of few
# tests, which are the longest, would all come last
JOBS ?= 2
PYTEST = $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

VARIANT ?= cuda
BASE_IMAGE ?= debian:bookworm-slim
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
IMAGE ?= qlora-job:$(VERSION)$(if $(filter cpu,$(VARIANT)),-cpu)
BUILDER ?= $(shell for one in docker podman buildah; do command -v $$one && break; done)
BUILD_FLAGS ?=
CONTEXT := build/image-$(VARIANT)
# what DeepSpeed asks for where it finds CUDA
CUDA_ONLY := nvidia-ml-py

.PHONY: demo test test-cluster chaos check format install lock context image clean

demo: $(VENV)/.demo $(MODEL)
	$(VENV)/bin/qlora train $(DEMO)
	$(VENV)/bin/qlora compare $(DEMO)

test: $(VENV)/.dev $(MODEL)
	$(PYTEST)

check: $(VENV)/.dev $(MODEL)
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PYTEST)

# each test here has both cores busy: one after the other
test-cluster: $(VENV)/.dev
	QLORA_TEST_CLUSTER=1 $(VENV)/bin/python -m pytest -n0 tests/cluster

# from the root, so that it finds the tests' S3 server, proxy and model
chaos: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.chaos

format: $(VENV)/.dev
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

install: $(VENV)/.demo

# torch first, so that nothing else chooses one; DeepSpeed's source package wants to see it and compiles nothing here
$(VENV)/.base: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja numpy
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) --no-build-isolation -e .[demo]
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --no-build-isolation -e .[demo,dev,gs]
	touch $@

$(MODEL): | $(VENV)/.demo
	$(VENV)/bin/python configs/demo/fetch_model.py $@

# wheels of the locked versions from the index that pip here is set to, fetched anew only when a version changes
$(CONTEXT)/wheels: requirements.lock pyproject.toml | $(VENV)/.base
	$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "The image has Python 3.11: make image VENV=build/venv PYTHON=python3.11")'
	rm -rf $@ $@.part
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip --disable-pip-version-check download --quiet -c requirements.lock \
	    --no-build-isolation --dest $@.part setuptools wheel ninja $(if $(filter cuda,$(VARIANT)),$(CUDA_ONLY)) .[ray,gs]
	mv $@.part $@

context: $(CONTEXT)/wheels
	rm -rf $</qlora_job-*.whl $(CONTEXT)/smoke build/lib build/bdist.*
	$(VENV)/bin/python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir $< .
	cp -R requirements.lock images/Dockerfile images/portable-c++ images/smoke $(CONTEXT)

image: context
	$(if $(BUILDER),,$(error There is no docker, podman or buildah))
	$(BUILDER) build --tag $(IMAGE) --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg VARIANT=$(VARIANT) \
	    --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) \
	    $(BUILD_FLAGS) $(CONTEXT)

# Writes down what is installed now, without the local suffix that names torch's CPU or CUDA build, then what the CUDA
# build brings besides. Where pip prefers the CPU build: PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= make lock
lock: $(VENV)/.dev
	mkdir -p build
	sed -i '/^[^#]/d' requirements.lock
	$(VENV)/bin/python -m pip freeze --all --exclude-editable | sed '/^pip==/d; /^triton==/d; s/+cpu$$//; s/+cu[0-9]*$$//' >> requirements.lock
	$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --dry-run --ignore-installed \
	    --only-binary=:all: --report build/cuda.json -c requirements.lock torch $(CUDA_ONLY)
	$(VENV)/bin/python -c 'import json; found = [one["metadata"] for one in json.load(open("build/cuda.json"))["install"]]; \
	    print(*sorted("{name}=={version}".format(**one) for one in found), sep="\n")' | grep -E '^(nvidia|cuda|triton)' \
	    >> requirements.lock

clean:
	rm -rf $(VENV) models runs build *.egg-info
