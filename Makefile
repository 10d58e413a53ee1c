# OpenWIT: `make help` lists the targets. Each sets up what it needs by itself.

NUMBERS ?=
ifneq ($(RUN),)
CONFIG  ?= $(or $(wildcard $(RUN)/config.yaml),configs/sample.yaml)
endif
CONFIG  ?= configs/sample.yaml
RUN     ?= runs/$(basename $(notdir $(CONFIG)))
ON      ?= local
WAIT    ?=
WORKERS ?=
SET     ?=
NAME    ?=
FORMAT  ?= open_clip
TO      ?=
LIST    ?=
REASON  ?=
FROM    ?=
LATER   ?=
STAGE   ?=
TASK    ?=
NO_DECODE ?=
PYTHON  ?= python3

KNOWN   := CONFIG NUMBERS RUN ON WAIT WORKERS SET NAME FORMAT TO LIST REASON FROM LATER STAGE TASK \
           NO_DECODE PYTHON
GIVEN   := $(foreach v,$(.VARIABLES),$(if $(filter command line,$(origin $v)),$v))
UNKNOWN := $(filter-out $(KNOWN) MAKE% MFLAGS CURDIR SHELL,$(GIVEN))
$(if $(strip $(UNKNOWN)),$(error unknown variable $(UNKNOWN); the variables are: $(KNOWN)))

VENV     := .venv
STAMP    := $(VENV)/.installed
WORDNET  := /usr/share/wordnet/data.noun
CHROMIUM := /usr/bin/chromium
WORDS    := /usr/share/dict/american-english-huge
PIPELINE  = $(VENV)/bin/python -m pipeline
OPTIONS   = --run $(RUN) --on $(ON) $(if $(WAIT),--wait) $(if $(WORKERS),--workers $(WORKERS)) $(SET)

.DEFAULT_GOAL := help
.PHONY: help setup demo build-dataset train evaluate export report status logs cancel verify purge config plan \
        slurm-check test test-slurm lint format bench inputs test-inputs test-slurm-inputs slurm-packages clean

help: ## list the targets and variables
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  CONFIG=configs/x.yaml   what to build           (now: $(CONFIG))'
	@echo '                          without it, RUN goes on with its own RUN/config.yaml, if it has one'
	@echo '  RUN=runs/x              the run folder          (now: $(RUN))'
	@echo '  SET="a.b=c d.e=f"       change single settings'
	@echo '  ON=local WORKERS=n      where tasks run, and how many at the same time'
	@echo '  ON=slurm WAIT=1         as jobs of a cluster; WAIT=1 stays until all is done'
	@echo '  NUMBERS="--from runs/x" what `make plan` reckons with'
	@echo '  FORMAT=open_clip TO=x   what `make export` writes, and where to; or FORMAT=huggingface'
	@echo '  LIST=x REASON="..."     what `make purge` removes, and why; or FROM=runs/y, what y is without'
	@echo '  LATER=1                 puts that in force, and changes files with the next build only'
	@echo '  NO_DECODE=1             `make verify` compares the bytes of pictures and decodes none'
	@echo '  NAME=match              which benchmark `make bench` runs (all of them without it)'

setup: $(STAMP) ## make .venv with everything that the project needs

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else \
	  "Python 3.10, 3.11 or 3.12 is needed, this is %d.%d; name one: make PYTHON=python3.11 ..." % v)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { \
	  echo 'python3-venv is missing; as root: apt-get install python3-venv' >&2; exit 1; }
	@echo 'installing the Python packages into $(VENV) (a few minutes, a few GB)'
	@$(VENV)/bin/pip install --quiet --editable '.[dev,bench]'
	@touch $@

demo: CONFIG := configs/sample.yaml
demo: build-dataset ## the whole way once, offline: sample web, dataset, training, evaluation, report
	@$(PIPELINE) evaluate $(CONFIG) $(OPTIONS)
	@$(PIPELINE) report $(CONFIG) $(OPTIONS)

build-dataset: setup inputs ## queries, extract, match, dedup, balance, download, screen, pack
	@$(PIPELINE) build $(CONFIG) $(OPTIONS)

train: setup ## train on the shards of RUN
	@$(PIPELINE) train $(CONFIG) $(OPTIONS)

evaluate: setup ## train if need be, then measure zero-shot accuracy
	@$(PIPELINE) evaluate $(CONFIG) $(OPTIONS)

export: setup ## write the model of RUN for others, into the new folder TO
	@test -n '$(TO)' || { echo 'name a new folder: make export RUN=$(RUN) TO=...' >&2; exit 2; }
	@$(VENV)/bin/python -m pipeline export $(RUN) --format $(FORMAT) --to $(TO)

report: setup ## write RUN/report/index.html and print a summary
	@$(PIPELINE) report $(CONFIG) $(OPTIONS)

status: setup ## what of RUN is done, running or failed, and where its logs are
	@$(PIPELINE) status $(RUN)

logs: setup ## print the log of task TASK of STAGE; without TASK, of those that failed or run
	@test -n '$(STAGE)' || { echo 'name a stage: make logs RUN=$(RUN) STAGE=download TASK=17' >&2; exit 2; }
	@$(PIPELINE) logs $(RUN) $(STAGE) $(TASK)

cancel: setup ## end the jobs that RUN has on a cluster; the same command goes on later
	@$(PIPELINE) cancel $(RUN)

verify: setup ## read every published file of RUN again and compare checksums
	@$(PIPELINE) verify $(RUN) $(if $(WORKERS),--workers $(WORKERS)) $(if $(NO_DECODE),--no-decode)

purge: export REASON := $(REASON)
purge: setup ## remove what LIST names from RUN: addresses, domains, hashes, uids
	@$(PIPELINE) purge $(RUN) $(LIST) --on $(ON) $(if $(WAIT),--wait) $(if $(WORKERS),--workers $(WORKERS)) \
	  $(if $(FROM),--from $(FROM)) $(if $(LATER),--later) $(if $(REASON),--reason "$$REASON")

config: setup ## print CONFIG with every key and its explanation
	@$(PIPELINE) config $(CONFIG) $(SET)

plan: setup ## what CONFIG will cost, for your NUMBERS="--candidates 12e9 --pairs 400e6 --gpu H100"
	@$(PIPELINE) plan $(CONFIG) --run $(RUN) $(NUMBERS) $(SET)

slurm-check: setup ## can this cluster do what CONFIG asks of it, and what must be set
	@$(PIPELINE) slurm-check $(CONFIG) --run $(RUN) $(SET)

test: setup test-inputs ## all tests but those that need SLURM
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m 'not slurm' -n logical --maxprocesses 8 --dist loadfile

test-slurm: setup test-slurm-inputs ## the tests on a SLURM cluster that they start on this machine
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m slurm

lint: setup ## ruff and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: setup ## let ruff put the code in order
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

bench: setup $(if $(filter match,$(or $(NAME),match)),$(WORDNET) $(WORDS)) ## measure ours against the peer a user would pick
	@$(VENV)/bin/python -m benchmarks $(NAME)

clean: ## remove .venv; runs stay
	rm -rf $(VENV)

# Debian packages: only where a target needs them.

ifneq ($(shell grep -s '^[^\#]*/usr/share/wordnet' $(CONFIG)),)
inputs: $(WORDNET)
endif
inputs:

test-inputs:
	@test -e $(WORDNET) -a -e $(CHROMIUM) || test "$$(id -u)" != 0 || \
	  $(MAKE) --no-print-directory $(WORDNET) $(CHROMIUM)
	@test -e $(WORDNET) -a -e $(CHROMIUM) || echo 'without wordnet-base and chromium the tests that' \
	  'need them are skipped; as root: apt-get install wordnet-base chromium'

test-slurm-inputs:
	@PATH="$$PATH:/usr/sbin"; for program in slurmctld slurmd sbatch; do \
	  command -v $$program >/dev/null || exec $(MAKE) --no-print-directory slurm-packages; done

slurm-packages:
	$(call debian_package,slurmctld slurmd slurm-client)

$(WORDNET):
	$(call debian_package,wordnet-base)

$(CHROMIUM):
	$(call debian_package,chromium)

$(WORDS):
	$(call debian_package,wamerican-huge)

define debian_package
	@test "$$(id -u)" = 0 || { echo '$(1) is missing; as root: apt-get install $(1)' >&2; exit 1; }
	@echo 'installing the Debian package $(1)'
	@{ apt-get update -qq && apt-get install -qq -y --no-install-recommends $(1); } >/dev/null
endef
