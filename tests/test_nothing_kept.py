"""Rule 10: nothing grows with requests, statements, engines, sessions or applications."""

import gc
import weakref
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy import Engine, StaticPool, create_engine, event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from fastapi_sqlnative import Database, get_db, health_router, install_database, transactional
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.exceptions import SessionFinishedError
from tests.in_process import (
    application,
    ask,
    async_sqlite,
    dispose,
    is_kept,
    running,
    session_class,
)
from tests.serving import SQLITE, Item, Kind, Rows, items, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("collecting")]

sqlite_kinds = pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)


def in_memory(kind: Kind) -> Any:
    if kind.asynchronous:
        return create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
    options = {"check_same_thread": False}
    return create_engine("sqlite://", poolclass=StaticPool, connect_args=options)


def left(references: list["weakref.ref[Any]"]) -> int:
    """Count the objects that are still alive."""
    gc.collect()
    return sum(each() is not None for each in references)


async def all_gone(references: list["weakref.ref[Any]"]) -> None:
    """Wait until no object is alive.

    The thread that served a request may hold some for longer.
    """
    await until(lambda: left(references) == 0)


# -- engines -----------------------------------------------------------------------------------


@sqlite_kinds
async def test_an_engine_that_is_gone_leaves_no_dialect(kind: Kind) -> None:
    """A session class with an engine for each tenant keeps none of their dialects alive."""
    tenants: list[Any] = []

    class Tenants(Session):
        def get_bind(self, *_args: Any, **_options: Any) -> Any:
            return tenants[-1]

    dialects: list[weakref.ref[Any]] = []

    def write(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text)"))
        session.execute(text("INSERT INTO item VALUES ('a')"))

    options = {"session_options": session_class(kind, Tenants)}
    app = application(in_memory(kind), kind, transactional(), write, **options)
    async with running(app) as client:
        for _ in range(10):
            engine = in_memory(kind)
            inner = sync_engine(engine)
            tenants.append(inner)
            dialects.append(weakref.ref(inner.dialect))
            assert (await client.post("/")).status_code == 201
            await dispose(engine)
            tenants.clear()
            del engine, inner
        await all_gone(dialects)


def test_a_handle_that_is_gone_leaves_another_ones_error_alone() -> None:
    """Handles that are deleted during an error leave the engine's listeners as they are.

    Handles on one engine share its listeners. Removing a listener while SQLAlchemy calls them all
    would raise a RuntimeError.
    """
    engine = create_engine("sqlite://")
    others: list[Database] = []
    event.listen(engine.dialect, "handle_error", lambda _: others.clear())
    kept = Database(engine)
    listeners = len([*engine.dialect.dispatch.handle_error])
    others.extend(Database(engine) for _ in range(3))
    with pytest.raises(OperationalError, match="no_such_column"), kept.session() as session:
        session.execute(text("SELECT no_such_column"))
    assert others == []
    assert len([*engine.dialect.dispatch.handle_error]) == listeners
    engine.dispose()


def test_a_listener_may_be_added_while_a_handle_looks_for_ours() -> None:
    """A listener may be added while a handle looks for the package's own listener.

    This happens when handles and sessions use an engine for the first time in several threads.
    """
    engine = create_engine("sqlite://")

    class Listener:
        """A listener that adds another one whenever it is looked at, as another thread might."""

        def __call__(self, _context: object) -> None: ...

        def __getattribute__(self, name: str) -> Any:
            event.listen(engine.dialect, "handle_error", lambda _: None)
            return super().__getattribute__(name)

    event.listen(engine.dialect, "handle_error", Listener())
    with Database(engine).session() as session:
        assert session.scalar(text("SELECT 1")) == 1
    engine.dispose()


# -- within one session ------------------------------------------------------------------------


@pytest.mark.driver_decides
async def test_results_that_were_read_are_let_go(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A session that reads many streams to their end keeps none of their results."""
    rows.add("a")
    results: list[weakref.ref[Any]] = []
    found: list[int] = []

    def read(session: Session) -> None:
        options = {"stream_results": True, "yield_per": 10}
        result: Any = session.execute(select(items), execution_options=options)
        assert len(result.all()) == 1
        results.append(weakref.ref(result.context))

    def body(session: Session) -> None:
        for _ in range(20):
            read(session)
        found.append(left(results))

    assert await ask(engine, kind, get_db(), body) == 201
    assert found[0] <= 1
    await all_gone(results)


async def test_savepoints_that_have_ended_are_let_go(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A session that uses many savepoints keeps none of them."""
    transactions: list[weakref.ref[Any]] = []
    found: list[int] = []

    def write(session: Session, name: str) -> None:
        with session.begin_nested() as savepoint:
            session.add(Item(name=name))
        transactions.append(weakref.ref(savepoint))

    def body(session: Session) -> None:
        for number in range(20):
            write(session, str(number))
        found.append(left(transactions))

    assert await ask(engine, kind, transactional(), body) == 201
    assert found[0] <= 1
    await all_gone(transactions)


async def test_a_session_that_has_ended_is_let_go(kind: Kind, engine: Engine, rows: Rows) -> None:
    """After a request succeeds or fails, nothing keeps its session, row or connection alive."""
    kept: list[weakref.ref[Any]] = []

    def body(session: Session) -> None:
        row = Item(name="a")
        session.add(row)
        session.flush()
        kept.extend(map(weakref.ref, (session, row, session.connection())))
        if len(kept) > 3:
            raise ZeroDivisionError

    async with running(application(engine, kind, transactional(), body)) as client:
        assert (await client.post("/")).status_code == 201
        await all_gone(kept)
        rows.connection.execute("TRUNCATE item")
        with pytest.raises(ZeroDivisionError):
            await client.post("/")
        await all_gone(kept)


# -- applications ------------------------------------------------------------------------------

shared_router = APIRouter()
shared_health = health_router(timeout=20)


@shared_router.get("/")
async def read(session: Annotated[AsyncSession, Depends(get_db())]) -> int:
    return int(await session.scalar(text("SELECT 7")) or 0)


async def serve_once(app: FastAPI) -> None:
    install_database(app, engine=async_sqlite)
    app.include_router(shared_router)
    app.include_router(shared_health)
    async with running(app) as client:
        assert (await client.get("/")).json() == 7
        assert (await client.get("/health/ready")).status_code == 200


async def test_a_router_of_the_module_keeps_no_application() -> None:
    """A router and a health router of a module keep no application alive that used them."""
    for _ in range(5):
        assert not await is_kept(serve_once)


# -- other requests' rows ----------------------------------------------------------------------


@sqlite_kinds
@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "streaming"])
async def test_a_half_read_result_shows_nobody_elses_rows(kind: Kind, streaming: bool) -> None:
    """On SQLite, a result that a request left half read raises SessionFinishedError afterwards.

    A result that is buffered in full returns the rest of its own rows.
    """
    results: list[Any] = []

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE IF NOT EXISTS item (name text)"))
        session.execute(text("DELETE FROM item"))
        for number in range(3):
            session.execute(text(f"INSERT INTO item VALUES ('{len(results)}.{number}')"))
        session.commit()
        query = text("SELECT name FROM item")
        result = session.execute(query, execution_options={"stream_results": streaming})
        results.append(result)
        assert result.fetchone() == (f"{len(results) - 1}.0",)

    async with running(application(in_memory(kind), kind, get_db(), body)) as client:
        for _ in range(2):
            assert (await client.post("/")).status_code == 201
        buffered = kind.asynchronous and not streaming
        if buffered:
            assert results[0].all() == [("0.1",), ("0.2",)]
        else:
            with pytest.raises(SessionFinishedError):
                results[0].fetchone()
