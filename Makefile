# make demo: fine-tune a real model here, now.   make test: all tests of one machine.   make check: lint and tests.
# make test-cluster: runs over several hosts, as root.   .ci/run: the whole gate.
# make chaos: runs that are killed, damaged files, racing writers, storage that refuses; a quarter of an hour.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c requirements.lock
MODEL := models/SmolLM2-135M-Instruct
DEMO := configs/smollm2-135m-demo.yaml

.PHONY: demo test test-cluster chaos check format install lock clean

demo: $(VENV)/.demo $(MODEL)
	$(VENV)/bin/qlora train $(DEMO)
	$(VENV)/bin/qlora compare $(DEMO)

test: $(VENV)/.dev $(MODEL)
	$(VENV)/bin/python -m pytest

check: $(VENV)/.dev $(MODEL)
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python -m pytest

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
	$(PIP) --no-build-isolation -e .[demo,dev]
	touch $@

$(MODEL): | $(VENV)/.demo
	$(VENV)/bin/python configs/demo/fetch_model.py $@

# writes down what is installed now, without the local suffix that names torch's CPU or CUDA build
lock: $(VENV)/.dev
	sed -i '/^[^#]/d' requirements.lock
	$(VENV)/bin/python -m pip freeze --all --exclude-editable | sed '/^pip==/d; s/+cpu$$//; s/+cu[0-9]*$$//' >> requirements.lock

clean:
	rm -rf $(VENV) models runs build *.egg-info
