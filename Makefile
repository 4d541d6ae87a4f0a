# The entry point for contributors and CI. Everything is installed in .venv and nowhere else.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# Recompiling every module would take each of the many processes longer than its work.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONUNBUFFERED := 1

# The first Python that is new enough; `make PYTHON=...` selects another.
PYTHON ?= $(shell for python in python3 python3.15 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& command -v $$python && break; done)
RUN := .venv/bin/python
LOWEST := .venv-lowest/bin/python
CANARY := .venv-canary/bin/python
# Number of test processes; if empty, five, or none for a few tests.
WORKERS ?=
export WORKERS
SITE := .venv-site/bin/python
# Extra arguments for pytest, as in: make test ARGS="-k transfer"
ARGS ?=
# few: one asynchronous and one synchronous driver, and all drivers where they differ, without the
# tests marked as slow. `make check` runs all.
DRIVERS ?= few
DATABASE_URL ?=
export DATABASE_URL

# Keep intermediate files.
.SECONDARY:
.PHONY: help env test test-lowest lint types benchmark build check demo example constraints clean release-check release-notes test-python canary test-ha test-docker audit test-faults soak test-site docs docs-serve benchmark-peers

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

env: .venv/ready ## create or update .venv

test: .venv/ready ## run the tests, on a PostgreSQL that is found or started
	@echo "Starting the tests ..."
	@$(RUN) -m pytest -n auto --drivers=$(DRIVERS) $(ARGS)

# Warnings from the oldest supported frameworks, which we cannot fix: they use deprecated names, and
# Starlette leaves the streams of its test client and middlewares to the garbage collector.
OLD_WARNINGS := -W "ignore:The anyio.abc.BlockingPortal alias:DeprecationWarning" \
	-W "ignore:async generator function lifespans:DeprecationWarning" \
	-W "ignore:The on_startup and on_shutdown:DeprecationWarning" \
	-W "ignore:Unclosed <MemoryObject:ResourceWarning"

test-lowest: .venv-lowest/ready ## run the tests on the lowest supported versions
	$(call on_lowest,sqlalchemy,$(DRIVERS))
	$(call on_lowest,sqlalchemy==2.1.6 fastapi==0.137.2,few)

# Install the given versions, and run the tests with the given drivers. Tests that depend on the
# driver run with all drivers both times; for the others, one run is enough. FastAPI 0.137.2 is the
# first that keeps included routers, and lists their routes differently from newer ones. Older
# versions of anyio than this one are refused by httpx2; before 0.45.1, Starlette's test client can
# miss a websocket's message and wait forever.
define on_lowest
	@$(LOWEST) -m uv pip install --quiet --python $(LOWEST) --resolution lowest-direct \
		-P fastapi -P starlette -P sqlalchemy --editable . "starlette>=0.45.1" anyio==4.10.0 $(1)
	@$(LOWEST) -m uv --quiet pip list --python $(LOWEST) --format freeze \
		| grep -E '^(anyio|fastapi|starlette|sqlalchemy)=='
	@$(LOWEST) -m pytest -n auto --drivers=$(2) $(OLD_WARNINGS) $(ARGS)
endef

test-python: ## run the tests on another Python: make test-python PYTHON=python3.13
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
		$(MAKE) .venv-$$version/ready && \
		.venv-$$version/bin/python -m pytest -n auto $(ARGS)

# A pre-release as the lower bound makes uv accept pre-releases, of these packages only. Not part of
# `make check`: a failure here may be caused by one of them.
BELOW = fastapi starlette pydantic anyio sqlalchemy greenlet psycopg asyncpg aiosqlite alembic
canary: .venv-canary/ready ## run the tests on pre-releases of the main dependencies
	@$(CANARY) -m uv pip install --quiet --python $(CANARY) --upgrade \
		$(BELOW:%='%>=0.dev0') --editable . --group test
	@$(CANARY) -m uv --quiet pip list --python $(CANARY) --format freeze \
		| grep -E '^($(subst $() ,|,$(BELOW)))=='
	@$(CANARY) -m pytest -n auto $(ARGS)

# Not part of `make test`: it needs a browser (Debian: chromium, chromium-driver), the network, and
# an environment with the packages of docs/works-with.md.
test-site: .venv-site/ready-integrations ## test the site in a browser, the tutorial and the integrations
	@$(SITE) -m pytest tests/test_site.py $(ARGS)

lint: .venv/ready-lint ## check style
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

types: .venv/ready-lint ## check types: mypy --strict, pyright, and the types of what is public
	@$(RUN) -m mypy
	@$(RUN) -m pyright --pythonpath $(RUN)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(RUN) -m pyright --verifytypes fastapi_sqlnative \
		--ignoreexternal >.venv/public || { cat .venv/public; exit 1; }

benchmark: .venv/ready ## compare with a hand-written dependency
	@$(RUN) -m tests.benchmark
	@$(RUN) -m tests.import_time

# Takes half an hour on an idle machine. ARGS="--quick" is a short trial, ARGS="cpu" runs one part.
benchmark-peers: .venv-peers/ready-peers ## compare with other packages; writes docs/performance-compared.md
	@.venv-peers/bin/python -m tests.peers $(ARGS)

test-faults: .venv/ready ## break the server, the network and the workers; writes build/faults/report.md
	@$(RUN) -m tests.faults

# Every fault with every driver, deployment and pool_pre_ping, repeatedly.
MINUTES ?= 60
soak: .venv/ready ## repeat the fault tests for a long time: make soak MINUTES=60
	@$(RUN) -m tests.faults --minutes $(MINUTES)

build: .venv/ready-lint ## build the wheel and the sdist, and check the wheel's contents
	@rm -rf dist
	@$(RUN) -m hatchling build
	@$(RUN) -m zipfile --list dist/*.whl | awk 'NR > 1 { print $$1 }' >.venv/wheel
	@grep -qx fastapi_sqlnative/py.typed .venv/wheel
	@grep -qx 'fastapi_sqlnative/.agents/skills/.*/SKILL.md' .venv/wheel
	@! grep -vE '^fastapi_sqlnative(/|-[0-9.]+\.dist-info/)' .venv/wheel

# Needs the network: every environment starts empty. CONTRIBUTING.md describes a release.
release-check: build ## test the built packages in empty environments, before a release
	@$(RUN) -m tests.release dist

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
release-notes: ## print this version's section of the changelog
	@awk -v heading='## [$(VERSION)]' 'index($$0, "## [") == 1 { on = index($$0, heading) == 1; next } \
		on { print; found = found || /[^ ]/ } END { exit !found }' CHANGELOG.md || \
		{ echo "CHANGELOG.md has no section [$(VERSION)]" >&2; exit 1; }

docs: .venv/ready-lint ## build the site into site/
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

docs-serve: .venv/ready-lint ## serve the site, and rebuild it when a page changes
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs serve --strict --watch fastapi_sqlnative

# If CI is set, a missing MariaDB fails its tests instead of leaving them out.
check: export CI := true
check: DRIVERS := all
check: lint types audit test test-lowest test-site benchmark test-faults build docs ## run everything CI runs

# Needs several servers, from Debian's packages; a missing one makes it fail.
test-ha: .venv/ready-lint ## run the tests with PgBouncer, standbys, Patroni (Debian, root)
	@tests/ha/install postgresql pgbouncer patroni python3-etcd etcd-server
	@$(RUN) -m pytest tests/ha $(ARGS)
	@$(MAKE) test-docker

test-docker: .venv/ready ## run tests on PostgreSQL in a container (Debian, root)
	@tests/ha/install postgresql docker.io iptables iproute2
	@$(RUN) -m tests.ha.docker $(ARGS)

audit: .venv/ready-lint ## check the pinned versions for known vulnerabilities
	@$(RUN) -m tests.audit

demo: .venv/ready-demo ## serve the showcase on a temporary PostgreSQL, or on DATABASE_URL
	@$(RUN) -m examples showcase

example: .venv/ready-demo ## serve one of the examples: make example NAME=quick_start
	@$(RUN) -m examples $(NAME)

constraints: .venv/ready ## pin the newest versions of the development environment
	@$(RUN) -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
		--group dev --group integrations --group peers \
		--no-annotate --custom-compile-command "make constraints" \
		--output-file constraints.txt pyproject.toml

clean: ## remove everything that make creates
	@rm -rf .venv .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Run $(2), and print a line every five seconds: uv itself can be silent for a long time.
define saying
	@echo "$(1) ..."
	@{ while sleep 5 >/dev/null 2>&1; do echo "... still running"; done; } & ticker=$$!; \
		trap 'kill $$ticker 2>/dev/null' EXIT; \
		$(2)
endef

# Each environment's own uv quickly installs the pinned versions.
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
	$(call saying,Adding the test dependencies to $*,$(INSTALL) --editable . --group test)
	@touch $@

%/ready-lint: %/ready
	$(call saying,Adding the linters to $*,$(INSTALL) --group dev)
	@touch $@

%/ready-integrations: %/ready-lint
	$(call saying,Adding the integrations to $*,$(INSTALL) --group integrations)
	@touch $@

%/ready-peers: %/ready-demo
	$(call saying,Adding the compared packages to $*,$(INSTALL) --group peers)
	@touch $@
