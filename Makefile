# make pretrain   train the default model (one command from a bare machine)
# make test       the default test suite, ruff, mypy and the order of imports; the tests in two processes, or as many as
#                 WORKERS says (0: in pytest's own, where ARGS may be --pdb or -s)
# make test-all   everything, the slow tests included
# make test-layouts   a checkpoint of every layout goes on in every other one
# make compare-smoke   a small comparison of routers from grid to report: trainings, evaluations, paired intervals
# make test-cluster   the launchers on a real SLURM cluster of virtual nodes; installs Debian's SLURM if missing, and skips
#                     with the reason where that cannot be (not root, no namespaces, no packages)
# make test-hf    transformers' own tests of models and of generation on the exported model; TRANSFORMERS_CHECKOUT=DIR names
#                 a checkout of the version installed; by default PyPI's sources, which have the first of the two
# make fuzz MINUTES=30   damaged inputs of every kind to every reader, and power cuts, for so long (docs/reliability.md)
# make test-gpu   on a machine with a GPU, with its own python3: that what only a GPU runs is right (docs/gpu.md)
# make bench-gpu  the same machine: all ten checks of benchmarks/gpu.py, in 8 minutes; ARGS='--checks 0 4 7 8 9' leaves
#                 out those that test-gpu runs, so that both together take about 9 minutes
# make docs       the site of docs/ with the reference of the API, in site/; no warning passes
# make bench      the first tables of docs/performance.md: a layer (benchmarks/layer.py), whole steps (benchmarks/step.py)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
MINUTES ?= 30
WORKERS ?= 2

# A file's tests stay together, for they share fixtures and launches; tests/conftest.py puts the longest files first. A
# worker that dies ends the run, as a process of pytest's own would: started again, it would meet the same test.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: setup setup-dev pretrain test test-all test-layouts test-cluster test-gpu test-hf compare-smoke fuzz lint docs bench bench-gpu clean

pretrain: setup
	@. $(BIN)/activate && deepspeed launchers/pretrain.py --ds_config ds_configs/zero2.json $(ARGS)

test: setup-dev lint
	@$(BIN)/python -m pytest tests -m "not slow" $(PARALLEL) $(ARGS)

test-all: setup-dev lint
	@$(BIN)/python -m pytest tests

test-layouts: setup-dev
	@$(BIN)/python -m pytest tests/checkpoint/test_restore.py -m slow --timeout 3600

test-cluster: setup-dev
	@if tests/cluster/cluster.sh can; then VQMOE_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster --durations=0 -v $(ARGS); \
	elif [ $$? = 2 ]; then echo "make test-cluster: skipped, for this machine cannot have a cluster"; else exit 1; fi

test-hf: setup-dev
	@TRANSFORMERS_CHECKOUT=$${TRANSFORMERS_CHECKOUT:-fetch} $(BIN)/python -m pytest tests/models/test_hf_suite.py $(ARGS)

fuzz: setup-dev
	@VQMOE_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/fuzz tests/checkpoint/test_power_cut.py -s --timeout 0

test-gpu:
	@$(PYTHON) -m pytest tests -m gpu -rs $(ARGS)

bench-gpu:
	@$(PYTHON) benchmarks/gpu.py $(ARGS)

compare-smoke: setup
	@rm -rf runs/compare-smoke
	@$(BIN)/python tools/compare_routers.py benchmarks/grids/smoke.yaml --out runs/compare-smoke --jobs 2 $(ARGS)

lint: setup-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache --no-logo

docs: $(VENV)-docs/.installed
	@NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --site-dir site

bench: setup
	@$(BIN)/python benchmarks/layer.py && $(BIN)/python benchmarks/step.py

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml tools/setup_venv.sh
	@PYTHON=$(PYTHON) sh tools/setup_venv.sh $(VENV) requirements.txt && touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt constraints.txt pyproject.toml tools/setup_venv.sh
	@PYTHON=$(PYTHON) sh tools/setup_venv.sh $(VENV) requirements-dev.txt && touch $@ $(VENV)/.installed

$(VENV)-docs/.installed: requirements-docs.txt
	@$(PYTHON) -m venv $(VENV)-docs && $(VENV)-docs/bin/pip install --quiet -r requirements-docs.txt && touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs site build *.egg-info
