# make demo, make test: all that is needed on a fresh machine (Python 3.11 or newer, git, make)
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test lab notebook export readme clean-notebooks lock
PY := .venv/bin/python
# no model hub is asked for anything; the hub's models and data sets work with HF_HUB_OFFLINE=0 make ...
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHON TORCH_INDEX

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv from requirements.lock; does nothing when it is up to date (PYTHON=..., TORCH_INDEX=...)
	@scripts/setup_env.sh

demo: setup ## build the data set, train D-RAG's retriever, evaluate it, answer five questions (about 6 minutes on 2 cores, the environment included)
	@$(PY) -u scripts/demo.py

test: setup ## everything that must hold: notebooks, drift, runs, command line, lint (ONLY=name: those steps alone)
	@$(PY) -u scripts/run_tests.py $(ONLY)

lab: setup ## JupyterLab in nbs/
	@.venv/bin/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs

notebook: lab ## the same as lab

export: setup ## notebooks -> drag_lib/
	@.venv/bin/nbdev_export

readme: setup ## nbs/index.ipynb -> README.md
	@$(PY) scripts/make_readme.py

clean-notebooks: setup ## strip what nbdev_clean strips from every notebook
	@.venv/bin/nbdev_clean

lock: setup ## write requirements.lock from the versions installed in .venv
	@$(PY) scripts/lock.py
