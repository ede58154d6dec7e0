# The verbs of the project; CI calls the same ones.
VENV ?= .venv
BASE_PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TORCH_OK := import torch, re, sys; sys.exit(tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 6))
DATA ?= mnist.npz
OLDEST := $(addprefix tests/,core engine methods report results runs session cli/test_config.py) \
    --ignore tests/results/test_harness.py --ignore tests/engine/test_drafts_by_another.py# the two need extras
RESULTS := experiments/results# what is committed; scripts by themselves write under runs/ and checkpoints/
AGENTS := runs/agents# actors of locomotion, npz files of yours: make offline-rl AGENTS=...

.PHONY: help setup demo demo-text demo-restore demo-actions demo-plan demo-policy test test-cpus test-oldest test-slow lint bench bench-ray bench-async bench-pipelines soak fuzz evidence mixtures coverage diagnose-evidence mnist-evidence train-mnist planning long-horizon policy-data train-maze train-policy policies offline-rl train-restoration restoration-evidence observations restore-evidence actions-evidence train-experts experts-evidence train-student students-evidence hspace-evidence pie-evidence train-painter train-text text-evidence drafts-evidence pages docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## build the environment in .venv; an installed torch >= 2.6 is kept

# A torch that is already there (in the environment, or in the Python that makes it) decides; otherwise the pin does.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV): two minutes or more, by the network"
	@test -x $(PY) || $(BASE_PYTHON) -m venv $(VENV) $$($(BASE_PYTHON) -c '$(TORCH_OK)' 2>/dev/null && echo --system-site-packages)
	@cp constraints.txt $(VENV)/constraints.txt
	@if $(PY) -c '$(TORCH_OK)' 2>/dev/null; then \
	    sed -i.bak '/^torch==/d' $(VENV)/constraints.txt; \
	    $(PY) -c 'import torch; print("torch==" + torch.__version__)' >> $(VENV)/constraints.txt; fi
	@$(PY) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt torch
	@$(PY) -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## search for heavy eights with six methods at equal NFE, into runs/demo: who reaches best-of-N's best first
	@rm -rf runs/demo
	@$(PY) -m treesearch compare --store runs/demo --kernel "mnist(num_steps=10)" --nfe 5k \
	    --reward "digit(8) + 200*brightness(target=0.2)" \
	    --methods best_of_n "best_of_n(draft=3)" tree_search tree_sampling fk "dts_star(widening_c=1, widening_alpha=0.5)"

demo-text: $(STAMP)  ## texts: a small model towards positive reviews and towards a JSON schema, with rewards, into runs/demo-text
	@$(PY) -m experiments.text.demo_text

demo-restore: $(STAMP)  ## restore test digits by published rules and by search, with log p(y) and a picture, into runs/demo-restore
	@$(PY) -m experiments.observations.demo_restore

demo-actions: $(STAMP)  ## search over what to do inside the network: a tree in the colours of its actions, each action alone, into runs/demo-actions
	@$(PY) -m experiments.interventions.demo_actions

demo-plan: $(STAMP)  ## plan in a maze: success and NFE of four methods, a tree of plans, an animation, into runs/demo-plan
	@$(PY) -m experiments.planning.demo_plan

demo-policy: $(STAMP)  ## a frozen policy in a two-route maze: base, best-of-N, DSRL, search with its critics, a picture, into runs/demo-policy
	@$(PY) -m experiments.policies.demo_policy

test: $(STAMP)  ## the test suite
	@$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-cpus: $(STAMP)  ## tests, demo and exact figures with other vector units, threads and busy cores: hours; run again to go on
	@$(PY) -m experiments.robustness.cpus

test-oldest:  ## what needs no extra, with the oldest versions that are allowed, in an environment of its own
	@test -x build/oldest/bin/python || $(BASE_PYTHON) -m venv build/oldest
	@build/oldest/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt torch -e '.[ray]' matplotlib pytest scipy
	@build/oldest/bin/python -m pytest -q $(OLDEST)

test-slow: $(STAMP)  ## statistical runs of minutes
	@$(PY) -m pytest -q -m slow

lint: $(STAMP)  ## format, lint and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m basedpyright

evidence: mixtures mnist-evidence  ## every method at equal NFE: hours; run again to go on

mixtures: $(STAMP)  ## sampling on mixtures with known targets, then the report
	@$(PY) -m experiments.mixtures.evidence run --out $(RESULTS)/mixtures/mixtures.jsonl
	@$(PY) -m experiments.mixtures.evidence report --rows $(RESULTS)/mixtures/mixtures.jsonl --out $(RESULTS)/mixtures/mixtures.md

coverage: $(STAMP)  ## whether intervals of log Z hold it, every method on 24 beds with a known log Z: ten minutes; run again to go on
	@$(PY) -m experiments.coverage.evidence run --out $(RESULTS)/coverage/coverage.jsonl
	@$(PY) -m experiments.coverage.evidence report --rows $(RESULTS)/coverage/coverage.jsonl

diagnose-evidence: $(STAMP)  ## the method that `treesearch diagnose` suggests beside the default one, then the report: a quarter of an hour
	@$(PY) -m experiments.diagnose.evidence run --out $(RESULTS)/diagnose/diagnose.jsonl
	@$(PY) -m experiments.diagnose.evidence report --rows $(RESULTS)/diagnose/diagnose.jsonl --out $(RESULTS)/diagnose/diagnose.md

mnist-evidence: $(STAMP)  ## sampling and search on MNIST, then the report: make mnist-evidence DATA=path/to/mnist.npz
	@$(PY) -m experiments.mnist.evidence run --data $(DATA) --out $(RESULTS)/mnist/mnist_evidence.jsonl
	@$(PY) -m experiments.mnist.evidence run --part search --out $(RESULTS)/mnist/mnist_search.jsonl --work runs/mnist_search
	@$(PY) -m experiments.mnist.evidence report --rows $(RESULTS)/mnist/mnist_evidence.jsonl $(RESULTS)/mnist/mnist_search.jsonl \
	    --out $(RESULTS)/mnist/mnist_evidence.md

restore-evidence: $(STAMP)  ## posteriors of digits by published rules and by search, and whether they are calibrated: hours; run again to go on
	@$(PY) -m experiments.observations.restore run --out $(RESULTS)/observations/restore.jsonl
	@$(MAKE) --no-print-directory pages

actions-evidence: $(STAMP)  ## actions inside the network beside noise at equal cost, then the page: half an hour; run again to go on
	@$(PY) -m experiments.interventions.compare run --out $(RESULTS)/interventions/compare.jsonl
	@$(PY) -m experiments.interventions.compare report --rows $(RESULTS)/interventions/compare.jsonl --out $(RESULTS)/interventions/compare.md

train-painter: $(STAMP)  ## train the painter of PIE-mini and the score of its edits again: ten minutes
	@$(PY) -m experiments.pie_mini.train --out checkpoints/painter
	@$(PY) -m experiments.pie_mini.scorer --out checkpoints/scorer
	@cp checkpoints/painter/weights.safetensors experiments/pie_mini/weights/painter.safetensors
	@cp checkpoints/scorer/weights.safetensors experiments/pie_mini/weights/scorer.safetensors

pie-evidence: $(STAMP)  ## inversions and searches over edits on PIE-mini, then the pages: an hour; run again to go on
	@$(PY) -m experiments.pie_mini.table run --out $(RESULTS)/pie_mini/table.jsonl
	@$(PY) -m experiments.pie_mini.table report --rows $(RESULTS)/pie_mini/table.jsonl --out $(RESULTS)/pie_mini/table.md
	@$(PY) -m experiments.pie_mini.search run --out $(RESULTS)/pie_mini/search.jsonl
	@$(PY) -m experiments.pie_mini.search report --rows $(RESULTS)/pie_mini/search.jsonl \
	    --out $(RESULTS)/pie_mini/search.md --figure $(RESULTS)/pie_mini/search.png

bench: $(STAMP)  ## overhead, tree speed, store: ratios within one run, JSON and a table
	@$(PY) -m experiments.bench.overhead --out $(RESULTS)/bench/bench.json

bench-ray: $(STAMP)  ## how much of their speed workers keep: ratios within one run, and a model of large clusters
	@$(PY) -m experiments.bench.workers --out $(RESULTS)/bench/bench_ray.json

bench-async: $(STAMP)  ## quality of asynchronous search against serial, 30 seeds
	@$(PY) -m experiments.bench.async_quality --out $(RESULTS)/bench/async_quality.json

bench-pipelines: $(STAMP)  ## cost of a search beside a diffusers pipeline's own loop, memory against its plan
	@$(PY) -m experiments.bench.pipelines --out $(RESULTS)/bench/bench_pipelines.json

soak: $(STAMP)  ## 200 workers killed during a long search: nothing lost, memory flat
	@$(PY) -m experiments.robustness.soak --kills 200 --out $(RESULTS)/soak.json

fuzz: $(STAMP)  ## 10,000 damaged and forged run folders: resumed to the right result, or refused; minutes
	@$(PY) -m experiments.robustness.fuzz

train-mnist: $(STAMP)  ## train the shipped models again: make train-mnist DATA=path/to/mnist.npz
	@$(PY) -m experiments.mnist.train_classifiers --data $(DATA) \
	    --reward-weights rewards/weights/mnist_classifier.safetensors --judge-weights experiments/weights/mnist_judge.safetensors
	@$(PY) -m experiments.mnist.train_mnist --data $(DATA) --out checkpoints/mnist --weights backends/weights/mnist.safetensors \
	    --curve $(RESULTS)/mnist/curve.csv
	@$(PY) -m experiments.mnist.evaluate_mnist --data $(DATA) --out $(RESULTS)/mnist

planning: $(STAMP)  ## planners at equal NFE in the Medium maze, then the report: hours; run again to go on
	@$(PY) -m experiments.planning.evidence run --out $(RESULTS)/planning/planning.jsonl
	@$(PY) -m experiments.planning.evidence report --out $(RESULTS)/planning/planning.jsonl --to $(RESULTS)/planning/planning.md

long-horizon: $(STAMP)  ## plans of several chunks where one is too short, then the report: a quarter of an hour; run again to go on
	@$(PY) -m experiments.planning.long_horizon run --out $(RESULTS)/planning/long_horizon.jsonl
	@$(PY) -m experiments.planning.long_horizon report --rows $(RESULTS)/planning/long_horizon.jsonl --out $(RESULTS)/planning/long_horizon.md

policy-data: $(STAMP)  ## data under a target policy: published guidance beside FK and trees
	@$(PY) -m experiments.planning.generate_data --bed gaussian --n 8000 --out $(RESULTS)/planning/policy_data.json
	@$(PY) -m experiments.planning.generate_data --bed maze --n 64 --out $(RESULTS)/planning/policy_data.json

train-maze: $(STAMP)  ## make PointMaze data and train the shipped maze model again: an hour
	@$(PY) -m experiments.planning.pointmaze --maze medium --out runs/pointmaze/medium.npz
	@$(PY) -m experiments.planning.train_trajectory --data runs/pointmaze/medium.npz --out checkpoints/medium \
	    --weights backends/weights/maze_medium.safetensors --curve $(RESULTS)/planning/trajectory/medium.csv

train-policy: $(STAMP)  ## train the shipped policy of the two-route maze again: two minutes
	@$(PY) -m experiments.policies.train_policy --out checkpoints/two_routes --weights backends/weights/two_routes.safetensors \
	    --curve $(RESULTS)/policies/two_routes_curve.csv --figures $(RESULTS)/policies/two_routes.json

policies: $(STAMP)  ## DSRL in the two-route maze, then search with its critics, and the pages: an hour; run again to go on
	@$(PY) -m experiments.policies.learning run --out $(RESULTS)/policies/learning.jsonl
	@$(PY) -m experiments.policies.learning report --rows $(RESULTS)/policies/learning.jsonl --out $(RESULTS)/policies/learning.md
	@$(PY) -m experiments.policies.shares --out $(RESULTS)/policies/shares.json
	@$(PY) -m experiments.policies.compare run --out $(RESULTS)/policies/compare.jsonl
	@$(PY) -m experiments.policies.compare report --rows $(RESULTS)/policies/compare.jsonl --out $(RESULTS)/policies/compare.md

offline-rl: $(STAMP)  ## TD3+BC and IQL on real, guided and searched data, and the page: an hour; run again to go on
	@$(PY) -m experiments.planning.locomotion --agent $(AGENTS)/sac_HalfCheetah.npz --out runs/offline_rl/halfcheetah.npz
	@$(PY) -m experiments.planning.train_trajectory --data runs/offline_rl/halfcheetah.npz --maze "" \
	    --environment HalfCheetah-v5 --horizons 16 --stride 1 --goal 0 --reward --epochs 20 --out checkpoints/offline_rl \
	    --weights runs/offline_rl/halfcheetah.safetensors --curve runs/offline_rl/halfcheetah.csv
	@$(PY) -m experiments.offline_rl run --env halfcheetah-medium-replay --dataset runs/offline_rl/halfcheetah.npz \
	    --weights runs/offline_rl/halfcheetah.safetensors --protocol.n 1000 --protocol.episodes 5 \
	    --out $(RESULTS)/policies/offline_rl.jsonl
	@$(PY) -m experiments.offline_rl report --rows $(RESULTS)/policies/offline_rl.jsonl --out $(RESULTS)/policies/offline_rl.md

train-restoration: $(STAMP)  ## train the shipped restoration model again, minutes: make train-restoration DATA=path/to/mnist.npz
	@$(PY) -m experiments.processes.train_restoration --data $(DATA) --out checkpoints/restoration \
	    --weights backends/weights/blur.safetensors --curve $(RESULTS)/processes/restoration_curve.csv

train-student: $(STAMP)  ## train the shipped student of the MNIST model again: twenty minutes of an idle core
	@$(PY) -m experiments.students.train_mnist --out checkpoints/students/mnist
	@cp checkpoints/students/mnist/consistency.safetensors backends/weights/mnist_student.safetensors
	@cp checkpoints/students/mnist/curve.csv $(RESULTS)/students/mnist_curve.csv

students-evidence: $(STAMP)  ## the shipped student, and every target on the ring, then the page: make students-evidence DATA=path/to/mnist.npz
	@$(PY) -m experiments.students.evaluate_mnist --data $(DATA) --out $(RESULTS)/students/mnist.json
	@$(PY) -m experiments.students.evidence run --seeds 0 --out $(RESULTS)/students/ring.jsonl
	@$(PY) -m experiments.students.evidence report --rows $(RESULTS)/students/ring.jsonl --out $(RESULTS)/students/ring.md

restoration-evidence: $(STAMP)  ## restoration by steps and order, and by search, minutes: make restoration-evidence DATA=path/to/mnist.npz
	@$(PY) -m experiments.processes.restoration --data $(DATA) --out $(RESULTS)/processes/restoration.json

observations: $(STAMP)  ## log p(y), posteriors and a scale chosen by ESS where the truth is known, then the page: half an hour; run again to go on
	@$(PY) -m experiments.observations.evidence run --out $(RESULTS)/observations/evidence.jsonl
	@$(PY) -m experiments.observations.posteriors run --out $(RESULTS)/observations/posteriors.jsonl
	@$(PY) -m experiments.observations.elucd run --out $(RESULTS)/observations/elucd.jsonl
	@$(PY) -m experiments.observations.beds_report --rows $(RESULTS)/observations --out $(RESULTS)/observations/beds.md

train-experts: $(STAMP)  ## teach the digit classifier and the JPEG size noise, from draws of the MNIST model: a quarter of an hour
	@$(PY) -m experiments.observations.train_experts
	@cp checkpoints/experts/ppap.safetensors backends/weights/ppap.safetensors
	@cp checkpoints/experts/endpoint.safetensors backends/weights/ppap_endpoint.safetensors

experts-evidence: $(STAMP)  ## experts beside endpoints, ESS and spread of log Z: after train-experts, make experts-evidence DATA=path/to/mnist.npz
	@$(PY) -m experiments.observations.experts run --out $(RESULTS)/observations/experts.jsonl
	@$(PY) -m experiments.observations.experts accuracy --data $(DATA) --out $(RESULTS)/observations/experts.json
	@$(PY) -m experiments.observations.experts report --rows $(RESULTS)/observations/experts.jsonl \
	    --accuracy $(RESULTS)/observations/experts.json --out $(RESULTS)/observations/experts.md

hspace-evidence: $(STAMP)  ## what directions of h-space change, how far siblings differ, how much stays in a box: a quarter of an hour
	@$(PY) -m experiments.interventions.hspace run --out $(RESULTS)/interventions/hspace.jsonl
	@$(PY) -m experiments.interventions.hspace report --rows $(RESULTS)/interventions/hspace.jsonl --out $(RESULTS)/interventions/hspace.md

train-text: $(STAMP)  ## train the shipped text model and its classifiers again, hours: make train-text DATA=folder/of/reviews
	@$(PY) -m experiments.text.train_text --data $(DATA) --out checkpoints/text --weights backends/weights/text.safetensors
	@$(PY) -m experiments.text.train_classifiers --data $(DATA) --out checkpoints/classifiers
	@cp checkpoints/classifiers/text_sentiment.safetensors checkpoints/classifiers/text_acceptability.safetensors rewards/weights/
	@cp checkpoints/classifiers/text_sentiment_judge.safetensors checkpoints/classifiers/text_acceptability_judge.safetensors \
	    experiments/weights/

text-evidence: $(STAMP)  ## steering, search and records of texts, then the pages: make text-evidence DATA=folder/of/reviews; run again to go on
	@$(PY) -m experiments.text.records run --out $(RESULTS)/text/records.jsonl
	@$(PY) -m experiments.text.steering run --data $(DATA) --out $(RESULTS)/text/steering.jsonl
	@$(PY) -m experiments.text.search run --data $(DATA) --out $(RESULTS)/text/search.jsonl
	@$(MAKE) --no-print-directory pages

drafts-evidence: $(STAMP)  ## what drafts know of rollouts, what nodes are worth, and searches with them: hours; run again to go on
	@$(PY) -m experiments.drafts.correlation run --out $(RESULTS)/drafts/correlation.jsonl
	@$(PY) -m experiments.drafts.sampling run --out $(RESULTS)/drafts/sampling.jsonl
	@$(PY) -m experiments.drafts.search run --out $(RESULTS)/drafts/search.jsonl
	@$(PY) -m experiments.drafts.values run --states 32 --rollouts 24 --seeds 2 --student "student(num_steps=50)" --out $(RESULTS)/drafts/values.jsonl
	@$(PY) -m experiments.drafts.endpoints run --rollouts 20 --seeds 100 --out $(RESULTS)/drafts/endpoints.jsonl
	@$(PY) -m experiments.drafts.endpoints run --rollouts 60 --seeds 40 --out $(RESULTS)/drafts/endpoints.jsonl
	@$(PY) -m experiments.drafts.endpoints run --rollouts 200 --seeds 20 --out $(RESULTS)/drafts/endpoints.jsonl
	@$(MAKE) --no-print-directory pages

pages: $(STAMP)  ## docs/figures.md, evidence.md, verified.md, models.md and the pages of restorations, experts and interventions from the result files
	@$(PY) -m experiments.shared.pages --out docs
	@$(PY) -m experiments.bench.models --out docs/models.md
	@$(PY) -m experiments.interventions.memory report --rows $(RESULTS)/interventions/memory.jsonl --out $(RESULTS)/interventions/memory.md
	@$(PY) -m experiments.observations.restore report --rows $(RESULTS)/observations/restore.jsonl --out $(RESULTS)/observations/restore.md
	@$(PY) -m experiments.observations.experts report --rows $(RESULTS)/observations/experts.jsonl \
	    --accuracy $(RESULTS)/observations/experts.json --out $(RESULTS)/observations/experts.md
	@$(PY) -m experiments.headhunter report --rows $(RESULTS)/interventions/headhunter.jsonl --out $(RESULTS)/interventions/headhunter.md
	@$(PY) -m experiments.interventions.compare report --rows $(RESULTS)/interventions/compare.jsonl --out $(RESULTS)/interventions/compare.md
	@$(PY) -m experiments.interventions.hspace report --rows $(RESULTS)/interventions/hspace.jsonl --out $(RESULTS)/interventions/hspace.md
	@$(PY) -m experiments.interventions.lina report --rows $(RESULTS)/interventions/lina.jsonl --out $(RESULTS)/interventions/lina.md
	@$(PY) -m experiments.roots.reconstruction report --rows $(RESULTS)/roots/reconstruction.jsonl --out $(RESULTS)/roots/reconstruction.md
	@$(PY) -m experiments.drafts.correlation report --rows $(RESULTS)/drafts/correlation.jsonl --out $(RESULTS)/drafts/correlation.md
	@$(PY) -m experiments.drafts.sampling report --rows $(RESULTS)/drafts/sampling.jsonl --out $(RESULTS)/drafts/sampling.md
	@$(PY) -m experiments.drafts.search report --rows $(RESULTS)/drafts/search.jsonl --out $(RESULTS)/drafts/search.md
	@$(PY) -m experiments.drafts.values report --rows $(RESULTS)/drafts/values.jsonl --out $(RESULTS)/drafts/values.md
	@$(PY) -m experiments.drafts.endpoints report --rows $(RESULTS)/drafts/endpoints.jsonl --out $(RESULTS)/drafts/endpoints.md
	@$(PY) -m experiments.text.records report --rows $(RESULTS)/text/records.jsonl --out $(RESULTS)/text/records.md
	@$(PY) -m experiments.text.steering report --rows $(RESULTS)/text/steering.jsonl --out $(RESULTS)/text/steering.md
	@$(PY) -m experiments.text.search report --rows $(RESULTS)/text/search.jsonl --out $(RESULTS)/text/search.md
	@$(PY) -m experiments.roots.drag report --rows $(RESULTS)/roots/drag.jsonl --out $(RESULTS)/roots/drag.md
	@$(PY) -m experiments.pie_mini.table report --rows $(RESULTS)/pie_mini/table.jsonl --out $(RESULTS)/pie_mini/table.md
	@$(PY) -m experiments.students.evidence report --rows $(RESULTS)/students/ring.jsonl --out $(RESULTS)/students/ring.md
	@$(PY) -m experiments.pie_mini.search report --rows $(RESULTS)/pie_mini/search.jsonl \
	    --out $(RESULTS)/pie_mini/search.md --figure $(RESULTS)/pie_mini/search.png

docs: $(STAMP)  ## the documentation as a site, into build/site: a link or an anchor that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
