# Every target works on its own in a fresh clone: it makes $(VENV), installs what it needs at the versions that
# constraints/ pins for that Python, and does its job. A second run installs nothing unless pyproject.toml or
# constraints/ have changed.
#
#   make test PYTHON=python3.13 VENV=.venv-py313      another Python, beside the first

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
RUN := $(BIN)/python
PINS := pyproject.toml $(wildcard constraints/py*.txt)

PYTEST_ARGS ?=
# `worksteal` hands each process a run of neighbouring tests, which share compiled programs, and evens out the end.
PYTEST := $(RUN) -m pytest -n 2 --dist worksteal -q --durations=15 $(PYTEST_ARGS)

DEMO_OUT ?= runs/demo
BENCH ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
unexport PYTHONHOME PIP_REQUIRE_VIRTUALENV

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow docs bench lint format types venv constraints clean clean-venv check-python
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## a posterior of an inpainted digit by twisted SMC, with a report, in runs/demo
	$(BIN)/smcdiff posterior --model mnist --problem inpaint --image 7 --method tds \
	    --particles 64 --chains 4 --steps 100 --seed 0 --out $(DEMO_OUT) --force
	@ls -1 $(DEMO_OUT)/report.* | sed 's/^/report: /'

# What a test compiles it runs for milliseconds, so the compiler may leave out its optimisations, which take longer: all
# of them in the tests of minutes, and those that cost more than they save in the slow tests, which run for seconds. It
# may also emit loops directly where jaxlib still can. A flag that jaxlib does not know ends the process, hence the
# trial. `make test XLA_FLAGS=` compiles as users do.
CHEAP := --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1
DIRECT := --xla_cpu_use_fusion_emitters=false

# $(call pytest,<level of optimisation>,<which tests>)
define pytest
	@if [ -z "$${XLA_FLAGS+set}" ]; then \
	    export XLA_FLAGS="--xla_backend_optimization_level=$(1) $(CHEAP)"; \
	    if JAX_PLATFORMS=cpu XLA_FLAGS="$$XLA_FLAGS $(DIRECT)" $(RUN) -c "import jax; jax.devices()" >/dev/null 2>&1; then \
	        export XLA_FLAGS="$$XLA_FLAGS $(DIRECT)"; \
	    fi; \
	fi; \
	echo "XLA_FLAGS=$$XLA_FLAGS $(PYTEST) -m '$(2)'"; $(PYTEST) -m "$(2)"
endef

test: $(VENV)/.installed  ## the tests that take minutes in all
	$(call pytest,0,not slow)

test-slow: $(VENV)/.installed  ## the tests that `make test` leaves out
	$(call pytest,1,slow)

docs: $(VENV)/.installed-docs  ## the documentation, in docs/_build/html
	$(RUN) -m sphinx -b html -W --keep-going docs docs/_build/html
	@echo "docs: docs/_build/html/index.html"

bench: $(VENV)/.installed-bench  ## the benchmarks: all of them, or `make bench BENCH=<name>`
	$(RUN) -m benchmarks $(BENCH)

lint: $(VENV)/.installed  ## ruff: rules and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.installed  ## ruff: repair what it can
	$(RUN) -m ruff check --fix-only --quiet .
	$(RUN) -m ruff format .

types: $(VENV)/.installed  ## mypy over smcdiff/
	$(RUN) -m mypy

venv: $(VENV)/.installed  ## only the environment

constraints:  ## pin the newest versions anew: make constraints PYTHONS="python3.11 python3.12 python3.13"
	@for python in $(or $(PYTHONS),$(PYTHON)); do $$python constraints/make.py || exit 1; done

clean:  ## what builds and tools leave behind
	rm -rf build dist docs/_build docs/jupyter_execute .cache .mypy_cache .pytest_cache .ruff_cache
	find smcdiff tests models tutorials benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

clean-venv:  ## the environment as well
	rm -rf $(VENV)

# An environment that exists is used as it is. When the caller names a Python, the environment must be of that Python:
# else `make test PYTHON=python3.13` would test another one without a word.
check-python:
ifneq ($(origin PYTHON),file)
	@line='import sys; print("%d.%d" % sys.version_info[:2])'; \
	if [ -x $(RUN) ]; then \
	    asked=$$($(PYTHON) -c "$$line") && found=$$($(RUN) -c "$$line") && [ "$$asked" = "$$found" ] || { \
	        echo "error: $(VENV) was made with Python $$found, and PYTHON=$(PYTHON) is $$asked." >&2; \
	        echo "       Name another folder (VENV=.venv-py$$(echo $$asked | tr -d .)) or run: make clean-venv" >&2; \
	        exit 1; \
	    }; \
	fi
endif

$(RUN): | check-python
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: no Python at '$(PYTHON)'. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: smcdiff needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "       Name a newer one: make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 || { \
	    cat $(VENV).log >&2; rm -rf $(VENV) $(VENV).log; \
	    echo "error: '$(PYTHON) -m venv $(VENV)' failed; its message is above." >&2; \
	    echo "       On Debian and Ubuntu the module is a package of its own: apt install python3-venv" >&2; exit 1; }
	@rm -f $(VENV).log

# $(call install,<extras>): the editable package with these extras, at the versions pinned for the environment's Python,
# or those of the newest Python with pins where it is newer than all of them.
define install
	@line=$$($(RUN) -c 'import sys; print("py%d%d" % sys.version_info[:2])'); \
	pins=constraints/$$line.txt; \
	if [ ! -f $$pins ]; then \
	    pins=$$(ls constraints/py*.txt | sort -V | tail -n 1); \
	    echo "note: no pins for $$line, those of $$pins are used"; \
	fi; \
	echo "installing smcdiff[$(1)] into $(VENV) at the versions in $$pins (a minute or two) ..."; \
	$(RUN) -m pip install --quiet --progress-bar off --editable ".[$(1)]" --constraint $$pins
	@touch $@
endef

$(VENV)/.installed: $(PINS) | check-python $(RUN)
	$(call install,test$(comma)dev)

$(VENV)/.installed-docs: $(PINS) | check-python $(RUN)
	$(call install,docs)

$(VENV)/.installed-bench: $(PINS) | check-python $(RUN)
	$(call install,bench)

comma := ,
