"""The application that runs during the faults, with three ways to write and with registers."""

import functools
import gc
import logging
import os
import ssl
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from sqlalchemy import create_engine, func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    ErrorRule,
    get_database_handle,
    get_db,
    health_router,
    install_database,
    install_error_handlers,
    installed_databases,
    reader,
    transactional,
)
from fastapi_sqlnative.health import drain_on_sigterm
from tests.serving import KINDS, Kind

# Seconds. They are short so that a fault outlasts them.
CONNECT_TIMEOUT, POOL_TIMEOUT, COMMAND_TIMEOUT, DRAIN = 2, 2, 3, 1.5
MAX_AGE, PROBE_TIMEOUT, DOWN_AFTER = 0.5, 0.5, 1.5
POOL = {"pool_size": 3, "max_overflow": 2, "pool_timeout": POOL_TIMEOUT}


class Base(DeclarativeBase):
    """The tables."""


class Entry(Base):
    """A write, under the name that its client chose."""

    __tablename__ = "entry"

    name: Mapped[str] = mapped_column(primary_key=True)
    padding: Mapped[str] = mapped_column(default="." * 500)  # large, so that the disk fills up soon


class Register(Base):
    """A value that clients compare and set."""

    __tablename__ = "register"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


def connect_args(kind: Kind, certificate: str, *, pooled: bool) -> dict[str, Any]:
    """Return the driver's timeouts and its settings for PgBouncer and TLS."""
    arguments: dict[str, Any]
    if kind.driver == "asyncpg":
        arguments = {"timeout": CONNECT_TIMEOUT, "command_timeout": COMMAND_TIMEOUT}
        arguments["ssl"] = ssl.create_default_context(cafile=certificate) if certificate else False
        caches = {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
        return arguments | (caches if pooled else {})
    arguments = {"connect_timeout": CONNECT_TIMEOUT, "tcp_user_timeout": 3000}
    verified = {"sslmode": "verify-full", "sslrootcert": certificate}
    arguments |= verified if certificate else {"sslmode": "disable"}
    return arguments | ({"prepare_threshold": None} if pooled else {})


def build_engine(kind: Kind) -> Any:
    """Build the engine that the environment describes."""
    environment = os.environ
    arguments = connect_args(
        kind, environment.get("CERTIFICATE", ""), pooled="PGBOUNCER" in environment
    )
    build: Callable[..., Any] = create_async_engine if kind.asynchronous else create_engine
    ping = "PRE_PING" in environment
    return build(environment["DATABASE_URL"], connect_args=arguments, pool_pre_ping=ping, **POOL)


def endpoint(
    kind: Kind, dependency: Callable[..., Any], body: Callable[[Session, str, str], Any]
) -> Callable[..., Any]:
    """Make an endpoint in the kind's colour that passes its session and parameters to `body`."""
    marker = Depends(dependency)

    async def asynchronous(
        name: str, session: Annotated[AsyncSession, marker], value: str = ""
    ) -> Any:
        return await session.run_sync(body, name, value)

    def synchronous(name: str, session: Annotated[Session, marker], value: str = "") -> Any:
        return body(session, name, value)

    return asynchronous if kind.asynchronous else synchronous


def add(session: Session, name: str, _value: str = "") -> None:
    """Look for an entry and add it, so that a fault can hit the transaction at several points."""
    if session.get(Entry, name) is None:
        session.add(Entry(name=name))


def add_and_commit(session: Session, name: str, _value: str) -> None:
    add(session, name)
    session.commit()


def add_slowly(session: Session, name: str, _value: str) -> None:
    add(session, name)
    session.scalar(select(func.pg_sleep(0.2)))


async def add_by_handle(
    name: str, database: Annotated[AsyncDatabase, Depends(get_database_handle())]
) -> None:
    async with database.transaction() as session:
        await session.run_sync(add, name)


def add_by_sync_handle(
    name: str, database: Annotated[Database, Depends(get_database_handle())]
) -> None:
    with database.transaction() as session:
        add(session, name)


def read(session: Session, name: str, _value: str) -> str | None:
    return session.scalar(select(Register.value).where(Register.name == name))


def write(session: Session, name: str, value: str) -> None:
    session.merge(Register(name=name, value=value))


def exchange(session: Session, name: str, value: str) -> str:
    """Set the new value of `expected:new` if the old one is expected, and return the old one."""
    expected, _, new = value.partition(":")
    # Under SERIALIZABLE the server detects conflicts. Under READ COMMITTED a lock prevents them.
    locks = session.connection().get_isolation_level() != "SERIALIZABLE"
    register = session.get_one(Register, name, with_for_update=locks or None)
    found = register.value
    if found == expected:
        register.value = new
    return found


def read_pool(request: Request) -> dict[str, Any]:
    """Return this process's id and the state of its pool."""
    # psycopg's synchronous connect() leaves a timed-out attempt to the garbage collector, and a
    # server that was frozen then completes that connection.
    gc.collect()
    (database,) = installed_databases(request.app).values()
    return {"process": os.getpid(), **asdict(database.pool_status())}


def create_app() -> FastAPI:
    """Build the application for the driver that the environment names."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    kind = next(each for each in KINDS if each.id == os.environ["KIND"])
    app = FastAPI()
    engine = functools.partial(build_engine, kind)
    install_database(app, engine=engine, startup_wait=10, shutdown_timeout=5)
    install_error_handlers(app, read_only=ErrorRule("Only reading is possible for now.", 503))
    app.include_router(
        health_router(
            databases={"default": "writable"},
            max_age=MAX_AGE,
            timeout=PROBE_TIMEOUT,
            down_after=DOWN_AFTER,
        )
    )
    drain_on_sigterm(app, seconds=DRAIN)
    serializable = transactional(isolation_level="SERIALIZABLE")
    for path, dependency, work in (
        ("/transactional", transactional(), add),
        ("/own-commit", get_db(), add_and_commit),
        ("/slow", transactional(), add_slowly),
        ("/read-committed/write", transactional(), write),
        ("/read-committed/exchange", transactional(), exchange),
        ("/serializable/write", serializable, write),
        ("/serializable/exchange", serializable, exchange),
    ):
        app.post(f"{path}/{{name}}", status_code=201)(endpoint(kind, dependency, work))
    by_handle = add_by_handle if kind.asynchronous else add_by_sync_handle
    app.post("/handle/{name}", status_code=201)(by_handle)
    app.get("/read-committed/read/{name}")(endpoint(kind, reader(), read))
    app.get("/serializable/read/{name}")(endpoint(kind, serializable, read))
    app.get("/pool")(read_pool)
    return app
