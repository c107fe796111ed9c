# make demo: see it work.  make test: run the tests.  make bench: measure it against others.
PYTHON ?= python3
RUN := .venv/bin/python -P
INSTALL := .venv/bin/pip install --quiet --disable-pip-version-check -c requirements/dev.txt

demo: .venv/installed-demo
	HF_HUB_OFFLINE=1 $(RUN) benchmarks/demo.py

test: .venv/installed-test
	.venv/bin/pytest

bench: .venv/installed-bench
	.venv/bin/pytest benchmarks --benchmark-json=.benchmarks/run.json
	$(RUN) benchmarks/report.py .benchmarks/run.json

lint: .venv/installed-test .venv/installed-lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h)

# Everything of the project that an installation copies or compiles.
SOURCES := pyproject.toml setup.py requirements/dev.txt $(wildcard csrc/*.cpp csrc/*.h)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed-%: .venv/bin/python $(SOURCES)
	$(INSTALL) -e .[$*]
	touch $@

clean:
	rm -rf .venv .benchmarks build dist *.egg-info fastbert/*.so

.PHONY: demo test bench lint clean
