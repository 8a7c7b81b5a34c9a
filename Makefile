# make demo     install, protect a small real collection offline, measure the effect, write a report
# make test     install what tests need and run the fast tests
# make test-all what make test leaves out: slow and fault tests, and the S3 tests on a real server, two at a time
# make gpu      on a machine with an NVIDIA GPU: what runs there, and how fast, in nine minutes
# make bench    the benchmarks; each prints a table and writes tests/bench/results/*.json

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# a file stays on one process: its tests share what fixtures have run, and what they count; files come in their own
# order, because xdist's leaves those with few tests, which are the longest, to the end and one process
PYTEST := $(RUN) -m pytest -q --durations=20 -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# root, but not allowed to read what a file's mode forbids
LIKE_A_USER := setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-dac_override,-dac_read_search

# threads that wait by spinning take the processor from those they wait for
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all lint gpu bench clean

demo: $(VENV)/installed
	$(RUN) jobs/demo.py --output demo

test: $(VENV)/installed-test lint
	$(PYTEST) -m "not slow"
	[ "$$(id -u)" != 0 ] || $(LIKE_A_USER) $(RUN) -m pytest -q -m permissions

test-all: $(VENV)/installed-test lint
	tests/with_s3.sh $(PYTEST) -n 2 -m "slow or s3"

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=tests/bench $(VENV)/bin/mypy --cache-dir .mypy_cache/bench --explicit-package-bases --implicit-reexport \
	  --allow-untyped-calls --no-warn-return-any --no-warn-unused-ignores tests/bench/bench_*.py

gpu: $(VENV)/installed-test
	tests/bench/gpu/run.sh

bench: $(VENV)/installed-test
	for bench in tests/bench/bench_*.py; do $(RUN) $$bench || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN) -m pip install -q -c constraints.txt -e ".[test]"
	$(RUN) -m pip install -q --no-deps torchattacks==3.5.1  # what it asks for is from 2021 and breaks others
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) demo build *.egg-info
