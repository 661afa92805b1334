# Everything installs itself into a virtual environment of its own; nothing else is needed but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# What the experiments train on, as pcenet's --data takes it: docs/experiments.md says what is in them.
CIFAR10 ?= cifar10.zip
CAMVID ?= camvid.zip
TINY_IMAGENET ?= tiny-imagenet-32.zip
COMPARE = $(BIN)/pcenet compare --config experiments/$(1).yaml --data $(2) --out experiments/results/$(1)

.PHONY: help demo bench experiments docs test test-faults test-speed test-triton test-arm64 gpu examples audit lint dist clean

help:
	@echo "make demo   who does what in a street scene, whether it matters, and a training (3 minutes)"
	@echo "make bench  time and memory against the dense twin, the whole table, and how it scales (about 25 minutes)"
	@echo "make experiments CIFAR10=... CAMVID=... TINY_IMAGENET=...   show what is left of the runs over three seeds, and go on with it (hours)"
	@echo "make docs   the site, into docs/_build/html, and the code of its pages and docstrings"
	@echo "make test   ruff, mypy, deptry and the default test suite"
	@echo "make examples   run the examples: timm, Lightning, Hugging Face, segmentation-models-pytorch, torchvision"
	@echo "make test-faults   kill, fill, damage, deceive: each fault of docs/reliability.md with its outcome (minutes)"
	@echo "make test-speed   whether a layer has become slow; run it alone (a minute)"
	@echo "make test-triton  the kernels for GPUs, in Triton's interpreter and its compiler, without one (two minutes)"
	@echo "make test-arm64   the kernels for arm64 under emulation, on Debian 12 (six minutes, see .ci/arm64)"
	@echo "make gpu CIFAR10=...   all that is to be known of a GPU, on a machine with one (eight minutes)"
	@echo "make audit  known vulnerabilities of the locked versions (needs the internet)"
	@echo "make dist   sdist and wheel, with compiled kernels where a C++ compiler is, tried in an empty virtual environment"
	@echo "            without one (needs a package index)"
	@echo "make clean  remove the virtual environment, what was built and the demo's runs"

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

bench: $(VENV)/installed
	$(BIN)/pcenet bench --threads 2 --rounds 7 --against benchmarks/einsum_dispatch.py --json 'benchmarks/results/table-{kind}.json'
	$(BIN)/pcenet bench --threads 2 --rounds 7 --suite scaling --json 'benchmarks/results/scaling-{kind}.json' --plot docs/images/scaling.png
	$(BIN)/python benchmarks/report.py

experiments: $(VENV)/installed
	$(call COMPARE,controls-cifar10,$(CIFAR10)) --status
	$(call COMPARE,controls-camvid,$(CAMVID)) --status
	$(call COMPARE,finals-cifar10,$(CIFAR10)) --status
	$(call COMPARE,equal-time-cifar10,$(CIFAR10)) --status
	$(call COMPARE,variants-cifar10,$(CIFAR10)) --status
	$(call COMPARE,finals-camvid,$(CAMVID)) --status
	$(if $(wildcard $(TINY_IMAGENET)),$(call COMPARE,tiny-imagenet,$(TINY_IMAGENET)) --status)
	$(if $(wildcard $(TINY_IMAGENET)),$(call COMPARE,equal-time-tiny-imagenet,$(TINY_IMAGENET)) --status)
	$(call COMPARE,controls-cifar10,$(CIFAR10))
	$(call COMPARE,controls-camvid,$(CAMVID))
	$(call COMPARE,finals-cifar10,$(CIFAR10))
	$(call COMPARE,equal-time-cifar10,$(CIFAR10))
	$(call COMPARE,variants-cifar10,$(CIFAR10))
	$(call COMPARE,finals-camvid,$(CAMVID))
	$(if $(wildcard $(TINY_IMAGENET)),$(call COMPARE,tiny-imagenet,$(TINY_IMAGENET)))
	$(if $(wildcard $(TINY_IMAGENET)),$(call COMPARE,equal-time-tiny-imagenet,$(TINY_IMAGENET)))
	$(BIN)/python experiments/report.py

docs: $(VENV)/installed
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python -m pytest tests/test_docs.py -m 'slow or not slow'

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/deptry pcenet

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-faults: $(VENV)/installed
	$(BIN)/python -m pytest tests/faults -m faults

test-speed: $(VENV)/installed
	$(BIN)/python benchmarks/guard.py

test-arm64:
	.ci/arm64

test-triton: $(VENV)/installed
	TRITON_INTERPRET=1 PCENET_OPS=triton $(BIN)/python -m pytest -n auto --maxprocesses 4 tests/ops/test_operators.py tests/ops/test_triton.py
	$(BIN)/python -m pytest -n auto --maxprocesses 4 tests/ops/test_triton.py -m "slow or not slow"

gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py --out benchmarks/results/gpu --data $(CIFAR10)

examples: $(VENV)/installed
	$(BIN)/python -m pytest tests/test_examples.py -m "slow or not slow"

audit: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --strict --disable-pip --requirement requirements-lock.txt

dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	@# With kernels it is a wheel for Linux: named by the oldest glibc that will do. What they need of torch, torch brings.
	set -- dist/*-linux_*.whl; [ ! -e "$$1" ] || \
	  { PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist "$$1" && rm "$$1"; }
	$(BIN)/twine check --strict dist/*
	$(PYTHON) .ci/try_wheel.py dist/*.whl

clean:
	rm -rf $(VENV) .venv-ci runs/demo docs/_build dist
