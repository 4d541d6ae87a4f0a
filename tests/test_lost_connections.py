"""Rule 7: how connections that are lost before or during COMMIT are reported."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Connection, Engine, Result, select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from fastapi_sqlnative import install_database, install_error_handlers, transactional
from fastapi_sqlnative.exceptions import CommitOutcomeUnknownError, TransactionAbortedError
from tests.conftest import MakeEngine
from tests.proxy import Fault, Proxy
from tests.serving import KINDS, Item, Kind, Rows, add, make_app, route, serve, until, wait_until

ANSWERING: dict[str, Any] = {
    "answered": (CommitOutcomeUnknownError, TransactionAbortedError, SQLAlchemyError),
    "status": 500,
}
add_a = add("a")
pytestmark = pytest.mark.driver_decides


LOST = {"DBAPIError", "InterfaceError", "OperationalError"}  # SQLAlchemy's errors


@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.ANSWER_LOST], ids=lambda fault: fault.name)
def test_a_connection_lost_during_commit_leaves_the_outcome_unknown(
    kind: Kind,
    behind_proxy: Engine,
    proxy: Proxy,
    rows: Rows,
    fault: Fault,
) -> None:
    """A connection lost during COMMIT raises CommitOutcomeUnknownError, and the next request works.

    The error is the same whether the rows are stored or not.
    """
    app = make_app(behind_proxy, **ANSWERING)
    route(app, kind, "/", transactional(), add_a)
    route(app, kind, "/next", transactional(), lambda session: session.add(Item(name="b")))
    with serve(app) as served:
        proxy.fault = fault
        assert served.post("/").json() == {"error": "CommitOutcomeUnknownError"}
        assert rows.names == (["a"] if fault is Fault.ANSWER_LOST else [])
        proxy.fault = Fault.NONE
        assert served.post("/next").status_code == 201
    wait_until(lambda: rows.backends("idle in transaction%") == 0)


def kill_own_backend(session: Session) -> None:
    """Write a row, and lose the connection in the middle of the transaction."""
    session.add(Item(name="a"))
    session.flush()
    session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


def kill_and_swallow(session: Session) -> None:
    """Write a row, lose the connection, and swallow the error."""
    with pytest.raises(DBAPIError):
        kill_own_backend(session)


def kill_and_swallow_the_flush(session: Session) -> None:
    """Lose the connection before a write, and swallow both its error and that of the flush."""
    with pytest.raises(DBAPIError):
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    session.add(Item(name="a"))
    with pytest.raises(PendingRollbackError):
        session.flush()


@pytest.mark.parametrize("body", [kill_own_backend, kill_and_swallow, kill_and_swallow_the_flush])
def test_a_connection_lost_before_commit_is_not_unknown(
    kind: Kind, behind_proxy: Engine, rows: Rows, body: Callable[[Session], None]
) -> None:
    """A connection lost before COMMIT is sent stores nothing and raises a different error."""
    app = make_app(behind_proxy, **ANSWERING)
    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        response = served.post("/")
        assert response.status_code == 500
        assert response.json()["error"] != "CommitOutcomeUnknownError"
    assert rows.names == []


def test_a_lost_connection_is_unavailable_however_often_it_is_swallowed(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows
) -> None:
    """A lost connection is answered with 503, even if the endpoint swallows every error."""

    def add_and_swallow(session: Session) -> None:
        with contextlib.suppress(DBAPIError), session.begin_nested():
            session.add(Item(name="a"))
        with contextlib.suppress(PendingRollbackError):
            session.add(Item(name="b"))
            session.flush()

    app = FastAPI()
    install_database(app, engine=behind_proxy, shutdown=behind_proxy.dispose)
    install_error_handlers(app)
    route(app, kind, "/", transactional(), add_and_swallow)
    proxy.fault, proxy.at = Fault.DROPPED, b"SAVEPOINT"
    with serve(app) as served:
        assert served.post("/").status_code == 503
    assert rows.names == []


def stream_two(session: Session) -> Result[str]:
    session.add_all([Item(name="a"), Item(name="b")])
    query = select(Item.name).execution_options(stream_results=True, max_row_buffer=1)
    return session.execute(query)


@pytest.mark.parametrize("kind", KINDS[::2], indirect=True, ids=lambda kind: kind.id)
def test_a_connection_lost_while_a_stream_is_closed_is_sqlalchemys_error(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows
) -> None:
    """A connection lost while a stream is closed raises SQLAlchemy's error and stores nothing.

    The stream's cursor is closed before COMMIT is sent.
    """
    app = make_app(behind_proxy, **ANSWERING)
    route(app, kind, "/", transactional(), lambda s: len(stream_two(s).fetchmany(1)))
    proxy.fault, proxy.at = Fault.DROPPED, b"pg_cursors"
    with serve(app) as served:
        assert served.post("/").json()["error"] in LOST
    assert proxy.reached.is_set()
    assert rows.names == []


@pytest.mark.parametrize("kind", KINDS[::2], indirect=True, ids=lambda kind: kind.id)
def test_a_stream_read_to_its_end_costs_no_query(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows
) -> None:
    """A stream that was read to its end costs no query about its cursor at COMMIT."""
    app = make_app(behind_proxy, **ANSWERING)
    route(app, kind, "/", transactional(), lambda s: len(stream_two(s).all()))
    proxy.at = b"pg_cursors"
    with serve(app) as served:
        assert served.post("/").json() == 2
    assert not proxy.reached.is_set()
    assert rows.names == ["a", "b"]


def test_a_connection_that_died_in_the_pool_is_sqlalchemys_error(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A request that gets a dead pooled connection raises SQLAlchemy's error, not the driver's.

    The next request works.
    """
    app = make_app(engine, **ANSWERING)
    route(app, kind, "/", transactional(), lambda session: touch(session.connection()))
    with serve(app) as served:
        assert served.post("/").status_code == 201
        terminate_others(rows)
        wait_until(lambda: rows.backends() == 0)
        assert served.post("/").json()["error"] in LOST
        assert served.post("/").status_code == 201


def test_a_connection_lost_while_the_commit_is_prepared_is_sqlalchemys_error(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A connection lost just before COMMIT is sent raises SQLAlchemy's error and stores nothing."""

    def add_and_lose(session: Session) -> None:
        add_a(session)
        session.flush()
        touch(session.connection())  # used directly, so the server is asked about the transaction
        terminate_others(rows)

    app = make_app(engine, **ANSWERING)
    route(app, kind, "/", transactional(), add_and_lose)
    with serve(app) as served:
        assert served.post("/").json()["error"] in LOST
    assert rows.names == []


impatient = pytest.mark.parametrize("kind", KINDS[1:2], indirect=True, ids=lambda kind: kind.id)


@impatient
def test_a_driver_that_waits_no_longer_is_a_statement_timeout(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """asyncpg's `command_timeout` is answered like any statement timeout."""
    engine = make_engine(pool_size=1, max_overflow=0, connect_args={"command_timeout": 2})
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    install_error_handlers(app)
    route(app, kind, "/slow", transactional(), sleep_long)
    route(app, kind, "/", transactional(), add_a)
    with serve(app) as served:
        assert served.post("/slow").status_code == 504
        assert served.post("/").status_code == 201
    assert rows.names == ["a"]


@impatient
def test_a_driver_that_waits_no_longer_for_commit_leaves_the_outcome_unknown(
    kind: Kind, make_engine: MakeEngine, proxy: Proxy, rows: Rows
) -> None:
    """If `command_timeout` ends during COMMIT, the request raises CommitOutcomeUnknownError."""
    arguments = {"host": "127.0.0.1", "port": proxy.own_port, "ssl": False, "command_timeout": 2}
    engine = make_engine(pool_size=1, max_overflow=0, connect_args=arguments)
    app = make_app(engine, **ANSWERING)
    route(app, kind, "/", transactional(), add_a)
    with serve(app) as served:
        proxy.fault = Fault.STALLED
        assert served.post("/").json() == {"error": "CommitOutcomeUnknownError"}
        proxy.go_on.set()
        wait_until(lambda: rows.backends("idle in transaction%") == 0)


def touch(connection: Connection) -> None:
    connection.exec_driver_sql("SELECT 1")


def terminate_others(rows: Rows) -> None:
    rows.connection.execute(
        "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


def sleep_long(session: Session) -> None:
    session.execute(text("SELECT pg_sleep(10)"))


@pytest.mark.parametrize("kind", KINDS[:2], indirect=True, ids=lambda kind: kind.id)
def test_a_query_that_was_given_up_is_not_committed_around(
    kind: Kind, behind_proxy: Engine, rows: Rows
) -> None:
    """An endpoint that times a query out and goes on cannot commit what it wrote before."""
    app = make_app(behind_proxy, **ANSWERING)

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(transactional())]) -> None:
        session.add(Item(name="a"))
        await session.flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await session.run_sync(sleep_long)

    with serve(app) as served:
        assert served.post("/").json() == {"error": "TransactionAbortedError"}
    assert rows.names == []


@pytest.mark.parametrize("kind", KINDS[:2], indirect=True, ids=lambda kind: kind.id)
def test_a_session_in_use_at_the_commit_poisons_nothing(
    kind: Kind, behind_proxy: Engine, rows: Rows
) -> None:
    """A task that still runs a query at the end of a request does not harm the next request."""
    app = make_app(behind_proxy, **ANSWERING)
    left: list[object] = []

    @app.post("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(transactional())]) -> None:
        session.add(Item(name="a"))
        await session.flush()
        # The query ends by itself: psycopg waits for it before the rollback, as does the request.
        left.append(asyncio.create_task(session.execute(text("SELECT pg_sleep(0.3)"))))
        await until(lambda: rows.backends("active") == 1)

    route(app, kind, "/next", transactional(), lambda session: session.add(Item(name="b")))
    with serve(app) as served:
        served.client.post("/")
        assert served.client.post("/next").status_code == 201
        wait_until(lambda: rows.backends("idle in transaction%") == 0)
    assert "b" in rows.names
