# Two commands: `make book` and `make test`, and `make check` while working. Everything else is a convenience.
VENV ?= .venv
PORT ?= 8000
SERVE ?= 1
WORKERS ?= 2
SHELL := /bin/bash
PY := $(VENV)/bin/python
# The environment is made again when what it should hold changes, or where it stands: the sum is the stamp's name.
READY := $(VENV)/ready-$(shell { cat requirements.txt pyproject.toml setup.py book/tools/bootstrap.py; pwd; } | cksum | cut -d ' ' -f 1)
PYTHON ?=
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=120
# A process for each worker, with one thread each (tests/conftest.py); the cells of a notebook and what starts processes stay together.
SPREAD := -n $(WORKERS) --dist loadgroup
HTML := _build/html

.PHONY: help book build test check browser lab chapters bench repo clean
help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1|/p' Makefile | awk -F '|' '{ printf "  %-14s %s\n", $$1, $$2 }'

book: build ## build the book and serve it at http://127.0.0.1:8000 (SERVE=0 only builds, PORT= another port)
	@if [ "$(SERVE)" != 0 ]; then exec $(PY) book/tools/serve.py $(HTML) $(PORT); fi

test: build browser ## run everything: unit tests, every notebook, the browser tests (WORKERS=8 on 8 cores)
	@$(PY) -m pytest $(NBVAL) $(SPREAD) tests book/chapters book/solutions

# What is left out of the core here starts processes or a compiler.
check: $(READY) ## while working: form, imports, the core and one chapter, in 90 seconds
	@$(PY) -m ruff format --check --quiet . || { $(PY) -m ruff format --check .; echo "Run: ruff format ." >&2; exit 1; }
	@$(PY) -m ruff check --quiet .
	@$(PY) $(VENV)/bin/lint-imports
	@$(PY) -m pytest $(NBVAL) $(SPREAD) -m "not processes and not own_bits" tests/core book/chapters/01-an-moe-on-one-page.ipynb

lab: $(READY) ## open JupyterLab on the chapters
	@$(PY) -m jupyterlab --ServerApp.root_dir=book --LabApp.default_url=/lab/tree/chapters $(if $(filter 0,$(shell id -u)),--allow-root)

chapters: $(READY) ## execute and normalise the notebooks (CHAPTER=02 only that one)
	@$(PY) book/tools/chapters.py $(CHAPTER)

bench: $(READY) ## every router on the same text and budget; about 10 minutes, prints a table, writes router_bench.json
	@$(PY) -m moe_tools.bench routers

repo: ## stamp the repository's URL into the book: make repo URL=https://github.com/you/moe-book
	@python=$$(PYTHON="$(PYTHON)" book/tools/find-python.sh) && "$$python" book/tools/repo.py "$(URL)" $(BRANCH)

clean: ## remove what was built; the environment stays (make clean VENV=.venv ALL=1 removes it too)
	@rm -rf _build jupyter_execute book/_static/vendor build *.egg-info $(if $(ALL),$(VENV))

$(READY):
	@python=$$(PYTHON="$(PYTHON)" book/tools/find-python.sh) && "$$python" book/tools/bootstrap.py $(VENV)
	@rm -f $(VENV)/ready-* && touch $@

# A page that gave a warning is not built again, so after a failure the next build would pass: it starts over instead.
build: $(READY)
	@echo "Building the book"
	@$(PY) $(VENV)/bin/jupyter-book build . -n -W --keep-going -q >/dev/null || { rm -rf _build/.doctrees; echo "The book did not build." >&2; exit 1; }

browser: $(READY)
	@$(PY) book/tools/browser.py
