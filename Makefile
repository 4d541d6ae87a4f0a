# The contributor's and CI's one entry. Everything happens in .venv; nothing is installed elsewhere.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# The first that is new enough; `make PYTHON=...` chooses another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& command -v $$python && break; done)
RUN := .venv/bin/python
LOWEST := .venv-lowest/bin/python
CANARY := .venv-canary/bin/python
# The tests wait for a database more than they compute.
WORKERS ?= 4
# More for pytest, as in: make test ARGS="-k transfer"
ARGS ?=
DATABASE_URL ?=
export DATABASE_URL

.PHONY: help env test test-lowest test-python canary lint types benchmark build release-check release-notes check demo example constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: .venv/ready ## create .venv, or bring it up to date

test: .venv/ready ## run the tests, on the PostgreSQL that is found or started
	@$(RUN) -m pytest -n $(WORKERS) $(ARGS)

# Old frameworks are deprecated by what is below them, and leave streams unclosed; those warnings
# are not ours to fix. One test is left out: of a hundred clients that go away at once, one has
# cost a connection there, in one run of several. Not traced yet; both frameworks have fixed
# leaks of that kind since (FastAPI 0.162.7, SQLAlchemy 2.1.4).
test-lowest: .venv-lowest/ready ## run the tests on the lowest supported versions
	@for sqlalchemy in sqlalchemy sqlalchemy==2.1.6; do \
		$(LOWEST) -m uv pip install --quiet --python $(LOWEST) --resolution lowest-direct \
			-P fastapi -P starlette -P sqlalchemy --editable . starlette $$sqlalchemy && \
		$(LOWEST) -m uv --quiet pip list --python $(LOWEST) --format freeze \
			| grep -E '^(fastapi|starlette|sqlalchemy)==' && \
		$(LOWEST) -m pytest -n $(WORKERS) -W ignore::DeprecationWarning \
			-W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning \
			--deselect tests/test_cancellation.py::test_clients_that_disconnect_leave_nothing \
			$(ARGS) || exit 1; \
	done

test-python: ## run the tests on another Python: make test-python PYTHON=python3.13
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
		$(MAKE) .venv-$$version/ready && \
		.venv-$$version/bin/python -m pytest -n $(or $(WORKERS),4) $(ARGS)

# Not in `make check`: what it finds may be theirs. It tells what the next versions will break.
canary: .venv-canary/ready ## run the tests on the newest pre-releases of all that is below
	@$(CANARY) -m uv pip install --quiet --python $(CANARY) --upgrade --prerelease allow \
		--editable . --group test
	@$(CANARY) -m uv --quiet pip list --python $(CANARY) --format freeze \
		| grep -E '^(fastapi|starlette|pydantic|anyio|sqlalchemy|psycopg|asyncpg)=='
	@$(CANARY) -m pytest -n $(or $(WORKERS),4) $(ARGS)

lint: .venv/ready-lint ## check style
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

types: .venv/ready-lint ## check types: mypy --strict and pyright
	@$(RUN) -m mypy
	@$(RUN) -m pyright --pythonpath $(RUN)

benchmark: .venv/ready ## compare with the hand-written pattern
	@$(RUN) -m tests.benchmark
	@$(RUN) -m tests.import_time

build: .venv/ready-lint ## build the wheel and the sdist, and look into the wheel
	@rm -rf dist
	@$(RUN) -m hatchling build
	@$(RUN) -m zipfile --list dist/*.whl | awk 'NR > 1 { print $$1 }' >.venv/wheel
	@grep -qx fastapi_sqlnative/py.typed .venv/wheel
	@! grep -vE '^fastapi_sqlnative(/|-[0-9.]+\.dist-info/)' .venv/wheel

# From the network: each environment is empty at first. In CONTRIBUTING.md: how a release is made.
release-check: build ## try what was built in empty environments, before a release
	@$(RUN) -m tests.release dist

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
release-notes: ## print what the changelog says of this version
	@awk -v heading='## [$(VERSION)]' 'index($$0, "## [") == 1 { on = index($$0, heading) == 1; next } \
		on { print; found = found || /[^ ]/ } END { exit !found }' CHANGELOG.md || \
		{ echo "CHANGELOG.md has no section [$(VERSION)]" >&2; exit 1; }

# Where CI is set, a missing MariaDB fails its tests instead of leaving them out.
check: export CI := true
check: lint types test test-lowest benchmark build ## run everything CI runs

demo: .venv/ready ## serve the showcase on a PostgreSQL of its own, or on DATABASE_URL
	@$(RUN) -m examples showcase

example: .venv/ready ## serve one of the examples: make example NAME=quick_start
	@$(RUN) -m examples $(NAME)

constraints: .venv/ready ## pin the newest versions of the development environment
	@$(RUN) -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
		--group dev --no-annotate --custom-compile-command "make constraints" \
		--output-file constraints.txt pyproject.toml

clean: ## remove everything made here, the demo's data too
	@rm -rf .venv .venv-* .demo build dist .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

%/ready: pyproject.toml constraints.txt
	@echo "Setting up $* ..."
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found: install one" \
		"(apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot create" \
		"environments: apt-get install python3-venv" >&2; exit 1; }
	@test -x $*/bin/python || $(PYTHON) -m venv $*
	@$*/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt uv
	@$*/bin/python -m uv pip install --quiet --python $*/bin/python \
		--constraints constraints.txt --editable . --group test
	@touch $@

%/ready-lint: %/ready
	@echo "Adding the linters to $* ..."
	@$*/bin/python -m uv pip install --quiet --python $*/bin/python \
		--constraints constraints.txt --group dev
	@touch $@
