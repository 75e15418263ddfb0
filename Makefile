# `make demo` and `make test` set everything up on a fresh machine and run.
PYTHON ?= python3
VENV ?= .venv
# exact versions of all that is installed; with an empty LOCK the newest that setup.py allows
LOCK ?= constraints.txt
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq $(if $(LOCK),-c $(LOCK),--upgrade --upgrade-strategy eager)
STAMP := $(VENV)/.installed

.PHONY: install demo pipeline test test-latest lock lint bench clean

# does nothing when the environment is newer than the package definition and the lock
install: $(STAMP)

$(STAMP): setup.py pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 to 3.13 is needed, not " + sys.version.split()[0] + "; run make PYTHON=python3.11" if not (3, 10) <= sys.version_info[:2] <= (3, 13) else 0)'
	@echo "setting up $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip setuptools
	@$(PIP) $(if $(LOCK),--build-constraint $(LOCK)) -e ".[finetune,dev]"
	@touch $(STAMP)

demo: install
	$(PY) -m examples.demo

pipeline: install
	$(PY) -m examples.pipeline

# one thread each: two that compute with two threads slow each other down tenfold; one more than
# two cores, as tests often wait for what they started
test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadscope --no-loadscope-reorder

# the same in an environment of its own, with the newest of everything
test-latest:
	@rm -f .venv-latest/.installed
	@$(MAKE) --no-print-directory test VENV=.venv-latest LOCK=

# renew the exact versions, for every Python and system at once; only metadata is downloaded
lock:
	@tmp=$$(mktemp -d) && trap 'rm -rf $$tmp' EXIT && \
	$(PYTHON) -m venv $$tmp && $$tmp/bin/python -m pip install -q uv && \
	{ date -u "+# Exact versions of all that make demo and make test install. Renewed by make lock on %F." && \
	printf 'pip\nsetuptools\n' | $$tmp/bin/uv pip compile -q --no-config --universal --python-version 3.10 \
	--extra finetune --extra dev --no-annotate --no-header setup.py -; } > $$tmp/lock && cp $$tmp/lock constraints.txt

lint: install
	$(PY) -m ruff check .

bench: install
	$(PY) -m inference.bench --json runs/bench.json

clean:
	rm -rf $(VENV) .venv-latest build dist *.egg-info runs
