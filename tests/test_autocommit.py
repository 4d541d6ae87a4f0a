"""AUTOCOMMIT engines: `get_db` works, and a transaction raises an error that names the fix."""

import itertools
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    get_db,
    install_database,
    reader,
    transactional,
)
from fastapi_sqlnative.exceptions import DatabaseDependencyError, TransactionOptionsError
from tests.conftest import MakeEngine
from tests.in_process import application, ask, asking, run_in_transaction, running
from tests.serving import SQLITE, Item, Kind, Rows, items, route, using

pytestmark = pytest.mark.anyio

Body = Callable[[Session], Any]


def flush(session: Session) -> None:
    session.add(Item(name="stored"))
    session.flush()


BODIES: dict[str, Body] = {
    "core": lambda session: session.execute(insert(items).values(name="stored")).close(),
    "text": lambda session: session.execute(
        text("INSERT INTO item (name) VALUES ('stored')")
    ).close(),
    "flush": flush,
}


def autocommit(make_engine: MakeEngine, how: str) -> Any:
    """Build an engine in AUTOCOMMIT, in one of SQLAlchemy's ways."""
    if how == "create_engine":
        return make_engine(isolation_level="AUTOCOMMIT")
    if how == "engine's options":
        return make_engine(execution_options={"isolation_level": "AUTOCOMMIT"})
    return make_engine().execution_options(isolation_level="AUTOCOMMIT")


HOW = ["create_engine", "engine's options", "execution_options()"]


@pytest.mark.parametrize("how", HOW)
async def test_what_is_stored_at_once_is_not_forgotten(
    kind: Kind, make_engine: MakeEngine, rows: Rows, how: str, subtests: pytest.Subtests
) -> None:
    """Through get_db, an AUTOCOMMIT engine stores each statement at once, without a commit."""

    def ended(statement: str, end: str | None) -> Body:
        def body(session: Session) -> None:
            BODIES[statement](session)
            if end is not None:
                getattr(session, end)()

        return body

    async with asking(autocommit(make_engine, how), kind, get_db()) as request:
        for statement, end in itertools.product(BODIES, [None, "close", "commit"]):
            rows.clear()
            with subtests.test(f"{statement}, {end}"):
                assert await request(ended(statement, end)) == 201
                assert rows.names == ["stored"]


def in_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        BODIES["core"](session)


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
@pytest.mark.parametrize("body", [*BODIES.values(), in_a_savepoint], ids=[*BODIES, "savepoint"])
async def test_so_it_is_on_sqlite(kind: Kind, body: Body, tmp_path: Path) -> None:
    """On SQLite in AUTOCOMMIT, writes through get_db are stored without a commit."""
    create = create_async_engine if kind.asynchronous else create_engine
    url = f"sqlite+{kind.driver}:///{tmp_path}/file.db"
    outside = create_engine(f"sqlite:///{tmp_path}/file.db")
    with outside.begin() as connection:
        connection.execute(text("CREATE TABLE item (id integer PRIMARY KEY, name text, position)"))
    engine = create(url, isolation_level="AUTOCOMMIT")
    assert await ask(engine, kind, get_db(), body) == 201
    with outside.connect() as connection:
        assert connection.scalars(text("SELECT name FROM item")).all() == ["stored"]
    outside.dispose()


class Autocommitting(sqlite3.Connection):
    """A connection made with `autocommit=True`, which Python's driver accepts from 3.12 on."""

    autocommit = True


async def test_a_sqlite_driver_that_autocommits_is_refused() -> None:
    """A transaction over a SQLite driver with `autocommit=True` raises TransactionOptionsError.

    The driver's commit does nothing, so a savepoint would seem to succeed and store no rows.
    """
    options = {"factory": Autocommitting, "check_same_thread": False}
    engine = create_engine("sqlite://", connect_args=options, poolclass=StaticPool)
    with pytest.raises(TransactionOptionsError):
        await ask(engine, SQLITE[0], transactional(), in_a_savepoint)


@pytest.mark.parametrize("how", HOW)
async def test_a_transaction_is_refused(
    kind: Kind, make_engine: MakeEngine, rows: Rows, how: str
) -> None:
    """`transactional` on an AUTOCOMMIT engine raises an error that points to `get_db`.

    Start-up fails if AUTOCOMMIT can be detected then. Otherwise the first use fails and stores
    nothing.
    """
    app = application(autocommit(make_engine, how), kind, transactional(), BODIES["core"])
    with pytest.raises((DatabaseDependencyError, TransactionOptionsError)) as caught:
        async with running(app) as client:
            await client.post("/")
    assert "is in AUTOCOMMIT" in str(caught.value)
    assert "get_db('default')" in str(caught.value)
    known = DatabaseDependencyError if how != "create_engine" else TransactionOptionsError
    assert isinstance(caught.value, known)
    assert rows.names == []


@pytest.mark.parametrize("how", HOW)
async def test_a_reader_is_not_refused(kind: Kind, make_engine: MakeEngine, how: str) -> None:
    """A reader works on an AUTOCOMMIT engine, because it is in AUTOCOMMIT itself."""
    read: Body = lambda session: session.execute(text("SELECT 1")).close()  # noqa: E731
    assert await ask(autocommit(make_engine, how), kind, reader(), read) == 201


async def test_a_reader_has_no_two_phases(kind: Kind, engine: Any) -> None:
    """A reader works with `twophase=True`, because it has no transaction.

    Two phases are for the sessions that commit.
    """
    read: Body = lambda session: session.execute(text("SELECT 1")).close()  # noqa: E731
    assert await ask(engine, kind, reader(), read, session_options={"twophase": True}) == 201


async def test_a_connection_of_its_own_choice_is_named(kind: Kind, engine: Any, rows: Rows) -> None:
    """A session that takes an AUTOCOMMIT connection fails under transactional, not under get_db."""

    def body(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        BODIES["core"](session)

    with pytest.raises(TransactionOptionsError, match="engine or connection is in AUTOCOMMIT"):
        await ask(engine, kind, transactional(), body)
    assert rows.names == []
    assert await ask(engine, kind, get_db(), body) == 201
    assert rows.names == ["stored"]


async def test_the_handle_s_transaction_is_refused(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """On an AUTOCOMMIT engine, both transactions of a handle raise, and the work stores nothing."""
    engine = make_engine(isolation_level="AUTOCOMMIT")
    refused = pytest.raises(TransactionOptionsError, match="is in AUTOCOMMIT")
    if isinstance(engine, AsyncEngine):
        with refused:
            async with AsyncDatabase(engine).transaction() as session:
                await session.run_sync(BODIES["core"])
    else:
        with refused, Database(engine).transaction() as blocking:
            BODIES["core"](blocking)
    with pytest.raises(TransactionOptionsError, match="is in AUTOCOMMIT"):
        await run_in_transaction(engine, BODIES["core"])
    assert rows.names == []


async def test_a_session_that_was_read_with_is_refused_where_it_is_enlisted(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """On an AUTOCOMMIT engine, `transactional` after a get_db read fails before any write."""
    app, engine = FastAPI(), make_engine(isolation_level="AUTOCOMMIT")
    install_database(app, engine=engine, shutdown=engine.dispose)
    reading = using(kind, Depends(get_db()), lambda s: s.execute(text("SELECT 1")).close())
    route(app, kind, "/", transactional(), BODIES["core"], dependencies=[Depends(reading)])
    with pytest.raises(TransactionOptionsError):
        async with running(app) as client:
            await client.post("/")
    assert rows.names == []
