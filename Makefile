# Each target makes its own virtual environment; nothing but Python 3.11 or newer is needed.
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
AOT := .venv-aot
# A kernel that waits for ever cannot be interrupted by a signal: its process ends, and the test has failed.
TEST_KERNELS = JAX_PLATFORMS=cpu $(AOT)/bin/pytest -q -n 2 --dist worksteal --timeout 900 --timeout-method thread \
  --durations 25 $(shell grep -rlE "mark\.(aot|interpreter)" tests --include="*.py") -m

TESTS = not oracle and not aot and not interpreter$(if $(CI),, and not slow)

.PHONY: demo test notebooks kernels oracle bench clean

demo: $(VENV)/.demo
	$(BIN)/dsv4 generate --prompt "And it came to pass in those days" --max-new-tokens 160 --drafts 1 \
	  --temperature 0.6 --top-p 0.9 --seed 3

# With CI=true, as on CI: also the slow tests, and the kernels but for whole models.
test: $(VENV)/.test $(if $(CI),$(AOT)/.aot)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist worksteal --durations 25 -m "$(TESTS)"
	$(if $(CI),$(TEST_KERNELS) "(aot or interpreter) and not slow")

# Run the notebooks anew, and keep what they put out.
notebooks: $(VENV)/.test
	$(BIN)/jupyter-execute --inplace notebooks/*.ipynb

# The kernels: in the interpreters, and compiled for TPUs and GPUs that are not there. DSV4_FULL_TESTS=1 has more shapes.
kernels: $(AOT)/.aot
	$(TEST_KERNELS) "aot or interpreter"

oracle: $(VENV)/.test $(VENV)/.oracle
	$(BIN)/pytest -q -m oracle tests/oracle

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks cpu

$(VENV)/.python:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(IS_NEW_ENOUGH)' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
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
