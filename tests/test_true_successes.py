"""Rules 5 and 6, the reverse: work that is stored, unsent or harmless needs no commit."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Engine, Sequence, create_engine, func, insert, select, text
from sqlalchemy.exc import DBAPIError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import (
    Mapped,
    Session,
    column_property,
    foreign,
    query_expression,
    registry,
    relationship,
    with_expression,
)

from fastapi_sqlnative import AsyncDatabase, get_db, install_database, transactional
from fastapi_sqlnative.exceptions import UncommittedChangesError
from tests.in_process import ask, running
from tests.serving import ASYNCPG, KINDS, PSYCOPG, SQLITE, Item, Kind, Rows, items

pytestmark = pytest.mark.anyio

Body = Callable[[Session], Any]


# -- work that is stored already ---------------------------------------------------------------


def commit_the_connection(session: Session) -> None:
    connection = session.connection()
    connection.execute(insert(items).values(name="stored"))
    connection.commit()


def commit_the_transaction(session: Session) -> None:
    session.execute(text("INSERT INTO item (name) VALUES ('stored')"))
    transaction = session.get_transaction()
    assert transaction is not None
    transaction.commit()


def commit_in_a_block(session: Session) -> None:
    with session.begin():
        session.execute(text("INSERT INTO item (name) VALUES ('stored')"))
    session.execute(select(items)).all()


@pytest.mark.parametrize(
    ("dependency", "body"),
    [
        (get_db(), commit_the_connection),
        (get_db(), commit_the_transaction),
        (get_db(), commit_in_a_block),
        (transactional(), commit_the_transaction),
        (transactional(), commit_in_a_block),
    ],
    ids=["connection", "transaction", "block", "enlisted transaction", "enlisted block"],
)
async def test_what_the_application_has_stored_is_not_forgotten(
    kind: Kind, engine: Engine, rows: Rows, dependency: Any, body: Body
) -> None:
    """A commit of the connection, of the transaction or by a block counts as a commit."""
    assert await ask(engine, kind, dependency, body) == 201
    assert rows.names == ["stored"]


async def test_a_transaction_is_one_object(kind: Kind, engine: Engine, rows: Rows) -> None:
    """begin() and get_transaction() return the same object, as SQLAlchemy's do."""

    def body(session: Session) -> None:
        assert session.begin() is session.get_transaction() is session.get_transaction()

    assert await ask(engine, kind, get_db(), body) == 201


async def test_an_ended_transaction_hands_out_no_connection(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """An ended transaction raises SQLAlchemy's own error and begins no new transaction."""

    def body(session: Session) -> None:
        transaction = session.begin()
        transaction.commit()
        with pytest.raises(ResourceClosedError):
            transaction.connection(Item.__mapper__)
        assert not session.in_transaction()

    assert await ask(engine, kind, get_db(), body) == 201


def detach(session: Session) -> None:
    """Write before and after detaching the connection from its pool.

    The pool then no longer has the driver's connection.
    """
    session.execute(text("INSERT INTO item (name) VALUES ('stored')"))
    session.connection().detach()
    with session.begin_nested():
        session.connection().execute(text("INSERT INTO item (name) VALUES ('too')"))


@pytest.mark.driver_decides
@pytest.mark.parametrize("kind", [ASYNCPG, PSYCOPG], ids=lambda kind: kind.id, indirect=True)
async def test_a_detached_connection_is_committed(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A connection that was detached from its pool is committed like any other.

    Psycopg is tested as a sync driver only, because SQLAlchemy leaves an async connection open.
    """
    assert await ask(engine, kind, transactional(), detach) == 201
    assert rows.names == ["stored", "too"]


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_a_detached_connection_is_committed_on_sqlite(kind: Kind, tmp_path: Path) -> None:
    """A detached connection to SQLite is committed like any other.

    It is asked what it has changed, and whether it has begun a transaction.
    """
    file = tmp_path / "db"
    make = create_async_engine if kind.asynchronous else create_engine
    with contextlib.closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE item (name text)")
        engine: Any = make(f"sqlite+{kind.driver}:///{file}")
        assert await ask(engine, kind, transactional(), detach) == 201
        assert other.execute("SELECT name FROM item").fetchall() == [("stored",), ("too",)]


# -- attributes that are not stored in a table -------------------------------------------------


class Shown:
    """A row with attributes that no flush sends."""

    id: Mapped[int]
    name: Mapped[str]
    shown: Mapped[str]
    upper: Mapped[str]
    same: Mapped[list["Shown"]]
    parts: Mapped[list["Shown"]]


registry().map_imperatively(
    Shown,
    items,
    properties={
        "shown": query_expression(),
        "upper": column_property(func.upper(items.c.name)),
        "same": relationship(
            lambda: Shown,
            primaryjoin=items.c.id == items.c.position,
            foreign_keys=[items.c.position],
            remote_side=[items.c.position],
            viewonly=True,
            uselist=True,
        ),
        "parts": relationship(
            lambda: Shown,
            primaryjoin=items.c.id == foreign(items.c.position),
            remote_side=[items.c.position],
            cascade="",
            uselist=True,
        ),
    },
)


def set_to(attribute: str, value: Callable[[Any], Any]) -> Body:
    def body(session: Session) -> None:
        query = select(Shown).options(with_expression(Shown.shown, items.c.name))
        row = session.scalars(query).one()
        setattr(row, attribute, value(row))

    return body


@pytest.mark.parametrize(
    "body",
    [
        set_to("shown", lambda _: "something"),
        set_to("upper", lambda _: "something"),
        set_to("same", lambda row: [row]),
        set_to("parts", lambda _: [Shown()]),
        set_to("name", lambda row: row.name),
    ],
    ids=[
        "query_expression",
        "column_property",
        "viewonly",
        "an object outside the session",
        "the same value",
    ],
)
async def test_what_no_flush_sends_is_not_forgotten(
    kind: Kind, engine: Engine, rows: Rows, body: Body
) -> None:
    """A change to an attribute that is not stored in a table needs no commit."""
    rows.add("there")
    assert await ask(engine, kind, get_db(), body) == 201


async def test_what_a_flush_sends_for_a_relationship_is_forgotten(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A changed relationship to another row of the session needs a commit."""
    rows.add("there")
    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), set_to("parts", lambda row: [row]))


async def test_an_unchanged_object_after_a_commit(kind: Kind, engine: Engine, rows: Rows) -> None:
    """An unchanged object after a commit does not fail the request.

    A flush connects even for such an object, so the end of the request may have to wait.
    """

    def body(session: Session) -> None:
        row = Item(name="stored")
        session.add(row)
        session.commit()
        row.name = "stored"

    assert await ask(engine, kind, transactional(), body) == 201
    assert rows.names == ["stored"]


# -- handled failures that change nothing ------------------------------------------------------


def failing(statement: Any) -> Body:
    def body(session: Session) -> None:
        session.execute(text("SELECT count(*), max(name) FROM item")).all()
        with pytest.raises(DBAPIError):
            session.execute(statement)

    return body


@pytest.mark.driver_decides
@pytest.mark.parametrize(
    ("dependency", "statement"),
    [
        (transactional(), select(items).with_for_update(nowait=True)),
        (transactional(), text("SELECT * FROM item FOR UPDATE NOWAIT")),
        (transactional(), text("SELECT 1 / 0")),
        (transactional(read_only=True), text("SELECT 1 / 0")),
        (transactional(read_only=True), insert(items).values(name="refused")),
    ],
    ids=["nowait", "nowait in text", "division", "read only", "write in read only"],
)
async def test_a_failure_where_nothing_was_written_is_no_failure(
    kind: Kind, engine: Engine, rows: Rows, dependency: Any, statement: Any
) -> None:
    """A handled failure in a transaction that has only read does not fail the request."""
    rows.add("there")
    with rows.connection.transaction():
        rows.connection.execute("SELECT * FROM item FOR UPDATE")
        assert await ask(engine, kind, dependency, failing(statement)) == 201
    assert rows.names == ["there"]


KNOWN = [
    "random()",
    "set_config('app.tenant', 'acme', true)",
    "tstzrange(now(), NULL)",
    "st_asewkb('point')",  # GeoAlchemy2 puts it around each column
]
POSTGIS = "CREATE OR REPLACE FUNCTION st_asewkb(text) RETURNS text LANGUAGE sql AS 'SELECT $1'"


@pytest.mark.parametrize("read", KNOWN)
async def test_functions_of_the_server_s_own_are_reads(
    kind: Kind, engine: Engine, rows: Rows, read: str
) -> None:
    """Known server functions are reads, so a failed insert after them does not fail the request."""
    rows.add("there")

    def body(session: Session) -> None:
        session.execute(text(f"SELECT {read}")).close()
        with pytest.raises(DBAPIError):
            session.execute(insert(items).values(id=1, name="refused"))

    rows.connection.execute(f"UPDATE item SET id = 1; {POSTGIS}")
    assert await ask(engine, kind, transactional(), body) == 201
    assert rows.names == ["there"]


# -- a connection that is lost with nothing to store -------------------------------------------


async def time_out(session: AsyncSession) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await session.execute(text("SELECT pg_sleep(60)"))


async def time_out_in_a_savepoint(session: AsyncSession) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), session.begin_nested():
            await session.execute(text("SELECT pg_sleep(60)"))


@pytest.mark.parametrize("kind", KINDS[:2], indirect=True, ids=lambda kind: kind.id)
@pytest.mark.parametrize("read", [time_out, time_out_in_a_savepoint])
@pytest.mark.parametrize("read_only", [False, True])
async def test_a_read_that_takes_too_long_has_another_answer(
    kind: Kind, engine: AsyncEngine, read: Callable[[AsyncSession], Any], read_only: bool
) -> None:
    """A cancelled read does not fail the request or transaction around it."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    dependency = transactional(read_only=read_only)

    @app.get("/")
    async def read_or_not(session: Annotated[AsyncSession, Depends(dependency)]) -> str:
        await read(session)
        return "nothing yet"

    async with running(app) as client:
        assert (await client.get("/")).json() == "nothing yet"
        async with AsyncDatabase(engine).transaction(read_only=read_only) as session:
            await read(session)


async def test_a_read_that_is_lost_may_be_answered(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A transaction that has only read does not fail the request when its connection is lost."""

    def body(session: Session) -> None:
        rows.lose(session)
        with pytest.raises(DBAPIError):
            session.execute(select(items))

    assert await ask(engine, kind, transactional(), body) == 201


# -- what SQLAlchemy allows without this package -----------------------------------------------


def set_the_level(session: Session) -> None:
    session.connection().execute(text("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))


@pytest.mark.driver_decides
@pytest.mark.parametrize(
    "body",
    [set_the_level, lambda session: session.scalar(Sequence("item_id_seq"))],
    ids=["isolation level", "sequence"],
)
async def test_the_first_thing_that_a_transaction_does(
    kind: Kind, engine: Engine, rows: Rows, body: Body
) -> None:
    """The package sends nothing that would keep a transaction's first statement from working."""
    assert await ask(engine, kind, transactional(), body) == 201
