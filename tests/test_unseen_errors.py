"""Rule 5: a swallowed error prevents the commit even if no method of the session raised it."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, func, insert, select, text
from sqlalchemy.exc import (
    DBAPIError,
    IllegalStateChangeError,
    InvalidRequestError,
    PendingRollbackError,
)
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from fastapi_sqlnative import transactional
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.exceptions import TransactionAbortedError
from tests.in_process import ask, session_class
from tests.serving import Item, Kind, Rows, copy, items, of_the_transaction

pytestmark = [pytest.mark.anyio, pytest.mark.driver_decides]

Body = Callable[[Session], Any]
FAILING = text("SELECT 1 / 0")


def swallow(fail: Callable[[], Any]) -> None:
    """Call a function that must fail on the server, and ignore its error."""
    with pytest.raises(Exception, match=r"division by zero|duplicate key|invalid input"):
        fail()


def write(session: Session) -> None:
    session.execute(insert(items).values(name="lost"))


# -- on connections and results that the session has handed out --------------------------------


def in_a_raw_cursor(session: Session) -> None:
    cursor = session.connection().connection.cursor()
    swallow(lambda: cursor.execute("SELECT 1 / 0"))
    cursor.close()


def over_what_the_transaction_has(session: Session) -> None:
    [connection] = of_the_transaction(session)
    cursor = connection.connection.cursor()
    swallow(lambda: cursor.execute("SELECT 1 / 0"))
    cursor.close()


def over_the_connection(session: Session) -> None:
    swallow(lambda: session.connection().execute(FAILING))


def in_a_stream(session: Session) -> None:
    query = text("SELECT 1 / (500 - n) FROM generate_series(1, 1000) AS n")
    result = session.execute(query, execution_options={"stream_results": True})
    result.fetchmany(3)
    swallow(result.all)


def in_a_copy(session: Session) -> None:
    swallow(lambda: copy(session, "lost"))


HANDED_OUT: list[Body] = [
    in_a_raw_cursor,
    over_what_the_transaction_has,
    over_the_connection,
    in_a_stream,
    in_a_copy,
]


@pytest.mark.parametrize("fail", HANDED_OUT)
async def test_an_error_over_what_was_handed_out_counts(
    kind: Kind, engine: Engine, rows: Rows, fail: Body
) -> None:
    """A swallowed error on a connection, cursor or stream or in COPY fails the commit."""

    def body(session: Session) -> None:
        write(session)
        fail(session)

    with pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), body)
    assert rows.names == []


def expression(session: Session) -> None:
    session.scalars(select(Item)).one().position = func.coalesce(items.c.position, 0) + 1
    session.flush()


def notify(session: Session) -> None:
    session.execute(text("NOTIFY news, 'lost'"))


@pytest.mark.parametrize("work", [expression, notify])
async def test_work_that_leaves_no_trace_counts(
    kind: Kind, engine: Engine, rows: Rows, work: Body
) -> None:
    """A request fails if a swallowed error loses a flushed SQL expression or a notification."""
    rows.add("there")

    def body(session: Session) -> None:
        work(session)
        swallow(lambda: session.execute(FAILING))

    with pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), body)


# -- in the application's listeners ------------------------------------------------------------


@contextmanager
def listening(target: Any, name: str, listener: Callable[..., Any]) -> Generator[None]:
    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def execute_and_hide(session: Session, *_: object) -> None:
    swallow(lambda: session.execute(FAILING))


def connect_and_hide(session: Session, *_: object) -> None:
    swallow(lambda: session.connection().execute(FAILING))


def touch(session: Session) -> None:
    """Change a row and restore its value, so that a flush has nothing to send."""
    row = session.scalars(select(Item)).one()
    row.name, row.name = "changed", row.name


# A listener has the same effect wherever it is registered.
@pytest.mark.parametrize(
    ("listener", "of_the_class"),
    [(execute_and_hide, False), (execute_and_hide, True), (connect_and_hide, False)],
    ids=["executes", "executes, own class", "connects"],
)
@pytest.mark.parametrize(
    ("name", "prepare"),
    [
        ("before_commit", touch),
        ("before_flush", touch),
        ("after_flush", lambda session: session.add(Item(name="lost too"))),
    ],
    ids=["before_commit", "before_flush", "after_flush"],
)
async def test_an_error_in_a_session_event_counts(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    of_the_class: bool,
    name: str,
    prepare: Body,
    listener: Callable[..., None],
) -> None:
    """A session listener that swallows an error, such as an audit log's, prevents the commit."""

    class Audited(Session): ...

    def body(session: Session) -> None:
        write(session)
        prepare(session)

    target = Audited if of_the_class else Session
    options = session_class(kind, Audited)
    with listening(target, name, listener), pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), body, session_options=options)
    assert rows.names == []


def listen_at_commit(session: Session) -> None:
    """Swallow an error in the engine's commit event, which runs after all session listeners."""

    def hide(connection: Connection) -> None:
        swallow(lambda: connection.execute(FAILING))

    event.listen(session.get_bind(), "commit", hide, once=True)


class Adding(Session):
    """A session class whose listener adds another one, which runs after the existing ones."""


@event.listens_for(Adding, "before_commit")
def _listen_last(session: Session) -> None:
    event.listen(session, "before_commit", session.info["last"])


def flush_and_hide(session: Session) -> None:
    session.add(Item(name="lost"))
    swallow(session.flush)


def listening_last(listener: Body) -> Body:
    return lambda session: session.info.update(last=listener)


def in_an_open_savepoint(session: Session) -> None:
    session.connection().begin_nested()
    over_the_connection(session)


def flushing_again(fail: Body) -> Body:
    """Return a body whose last flush makes another one necessary, in which `fail` is called."""

    def again(session: Session, _: object) -> None:
        session.add(Item(name="last"))
        event.listen(session, "after_flush", lambda inner, _: fail(inner), once=True)

    def prepare(session: Session) -> None:
        event.listen(session, "after_flush_postexec", again, once=True)
        session.add(Item(name="first"))

    return prepare


@pytest.mark.parametrize(
    ("prepare", "class_"),
    [
        (listen_at_commit, Session),
        (listening_last(connect_and_hide), Adding),
        (listening_last(flush_and_hide), Adding),
        (flushing_again(in_a_raw_cursor), Session),
        (flushing_again(in_an_open_savepoint), Session),
    ],
    ids=["engine", "added", "added and flushing", "raw in a flush", "savepoint in a flush"],
)
async def test_an_error_between_the_last_look_and_commit_counts(
    kind: Kind, engine: Engine, rows: Rows, prepare: Body, class_: type[Session]
) -> None:
    """A listener that swallows an error right before COMMIT prevents the commit."""

    def body(session: Session) -> None:
        write(session)
        prepare(session)

    options = session_class(kind, class_)
    # After a failed flush, SQLAlchemy itself raises "This transaction is inactive".
    with pytest.raises((TransactionAbortedError, InvalidRequestError)):
        await ask(engine, kind, transactional(), body, session_options=options)
    assert rows.names == []


async def test_an_error_of_a_flush_after_the_last_look_is_its_own(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """An error in a flush that a listener causes after the last check is raised as usual."""
    prepare = flushing_again(lambda session: session.execute(FAILING))
    with pytest.raises(DBAPIError, match="division by zero") as caught:
        await ask(engine, kind, transactional(), prepare)
    assert not caught.value.connection_invalidated
    assert rows.names == []


async def test_a_connection_lost_between_the_last_look_and_commit_counts(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """An engine listener that swallows the loss of the connection prevents the commit."""

    def lose(connection: Connection) -> None:
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        rows.connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        with pytest.raises(DBAPIError):
            connection.execute(text("SELECT 1"))

    event.listen(sync_engine(engine), "commit", lose)
    with pytest.raises(PendingRollbackError):
        await ask(engine, kind, transactional(), write)
    assert rows.names == []


async def test_a_savepoint_between_the_last_look_and_commit_is_no_failure(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """An error that an engine listener undoes right before COMMIT does not fail the request."""

    def undo(connection: Connection) -> None:
        with suppress(DBAPIError), connection.begin_nested():
            connection.execute(FAILING)

    event.listen(sync_engine(engine), "commit", undo)
    assert await ask(engine, kind, transactional(), write) == 201
    assert rows.names == ["lost"]


async def test_an_error_in_a_mapper_event_counts(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A mapper listener that swallows an error on its connection prevents the commit."""

    def hide(_mapper: object, connection: Any, _row: object) -> None:
        swallow(lambda: connection.execute(FAILING))

    def body(session: Session) -> None:
        session.add(Item(name="lost"))

    with listening(Item, "after_insert", hide), pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), body)
    assert rows.names == []


# -- behind listeners that change the driver's error -------------------------------------------


class ServiceError(Exception):
    """The exception that an application raises instead of a database error."""


def raise_another(_context: object) -> None:
    raise ServiceError


def return_another(_context: object) -> Exception:
    return ServiceError()


def fail_at_once(session: Session) -> None:
    session.execute(FAILING)


def fail_in_a_stream(session: Session) -> None:
    statement = text("SELECT 1 / (300 - n) FROM generate_series(1, 5000) n")
    session.execute(statement, execution_options={"yield_per": 100}).all()


@pytest.mark.parametrize("fail", [fail_at_once, fail_in_a_stream])
@pytest.mark.parametrize("listener", [raise_another, return_another])
@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
async def test_an_error_of_another_name_counts(
    kind: Kind,
    engine: Engine | AsyncEngine,
    rows: Rows,
    listener: Callable[[Any], Any],
    fail: Callable[[Session], None],
    first: bool,
) -> None:
    """A handle_error listener, earlier or later than ours, does not hide a swallowed failure."""
    target = sync_engine(engine)

    def body(session: Session) -> None:
        write(session)
        if not first:
            event.listen(target, "handle_error", listener)
        with pytest.raises(ServiceError):
            fail(session)

    if first:
        event.listen(target, "handle_error", listener)
    with pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), body)
    assert rows.names == []


async def test_an_error_that_the_executing_listener_hides_counts(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """A do_execute listener that runs a statement and swallows its error prevents the commit."""

    def execute(cursor: Any, statement: str, parameters: Any, _context: object) -> bool:
        if statement != str(FAILING):
            return False
        swallow(lambda: cursor.execute(statement, parameters))
        return True

    def body(session: Session) -> None:
        write(session)
        session.execute(FAILING)

    target = sync_engine(engine)
    event.listen(target, "do_execute", execute)
    with pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), body)
    assert rows.names == []


class Committing(Session):
    """A session class whose listener commits, which SQLAlchemy does not allow."""


@event.listens_for(Committing, "before_commit")
def _commit(session: Session) -> None:
    session.commit()


async def test_a_commit_inside_a_commit_is_refused_by_sqlalchemy(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A before_commit listener that commits raises SQLAlchemy's own error."""
    options = session_class(kind, Committing)
    with pytest.raises(IllegalStateChangeError, match="already in progress"):
        await ask(engine, kind, transactional(), write, session_options=options)
    assert rows.names == []
