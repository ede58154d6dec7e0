# The verbs of the project; CI calls the same ones.
VENV ?= .venv
BASE_PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH_OK := import torch, re, sys; sys.exit(tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 6))
DATA ?= mnist.npz

.PHONY: help setup demo demo-plan test test-slow lint bench bench-ray bench-async bench-pipelines soak evidence mixtures mnist-evidence train-mnist planning policy-data train-maze clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## build the environment in .venv; an installed torch >= 2.6 is kept

# A torch that is already there (in the environment, or in the Python that makes it) decides; otherwise the pin does.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || $(BASE_PYTHON) -m venv $(VENV) $$($(BASE_PYTHON) -c '$(TORCH_OK)' 2>/dev/null && echo --system-site-packages)
	@cp constraints.txt $(VENV)/constraints.txt
	@if $(PY) -c '$(TORCH_OK)' 2>/dev/null; then \
	    sed -i.bak '/^torch==/d' $(VENV)/constraints.txt; \
	    $(PY) -c 'import torch; print("torch==" + torch.__version__)' >> $(VENV)/constraints.txt; fi
	@$(PY) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt torch
	@$(PY) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## search for high-reward digits with every method at equal NFE, into runs/demo
	@rm -rf runs/demo
	@$(PY) -m treesearch compare --store runs/demo

demo-plan: $(STAMP)  ## plan in a maze: success and NFE of four methods, a tree of plans, an animation, into runs/demo-plan
	@$(PY) -m experiments.demo_plan

test: $(STAMP)  ## the test suite
	@$(PY) -m pytest -q -n 2 --dist loadfile

test-slow: $(STAMP)  ## statistical runs of minutes
	@$(PY) -m pytest -q -m slow

lint: $(STAMP)  ## format, lint and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m basedpyright

evidence: mixtures mnist-evidence  ## every method at equal NFE: hours; run again to go on

mixtures: $(STAMP)  ## sampling on mixtures with known targets, then the report
	@$(PY) -m experiments.mixtures run
	@$(PY) -m experiments.mixtures report

mnist-evidence: $(STAMP)  ## sampling and search on MNIST, then the report: make mnist-evidence DATA=path/to/mnist.npz
	@$(PY) -m experiments.mnist_evidence run --data $(DATA)
	@$(PY) -m experiments.mnist_evidence run --part search --out experiments/results/mnist_search.jsonl --work runs/mnist_search
	@$(PY) -m experiments.mnist_evidence report

bench: $(STAMP)  ## overhead, tree speed, store: ratios within one run, JSON and a table
	@$(PY) -m experiments.bench

bench-ray: $(STAMP)  ## how much of their speed workers keep: ratios within one run, and a model of large clusters
	@$(PY) -m experiments.bench_ray

bench-async: $(STAMP)  ## quality of asynchronous search against serial, 30 seeds
	@$(PY) -m experiments.async_quality

bench-pipelines: $(STAMP)  ## cost of a search beside a diffusers pipeline's own loop, memory against its plan
	@$(PY) -m experiments.bench_pipelines

soak: $(STAMP)  ## 200 workers killed during a long search: nothing lost, memory flat
	@$(PY) -m experiments.soak --kills 200

train-mnist: $(STAMP)  ## train the shipped models again: make train-mnist DATA=path/to/mnist.npz
	@$(PY) -m experiments.train_classifiers --data $(DATA)
	@$(PY) -m experiments.train_mnist --data $(DATA) --out checkpoints/mnist
	@$(PY) -m experiments.evaluate_mnist --data $(DATA)

planning: $(STAMP)  ## planners at equal NFE in the Medium maze, then the report: hours; run again to go on
	@$(PY) -m experiments.planning run
	@$(PY) -m experiments.planning report

policy-data: $(STAMP)  ## data under a target policy: published guidance beside FK and trees
	@$(PY) -m experiments.generate_data --bed gaussian --n 8000
	@$(PY) -m experiments.generate_data --bed maze --n 64

train-maze: $(STAMP)  ## make PointMaze data and train the shipped maze model again: an hour
	@$(PY) -m experiments.pointmaze --maze medium --out runs/pointmaze/medium.npz
	@$(PY) -m experiments.train_trajectory --data runs/pointmaze/medium.npz --out checkpoints/medium

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache dist
