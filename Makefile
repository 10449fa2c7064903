# Each target makes its own virtual environment; nothing but Python 3.11 or newer is needed.
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
AOT := .venv-aot
AOT_TESTS = $(shell grep -rl "mark.aot" tests --include="*.py")

.PHONY: demo test kernels oracle bench clean

demo: $(VENV)/.demo
	$(BIN)/dsv4 generate --prompt "And it came to pass in those days" --max-new-tokens 96 --drafts 1

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist worksteal -m "not oracle and not aot and not interpreter"

# The kernels one by one: in the interpreters, then compiled for TPUs and GPUs that are not there.
kernels: $(VENV)/.test $(AOT)/.aot
	$(BIN)/pytest -q -m "interpreter and not aot" tests/pallas_kernels tests/dsv4_jax/test_kernels_gpu.py
	JAX_PLATFORMS=cpu $(AOT)/bin/pytest -q -n 2 --dist worksteal -m aot $(AOT_TESTS)

oracle: $(VENV)/.test $(VENV)/.oracle
	$(BIN)/pytest -q -m oracle tests/oracle

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks cpu

$(VENV)/.python:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(IS_NEW_ENOUGH)' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test $(VENV)/.oracle: $(VENV)/.%: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@

# The compilers for TPU and GPU would be taken for devices by everything else, so they live apart.
$(AOT)/.aot: $(VENV)/.python pyproject.toml
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/python -m pip install --quiet --upgrade pip
	$(AOT)/bin/python -m pip install --quiet -e ".[aot]"
	touch $@

clean:
	rm -rf $(VENV) $(AOT)
