# The two commands of the README. Each sets up .venv by itself; only Python 3.11+ and make are needed.
PYTHON ?= python3
VENV := .venv
# What make accelerator runs on: gpu, tpu, or cpu to rehearse it. The bounds of JAX are requirements.txt's.
DEVICE ?= gpu
JAX := $(shell sed -n 's/^jax\(>=.*\)/\1/p' requirements.txt)

.PHONY: demo test soak accelerator lint clean
.DELETE_ON_ERROR: # a Python without ensurepip leaves half an environment

demo: $(VENV)/run ## train on handwritten digits and draw some
	$(VENV)/bin/python main.py

test: $(VENV)/test ## every test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(VENV)/test ## the promises of docs/reliability.md, often: most of an hour
	$(VENV)/bin/python -m pytest -n 2 -m "not alone" tests/soak
	$(VENV)/bin/python -m pytest -m alone tests/soak

# $(PYTHON) as it is, where nothing is missing; not $(MAKE), which --dry-run would execute.
accelerator: ## what a GPU or TPU does in BUDGET_S seconds: docs/performance.md
	@if $(PYTHON) -m pip install --quiet --dry-run --no-index -r requirements.txt 2>/dev/null && \
		$(PYTHON) -c 'import jax; jax.devices("$(DEVICE)")' 2>/dev/null; then python=$(PYTHON); \
	else make $(VENV)/$(DEVICE) && python=$(VENV)/bin/python; fi && \
	DEVICE=$(DEVICE) $$python -m diffusion.bench.accelerator

lint: $(VENV)/test ## format, lint and layers, as CI asks for
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	PYTHONPATH=. $(VENV)/bin/lint-imports --no-logo

clean: ## everything that was made, but for runs/
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed, found %d.%d; use: make demo PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: requirements.txt | $(VENV)/bin/python
	@echo "installing the libraries into $(VENV); a minute or two"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/test: tests/requirements.txt $(VENV)/run
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

$(VENV)/gpu: diffusion/bench/requirements.txt $(VENV)/run
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r diffusion/bench/requirements.txt "jax[cuda13]$(JAX)"
	@touch $@

$(VENV)/tpu: $(VENV)/run
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "jax[tpu]$(JAX)"
	@touch $@

$(VENV)/cpu: $(VENV)/run
	@touch $@
