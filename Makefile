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
# The tests wait for a database more than they compute.
WORKERS ?= 4
# More for pytest, as in: make test ARGS="-k transfer"
ARGS ?=
DATABASE_URL ?=
export DATABASE_URL

.PHONY: help env test test-lowest lint types benchmark benchmark-peers build check demo example constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

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

lint: .venv/ready-lint ## check style
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

types: .venv/ready-lint ## check types: mypy --strict and pyright
	@$(RUN) -m mypy
	@$(RUN) -m pyright --pythonpath $(RUN)

benchmark: .venv/ready ## compare with the hand-written pattern
	@$(RUN) -m tests.benchmark

# Quiet for half an hour: ARGS="--quick" is for trying it out, ARGS="cpu" for one part.
benchmark-peers: .venv-peers/ready ## compare with other packages; writes docs/performance-compared.md
	@.venv-peers/bin/python -m tests.peers $(ARGS)

build: .venv/ready-lint ## build the wheel and look into it
	@rm -rf dist
	@$(RUN) -m hatchling build --target wheel
	@$(RUN) -m zipfile --list dist/*.whl | awk 'NR > 1 { print $$1 }' >dist/contents
	@grep -qx fastapi_sqlnative/py.typed dist/contents
	@! grep -vE '^fastapi_sqlnative(/|-[0-9.]+\.dist-info/)' dist/contents

# Where CI is set, a missing MariaDB fails its tests instead of leaving them out.
check: export CI := true
check: lint types test test-lowest benchmark build ## run everything CI runs

demo: .venv/ready ## serve the showcase on a PostgreSQL of its own, or on DATABASE_URL
	@$(RUN) -m examples showcase

example: .venv/ready ## serve one of the examples: make example NAME=quick_start
	@$(RUN) -m examples $(NAME)

constraints: .venv/ready ## pin the newest versions of the development environment
	@$(RUN) -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
		--group dev --group peers --no-annotate --custom-compile-command "make constraints" \
		--output-file constraints.txt pyproject.toml

clean: ## remove everything made here, the demo's data too
	@rm -rf .venv .venv-lowest .venv-peers .demo build dist .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

GROUP := test
.venv-peers/ready: GROUP := peers

%/ready: pyproject.toml constraints.txt
	@echo "Setting up $* ..."
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found: install one" \
		"(apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot create" \
		"environments: apt-get install python3-venv" >&2; exit 1; }
	@test -x $*/bin/python || $(PYTHON) -m venv $*
	@$*/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt uv
	@$*/bin/python -m uv pip install --quiet --python $*/bin/python \
		--constraints constraints.txt --editable . --group $(GROUP)
	@touch $@

%/ready-lint: %/ready
	@echo "Adding the linters to $* ..."
	@$*/bin/python -m uv pip install --quiet --python $*/bin/python \
		--constraints constraints.txt --group dev
	@touch $@
