# `make demo` and `make test` set everything up on a fresh machine and run.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: install demo pipeline test lint bench clean

# does nothing when the environment is newer than the package definition
install: $(STAMP)

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 to 3.13 is needed, not " + sys.version.split()[0] + "; run make PYTHON=python3.11" if not (3, 10) <= sys.version_info[:2] <= (3, 13) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade "pip>=24" "setuptools>=77"
	$(PY) -m pip install -q -e ".[finetune,dev]"
	@touch $(STAMP)

demo: install
	$(PY) -m inference.demo

pipeline: install
	$(PY) -m inference.pipeline

# a process a core, one thread each: two that compute with two threads slow each other down tenfold
test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

lint: install
	$(PY) -m ruff check .

bench: install
	$(PY) -m inference.bench --json runs/bench.json

clean:
	rm -rf $(VENV) build dist *.egg-info runs
