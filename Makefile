# `make install` needs Python 3.11 or newer; PYTHON names another one.
# On a machine with CUDA: make install EXTRAS=cuda,test
PYTHON ?= python3
EXTRAS ?= cpu,test
BENCH ?= serving
VENV := .venv
BIN := $(VENV)/bin
comma := ,
# Missing, or older than pyproject.toml: install again.
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: install test lint demo bench

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	$(BIN)/python -P -m sentencekv_vllm.install_cpu
	touch $@

# `pytest` and `python -P` keep the folder triton_kernels from taking the name of Triton's package.
test: install
	$(BIN)/pytest $(PYTEST_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: install
	$(BIN)/python -P -m sentencekv_vllm.demo

# make bench BENCH=kernels, or another file of benchmarks/
bench: install
	$(BIN)/python benchmarks/$(BENCH).py $(BENCH_FLAGS)
