# The contributor's and CI's one entry. Everything happens in .venv; nothing is installed elsewhere.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# Compiling every module anew takes each of the many processes here longer than its work.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONUNBUFFERED := 1

# The first that is new enough; `make PYTHON=...` chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& command -v $$python && break; done)
RUN := .venv/bin/python
LOWEST := .venv-lowest/bin/python
# Processes for the tests; if empty, four, and none for a few tests.
WORKERS ?=
export WORKERS
# More for pytest, as in: make test ARGS="-k transfer"
ARGS ?=
# few: one driver of each colour, all of them where a driver decides. `make check` runs all.
DRIVERS ?= few
DATABASE_URL ?=
export DATABASE_URL

# Kept, though make reaches it on the way to others.
.SECONDARY:
.PHONY: help env test test-lowest lint types benchmark build check demo example constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: .venv/ready ## create .venv, or bring it up to date

test: .venv/ready ## run the tests, on the PostgreSQL that is found or started
	@echo "Starting the tests ..."
	@$(RUN) -m pytest -n auto --dist loadgroup --drivers=$(DRIVERS) $(ARGS)

# What the oldest frameworks do that is not ours to fix: they use names of anyio's and of their own
# that have been deprecated since, and Starlette leaves the streams of its test client and of its
# middlewares to the garbage collector.
OLD_WARNINGS := -W "ignore:The anyio.abc.BlockingPortal alias:DeprecationWarning" \
	-W "ignore:async generator function lifespans:DeprecationWarning" \
	-W "ignore:The on_startup and on_shutdown:DeprecationWarning" \
	-W "ignore:Unclosed <MemoryObject:ResourceWarning"

test-lowest: .venv-lowest/ready ## run the tests on the lowest supported versions
	$(call on_lowest,sqlalchemy,$(DRIVERS))
	$(call on_lowest,sqlalchemy==2.1.6,few)

# Installs that SQLAlchemy, and runs the tests with those drivers. What a driver decides is run with
# all of them on both; the rest differs with SQLAlchemy, and not with the driver as well.
define on_lowest
	@$(LOWEST) -m uv pip install --quiet --python $(LOWEST) --resolution lowest-direct \
		-P fastapi -P starlette -P sqlalchemy --editable . starlette $(1)
	@$(LOWEST) -m uv --quiet pip list --python $(LOWEST) --format freeze \
		| grep -E '^(fastapi|starlette|sqlalchemy)=='
	@$(LOWEST) -m pytest -n auto --dist loadgroup --drivers=$(2) $(OLD_WARNINGS) \
		--deselect tests/test_cancellation.py::test_clients_that_disconnect_leave_nothing $(ARGS)
endef

lint: .venv/ready-lint ## check style
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

types: .venv/ready-lint ## check types: mypy --strict and pyright
	@$(RUN) -m mypy
	@$(RUN) -m pyright --pythonpath $(RUN)

benchmark: .venv/ready ## compare with the hand-written pattern
	@$(RUN) -m tests.benchmark

build: .venv/ready-lint ## build the wheel and look into it
	@rm -rf dist
	@$(RUN) -m hatchling build --target wheel
	@$(RUN) -m zipfile --list dist/*.whl | awk 'NR > 1 { print $$1 }' >dist/contents
	@grep -qx fastapi_sqlnative/py.typed dist/contents
	@! grep -vE '^fastapi_sqlnative(/|-[0-9.]+\.dist-info/)' dist/contents

# Where CI is set, a missing MariaDB fails its tests instead of leaving them out.
check: export CI := true
check: DRIVERS := all
check: lint types test test-lowest benchmark build ## run everything CI runs

demo: .venv/ready-demo ## serve the showcase on a PostgreSQL of its own, or on DATABASE_URL
	@$(RUN) -m examples showcase

example: .venv/ready-demo ## serve one of the examples: make example NAME=quick_start
	@$(RUN) -m examples $(NAME)

constraints: .venv/ready ## pin the newest versions of the development environment
	@$(RUN) -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
		--group dev --no-annotate --custom-compile-command "make constraints" \
		--output-file constraints.txt pyproject.toml

clean: ## remove everything made here
	@rm -rf .venv .venv-lowest build dist .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Runs $(2), and says every five seconds that it is still at it: uv itself can be silent for long.
define saying
	@echo "$(1) ..."
	@{ while sleep 5 >/dev/null 2>&1; do echo "... still at it"; done; } & ticker=$$!; \
		trap 'kill $$ticker 2>/dev/null' EXIT; \
		$(2)
endef

# A uv of its own environment installs, quickly, what the constraints pin.
INSTALL = $*/bin/python -m uv pip install --quiet --python $*/bin/python --constraints constraints.txt

%/ready-demo: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found: install one" \
		"(apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot create" \
		"environments: apt-get install python3-venv" >&2; exit 1; }
	$(call saying,Setting up $*,{ test -x $*/bin/python || $(PYTHON) -m venv $*; } && \
		$*/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt uv && \
		$(INSTALL) --editable . --group demo)
	@touch $@

%/ready: %/ready-demo
	$(call saying,Adding to $* what the tests need,$(INSTALL) --editable . --group test)
	@touch $@

%/ready-lint: %/ready
	$(call saying,Adding the linters to $*,$(INSTALL) --group dev)
	@touch $@
