# The two commands of the README. Each sets up .venv by itself; only Python 3.11+ and make are needed.
PYTHON ?= python3
VENV := .venv
# JAX would take three quarters of the memory; PyTorch, in a process beside it, needs its own.
GPU = XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 $(VENV)/bin/python main.py --mode=bench

.PHONY: demo test soak bench lint clean
.DELETE_ON_ERROR: # a Python without ensurepip leaves half an environment

demo: $(VENV)/run ## train on handwritten digits and draw some
	$(VENV)/bin/python main.py

test: $(VENV)/test ## every test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(VENV)/test ## the promises of docs/reliability.md, often: most of an hour
	$(VENV)/bin/python -m pytest -n 2 -m "not alone" tests/soak
	$(VENV)/bin/python -m pytest -m alone tests/soak

bench: $(VENV)/bench ## what docs/performance.md asks of an NVIDIA GPU, beside PyTorch
	for part in train sample profile; do \
		$(GPU) --part=$$part --config=configs/cifar10.py:bfloat16 --config.sample.batch_size=256 || exit; \
	done
	$(GPU) --part=train --config=configs/celebahq256.py:bfloat16 --workdir=runs/bench256
	$(GPU) --part=all

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

$(VENV)/bench: diffusion/bench/requirements.txt $(VENV)/run
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r diffusion/bench/requirements.txt "jax[cuda13]>=0.10,<0.13"
	@touch $@
