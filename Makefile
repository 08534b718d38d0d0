# make demo   the main job on data that ships with a dependency: teacher, student alone, student distilled
# make test   the test suite, without what takes minutes or a machine of its own (CONTRIBUTING.md)
# make lint   ruff (lint, format), mypy, and how rooms import each other
# make docs   the documentation site, in build/site; with search: python3 -m http.server -d build/site -b 127.0.0.1
# make bench  every benchmark that needs no data, weights or GPU of yours; refreshes benchmarks/results/ and the table of benchmarks/README.md
# make clean  remove what the commands above made
SHELL := /bin/sh
PYTHON ?= python3
PY := .venv/bin/python
# Nothing is compiled at installation: a module is at its first import. Where that may not be kept, as some containers
# have it, every import of torch would take 9 s instead of 4.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: demo test lint docs bench clean setup
.DEFAULT_GOAL := demo

PIP := $(PY) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
ALL := -e '.[dev,timm]'

# The stamp names the folder and the pinned versions: a moved, outdated or half-made environment is made again. uv takes
# half a minute where pip takes four; pip installs where uv cannot, as with an index or wheels that pip alone knows of.
setup:
	@set -e; want="$$(pwd) $$(cat pyproject.toml constraints.txt | cksum)"; \
	if [ "$$(cat .venv/ready 2>/dev/null)" != "$$want" ] || ! $(PY) -c 'import mimkd_ray' 2>/dev/null; then \
	  echo "setting up .venv (about 6 GB with the default PyTorch build)"; \
	  rm -rf .venv; $(PYTHON) -m venv .venv; \
	  index="$${PIP_INDEX_URL:-$$($(PY) -m pip config get global.index-url 2>/dev/null || true)}"; \
	  if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	  { $(PIP) uv && .venv/bin/uv pip install --quiet --system-certs --python $(PY) -c constraints.txt $(ALL); } \
	    || { echo "uv cannot install it: pip does, in some minutes"; $(PIP) $(ALL); }; \
	  echo "$$want" > .venv/ready; \
	fi

demo: setup
	$(PY) jobs/imagenet.py

# Three processes on two cores: tests wait for other processes a third of their time.
test: setup
	$(PY) -m pytest -n 3 --no-loadscope-reorder

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache

docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

bench: setup
	$(PY) benchmarks/run_all.py

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
