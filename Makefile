# The two commands a newcomer needs: `make demo` and `make test`. The rest are short names for what nox runs
# (`.nox/tools/bin/nox -l` is the menu).

# The first Python here that is new enough. Another one: make demo PYTHON=/path/to/python
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
NOX := .nox/tools/bin/nox
PACKAGES := $(foreach name,protocol client worker broker,-e packages/$(name))
PIP := -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help python demo test setup style format unit integration-test kafka

help:
	@echo "make demo   a broker, workers and a producer, at work before your eyes (needs Python 3.11 or newer)"
	@echo "make test   everything that CI checks; about 20 minutes on two cores"
	@echo "also: setup, style, format, unit, integration-test, kafka"

demo: .venv/.runtime
	@.venv/bin/python demo/run.py

test: $(NOX)
	@mkdir -p .nox && rm -f .nox/report.json
	@$(NOX) --no-error-on-missing-interpreters --report .nox/report.json; .nox/tools/bin/python tools/summary.py .nox/report.json

setup: $(NOX)
	@$(NOX) -s setup
style: $(NOX)
	@$(NOX) -s lint
format: $(NOX)
	@$(NOX) -s format
unit: $(NOX)
	@$(NOX) -s unit
integration-test: $(NOX)
	@$(NOX) -s e2e
kafka: $(NOX)
	@$(NOX) -s kafka

python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv was found."; \
	echo "Next: install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: make ... PYTHON=/path/to/python"; \
	exit 1; }

.venv/.runtime: requirements/runtime.txt requirements/build.txt $(wildcard packages/*/pyproject.toml) | python
	@echo "Making .venv with the four packages and their locked dependencies (about 60 MB, once) ..."
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP) --require-hashes -r requirements/runtime.txt -r requirements/build.txt
	@.venv/bin/python $(PIP) --no-deps --no-build-isolation $(PACKAGES)
	@touch $@

$(NOX): requirements/tools.txt | python
	@echo "Making .nox/tools with nox and uv (once) ..."
	@$(PYTHON) -m venv --clear .nox/tools
	@.nox/tools/bin/python $(PIP) --require-hashes -r requirements/tools.txt
	@touch $@
