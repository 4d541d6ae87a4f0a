"""Readiness by Alembic's revisions: does the database match this release of the application?

Nothing here migrates. It only reads the version table that `alembic upgrade` maintains.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine
from starlette.applications import Starlette

from ._lifespan.running import running_of, trimmed
from ._sessions.engines import run_on_engine
from .databases import AnyDatabase
from .health import CheckResult

try:
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
except ImportError as _error:
    raise ImportError(
        'fastapi_sqlnative.migrations needs Alembic: pip install "fastapi-sqlnative[alembic]"'
    ) from _error

__all__ = ["alembic_check"]

logger: logging.Logger = logging.getLogger("fastapi_sqlnative")


def alembic_check(
    config: Config | str | os.PathLike[str],
    *,
    database: str = "default",
    version_table: str = "alembic_version",
    version_table_schema: str | None = None,
) -> Callable[[Starlette], Awaitable[CheckResult]]:
    """Make a check for `health_router` that is ready once the database is migrated.

    The script directory is read once, now: a wrong configuration fails start-up, and revisions
    that are added later are not seen. env.py does not run. The database is read, never written to,
    until the check has passed; after that, the check sends no more queries in that lifespan.

    - `current`, ready: the database is at the heads of the script directory.
    - `ahead`, ready: it has a revision that this release does not know, and none older than this
      release's heads. A newer release has migrated it, and this one is still being replaced.
    - `behind`, not ready: anything else. `alembic upgrade` has not run, or not to the end.

    Args:
        config: Alembic's `Config`, or the path of an ini file. Of a file, the section of the
            database's name is read if it has or inherits a `script_location`, else `[alembic]`.
        database: the name given to `install_database`, on the application that includes the
            router or on one that it is mounted in.
        version_table: as passed to `context.configure` in env.py, which is not read.
        version_table_schema: likewise.

    Raises:
        FileNotFoundError: the ini file does not exist.
        ValueError: the script directory has no revisions.
        alembic.util.CommandError: Alembic cannot read the script directory.

    Example:
        app.include_router(health_router(checks={"migrations": alembic_check("alembic.ini")}))
    """
    name = trimmed(database)
    wanted = Revisions.read(config, name)
    seen = WeakKeyDictionary[AnyDatabase, CheckResult]()

    def read(engine: Engine) -> frozenset[str]:
        with engine.connect() as connection:
            return current_revisions(connection, version_table, version_table_schema)

    async def check(app: Starlette) -> CheckResult:
        handle = running_of(app).database(name)
        before = seen.get(handle)
        if before is not None and before.ready:
            return before
        found = await run_on_engine(handle.engine, read)
        seen[handle] = result = wanted.compare(found)
        if result != before:  # with the revisions, which the HTTP response does not show
            logger.log(
                logging.INFO if result.state == "current" else logging.WARNING,
                "Migrations of database %r are %s: it has %s, this release needs %s.",
                name,
                result.state,
                ", ".join(sorted(found)) or "none",
                ", ".join(sorted(wanted.heads)),
            )
        return result

    return check


def current_revisions(
    connection: Connection, table: str = "alembic_version", schema: str | None = None
) -> frozenset[str]:
    """Read the revisions from a database's version table; none if there is no such table."""
    options = {"version_table": table, "version_table_schema": schema}
    context = MigrationContext.configure(connection, opts=options)
    return frozenset(context.get_current_heads())


class Revisions(NamedTuple):
    """The revisions of a script directory, and those that a migrated database is at."""

    known: frozenset[str]
    heads: frozenset[str]

    @classmethod
    def read(cls, config: Config | str | os.PathLike[str], database: str) -> Revisions:
        """Read the script directory of a database; raise as `alembic_check` does."""
        if not isinstance(config, Config):
            if not Path(config).is_file():
                raise FileNotFoundError(
                    f"There is no Alembic configuration {os.fspath(config)!r} (working directory: "
                    f"{Path.cwd()}): pass a path that works wherever the application is started."
                )
            config = Config(config)
            if config.file_config.has_option(database, "script_location"):
                config.config_ini_section = database
        script = ScriptDirectory.from_config(config)
        heads = set(script.get_heads())
        if not heads:
            raise ValueError(
                f"The script directory {script.dir!r} has no revisions, so every database would "
                "count as migrated: fix script_location or version_locations, or create the first "
                "revision before you use alembic_check."
            )
        known = frozenset(each.revision for each in script.walk_revisions())
        # The version table omits a head that another branch depends on.
        below = {head: script.get_all_current(tuple(heads - {head})) for head in heads}
        effective = {head for head in heads if script.get_revision(head) not in below[head]}
        return cls(known, frozenset(effective))

    def compare(self, found: frozenset[str]) -> CheckResult:
        if found == self.heads:
            return CheckResult(ready=True, state="current")
        unknown = found - self.known
        if unknown and found - unknown <= self.heads:
            return CheckResult(ready=True, state="ahead")
        return CheckResult(ready=False, state="behind")
