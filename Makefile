# `make demo` and `make test` need Python 3.11 or newer, pip and make, and nothing else: they set up .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
export VENV ?= $(CURDIR)/.venv
RUN := $(VENV)/bin/python
export OMP_NUM_THREADS ?= 1
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: env
env: ## set up .venv, or bring it up to date
	@$(PYTHON) tools/setup_env.py

.PHONY: demo
demo: env ## simulate a cohort, pretrain, probe, stage unseen sleepers, write demo/report.html
	@env -u OMP_NUM_THREADS OMP_WAIT_POLICY=passive $(VENV)/bin/pftsleep demo --out demo

.PHONY: test
test: env ## every check of a change, ending in "N passed, M failed"
	@$(RUN) tools/check.py

.PHONY: test-slow
test-slow: env ## tests and notebook cells marked slow
	@$(RUN) tools/check.py --slow

.PHONY: test-gpu
test-gpu: env ## tests and notebook cells that need a GPU
	@$(RUN) tools/check.py --gpu --workers 1

.PHONY: prepare
prepare: env ## export, clean, README, then test: run it before you commit
	@$(RUN) tools/sync.py export clean readme
	@$(RUN) tools/check.py

.PHONY: docs
docs: env ## build the site in _docs/
	@$(RUN) docs/build.py

.PHONY: bench
bench: env ## run every script of benchmarks/, collect the figures in benchmarks/results/
	@$(RUN) tools/bench.py

.PHONY: clean
clean: ## delete what was built; .venv stays
	rm -rf _docs _proc build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov lightning_logs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
