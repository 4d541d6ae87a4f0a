"""Rules 7, 8 and 9: what an error at COMMIT says about what is stored."""

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from select import select as select_ready
from typing import Annotated, Any

import asyncpg
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Connection, Engine, create_engine, event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from conftest import WorkerPostgres
from fastapi_sqlnative import get_db, install_database, transactional
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative._sessions.session import sync_session
from fastapi_sqlnative.exceptions import AfterCommitError, CommitOutcomeUnknownError
from tests.conftest import MakeEngine
from tests.in_process import ask, asking, run_in_transaction, run_work, running, session_class
from tests.proxy import Fault, Proxy
from tests.serving import (
    ASYNCPG,
    SQLITE,
    Item,
    Kind,
    Rows,
    add,
    items,
    pid_of,
    until,
    wait_until,
)

pytestmark = [pytest.mark.anyio, pytest.mark.driver_decides]

Body = Callable[[Session], Any]
only_asyncpg = pytest.mark.parametrize("kind", [ASYNCPG], indirect=True, ids=lambda kind: kind.id)


# -- after COMMIT ------------------------------------------------------------------------------


@pytest.fixture
def other(postgres: WorkerPostgres) -> Iterator[Engine]:
    """Yield an engine on another database, which a listener may use."""
    engine = create_engine(postgres.second.url("psycopg"))
    yield engine
    engine.dispose()


add_once = add("once")


def serialization_failure(connection: Any) -> None:
    """Make the server raise an error that is worth another attempt."""
    connection.execute(text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"))


def failing_after_commit(other: Engine | None) -> type[Session]:
    """Return a session class whose listener fails after the COMMIT."""

    class Outbox(Session): ...

    def publish(_session: Session) -> None:
        if other is None:
            raise ZeroDivisionError
        with other.begin() as connection:
            serialization_failure(connection)

    event.listen(Outbox, "after_commit", publish)
    return Outbox


def failing_commit(other: Engine | None) -> type[Session]:
    """Return a session class whose commit() fails after SQLAlchemy's own commit()."""

    class Outbox(Session):
        def commit(self) -> None:
            super().commit()
            if other is None:
                raise ZeroDivisionError
            with other.begin() as connection:
                serialization_failure(connection)

    return Outbox


def commit_by_hand(session: Session) -> None:
    add_once(session)
    session.commit()


def commit_in_a_block(session: Session) -> None:
    with session.begin():
        add_once(session)


@pytest.mark.parametrize("foreign", [False, True], ids=["own error", "40001 of another database"])
@pytest.mark.parametrize(
    ("dependency", "body", "make"),
    [
        (transactional(), add_once, failing_after_commit),
        (transactional(), add_once, failing_commit),
        (get_db(), commit_by_hand, failing_after_commit),
        (get_db(), commit_in_a_block, failing_after_commit),
    ],
    ids=["transactional", "commit() goes on", "commit() by hand", "session.begin()"],
)
async def test_what_fails_after_the_commit_is_an_error_of_its_own(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    other: Engine,
    dependency: Any,
    body: Body,
    make: Callable[[Engine | None], type[Session]],
    foreign: bool,
) -> None:
    """A failure after COMMIT raises AfterCommitError with its cause, and the row is stored."""
    options = session_class(kind, make(other if foreign else None))
    with pytest.raises(AfterCommitError) as caught:
        await ask(engine, kind, dependency, body, session_options=options)
    assert isinstance(caught.value.__cause__, OperationalError if foreign else ZeroDivisionError)
    assert rows.names == ["once"]


@pytest.mark.parametrize("make", [failing_after_commit, failing_commit])
async def test_what_is_stored_is_not_repeated(
    kind: Kind, engine: Engine, rows: Rows, other: Engine, make: Callable[[Engine], type[Session]]
) -> None:
    """run_in_transaction does not repeat work because of a failure after its COMMIT."""
    rows.connection.execute("ALTER TABLE item DROP CONSTRAINT item_name_key")
    try:
        with pytest.raises(AfterCommitError):
            await run_in_transaction(
                engine, add_once, session_options=session_class(kind, make(other))
            )
        assert rows.names == ["once"]
    finally:
        rows.connection.execute("TRUNCATE item; ALTER TABLE item ADD UNIQUE (name)")


@pytest.mark.parametrize("commit", [commit_by_hand, commit_in_a_block])
async def test_work_that_committed_by_itself_is_not_repeated(
    kind: Kind, engine: Engine, rows: Rows, commit: Body
) -> None:
    """Work that has committed a part is not repeated, even after a retryable failure."""
    runs: list[Session] = []

    def work(session: Session) -> None:
        runs.append(session)
        commit(session)
        serialization_failure(session)

    with pytest.raises(DBAPIError):
        await run_in_transaction(engine, work)
    assert (len(runs), rows.names) == (1, ["once"])


# -- work that has not run ---------------------------------------------------------------------


def generator(session: Session) -> Any:
    add_once(session)
    yield


async def async_generator(session: AsyncSession) -> AsyncGenerator[None]:
    session.add(Item(name="once"))
    yield


@pytest.mark.parametrize("work", [generator, async_generator])
async def test_a_generator_is_no_work(kind: Kind, engine: Engine, rows: Rows, work: Any) -> None:
    """run_in_transaction raises TypeError for a generator, which would do nothing."""
    with pytest.raises(TypeError, match="generator"):
        await run_work(engine, work)
    assert rows.names == []


# -- a connection lost in COMMIT ---------------------------------------------------------------


def fail_in_a_savepoint(session: Session) -> None:
    """Run a failing statement in a savepoint, and ignore the error."""
    with suppress(DBAPIError), session.begin_nested():
        session.execute(text("SELECT 1 / 0"))


def add_after_a_savepoint(session: Session) -> None:
    add_once(session)
    fail_in_a_savepoint(session)


class Auditing(Session):
    """A session class whose listener rolls back a savepoint before each COMMIT."""


event.listen(Auditing, "before_commit", fail_in_a_savepoint)


class Noting(Session):
    """A session class whose listener releases a savepoint before each COMMIT."""


@event.listens_for(Noting, "before_commit")
def use_a_savepoint(session: Session) -> None:
    if not session.in_nested_transaction():  # releasing it calls this listener again
        with session.begin_nested():
            read_text(session)


async def test_a_refused_commit_is_not_stored_because_a_savepoint_is(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A COMMIT that fails stores nothing, even if a listener has released a savepoint before it."""
    rows.add("there", 1)
    options = session_class(kind, Noting)
    with pytest.raises(IntegrityError):
        await ask(engine, kind, transactional(), add("twice", 1), session_options=options)
    assert rows.names == ["there"]


async def test_a_connection_that_a_listener_has_lost_is_not_unknown(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows
) -> None:
    """If a listener loses the connection before COMMIT, the driver's error is raised.

    The listener has released a savepoint before that. No COMMIT is sent, so the outcome is not
    unknown.
    """

    class Losing(Noting): ...

    @event.listens_for(Losing, "before_commit")
    def lose(session: Session) -> None:
        if not session.in_nested_transaction():
            rows.lose(session)
            read_text(session)

    options = session_class(kind, Losing)
    with pytest.raises(DBAPIError):
        await ask(behind_proxy, kind, transactional(), add_once, session_options=options)
    assert not proxy.reached.is_set()
    assert rows.names == []


class Numbering(Session):
    """A session class that changes a row after its flush, so that COMMIT flushes again."""


def add_and_keep(session: Session) -> None:
    item = session.info["item"] = Item(name="once")
    session.add(item)


@event.listens_for(Numbering, "after_flush_postexec")
def number(session: Session, _context: object) -> None:
    item = session.info["item"]
    if item.position is None:
        item.position = 1


def add_in_an_open_savepoint(session: Session) -> None:
    session.begin_nested()
    add_once(session)


@pytest.mark.parametrize(
    ("dependency", "body", "class_"),
    [
        (transactional(), add_once, Session),
        (transactional(), add_once, Auditing),
        (get_db(), commit_by_hand, Auditing),
        (get_db(), commit_in_a_block, Session),
        (get_db(), commit_in_a_block, Auditing),
        (transactional(), add_after_a_savepoint, Session),
        (transactional(), add_in_an_open_savepoint, Session),
        (transactional(), add_and_keep, Numbering),
    ],
    ids=[
        "at the end",
        "listener",
        "listener, by hand",
        "block",
        "listener, block",
        "savepoint",
        "open savepoint",
        "late flush",
    ],
)
async def test_a_connection_lost_in_commit_is_unknown_wherever(
    kind: Kind,
    behind_proxy: Engine,
    proxy: Proxy,
    rows: Rows,
    dependency: Any,
    body: Body,
    class_: type[Session],
) -> None:
    """A connection lost in COMMIT is an unknown outcome, also in a block or after a savepoint.

    The server has committed here, so the row is stored.
    """
    proxy.fault = Fault.ANSWER_LOST
    options = session_class(kind, class_)
    with pytest.raises(CommitOutcomeUnknownError):
        await ask(behind_proxy, kind, dependency, body, session_options=options)
    assert rows.names == ["once"]


def read(session: Session) -> None:
    session.execute(select(items)).all()


UNKNOWN = """
CREATE FUNCTION unknown() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE 'nobody knows' USING ERRCODE = 'statement_completion_unknown'; END $$;
CREATE CONSTRAINT TRIGGER unknown AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION unknown()
"""


async def test_a_server_that_does_not_know_is_believed(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A server error at COMMIT that reports an unknown outcome raises CommitOutcomeUnknownError."""
    rows.connection.execute(UNKNOWN)
    try:
        with pytest.raises(CommitOutcomeUnknownError):
            await ask(engine, kind, transactional(), add_once)
    finally:
        rows.connection.execute("DROP FUNCTION unknown CASCADE")


def read_text(session: Session) -> None:
    session.execute(text("SELECT count(*) FROM item")).all()


def terminate(rows: Rows, pid: int) -> None:
    """Terminate a backend from outside, and wait until it has ended."""
    rows.connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


def undo_a_savepoint(session: Session) -> None:
    savepoint = session.begin_nested()
    add_once(session)
    session.flush()
    savepoint.rollback()


@pytest.mark.parametrize(
    ("dependency", "body"),
    [
        (transactional(), read),
        (transactional(), read_text),
        (transactional(), undo_a_savepoint),
        (transactional(read_only=True), read),
        (transactional(read_only=True), read_text),
    ],
    ids=["read", "text", "undone savepoint", "read only", "read only, text"],
)
async def test_a_connection_lost_while_reading_is_not_unknown(
    kind: Kind, engine: Engine, rows: Rows, dependency: Any, body: Body
) -> None:
    """A COMMIT on a lost connection raises the driver's error if nothing could have been stored."""

    def reading(session: Session) -> None:
        body(session)
        terminate(rows, pid_of(session))

    with pytest.raises(DBAPIError):
        await ask(engine, kind, dependency, reading)


def ended_by_the_server(session: Session, rows: Rows) -> None:
    """Make the server end the idle transaction, and wait until it has done so."""
    pid = pid_of(session)
    # Not shorter: if the server's last message came with the answer to this, psycopg would drop it.
    session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '100ms'"))
    gone = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: rows.connection.execute(gone, (pid,)).fetchone() is None)
    # On a busy machine, the server's last message may still be on its way.
    for connection in sync_session(session).sqlnative.connections:
        driver: Any = connection.connection.driver_connection
        if hasattr(driver, "fileno"):
            assert select_ready([driver], [], [], 30)[0]


async def test_a_transaction_that_the_server_has_ended_is_not_unknown(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A transaction that the server ended before COMMIT raises the driver's error.

    Here, idle_in_transaction_session_timeout ends it (25P03).
    """

    def body(session: Session) -> None:
        add_once(session)
        session.flush()
        ended_by_the_server(session, rows)

    with pytest.raises(DBAPIError):
        await ask(engine, kind, transactional(), body)
    assert rows.names == []


class HalfEnded(asyncpg.Connection):  # type: ignore[misc] # asyncpg has no types
    """A connection that, at COMMIT, has read only the first part of the data that ends it."""

    async def execute(self, query: str, *args: Any, **options: Any) -> Any:
        if query == "COMMIT;":
            raise asyncpg.InternalClientError(
                "cannot switch to state 15; another operation (2) is in progress"
            )
        return await super().execute(query, *args, **options)


@only_asyncpg
async def test_a_commit_that_asyncpg_refuses_to_send_is_not_unknown(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """A COMMIT that asyncpg refuses to send raises the driver's error and stores nothing.

    asyncpg sends nothing while it is still reading the end of a connection.
    """
    engine = make_engine(connect_args={"connection_class": HalfEnded})
    with pytest.raises(DBAPIError):
        await ask(engine, kind, transactional(), add_once)
    assert rows.names == []


@only_asyncpg
async def test_a_commit_that_asyncpg_did_not_send_is_not_unknown(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A COMMIT on a connection that asyncpg has closed raises the driver's error.

    asyncpg does not send it, so nothing is stored.
    """

    def body(session: Session) -> None:
        add_once(session)
        session.flush()
        driver: Any = session.connection().connection.driver_connection
        driver.terminate()

    with pytest.raises(DBAPIError):
        await ask(engine, kind, transactional(), body)
    assert rows.names == []


# -- a COMMIT that failed, and the next user of its connection ---------------------------------


@contextmanager
def failing_before_commit(
    engine: Engine | AsyncEngine, other: Engine, proxy: Proxy | None = None
) -> Generator[None]:
    """Expect the failure of a `commit` listener on another database.

    With a proxy, the server does not answer from then on.
    """

    def publish(_connection: Connection) -> None:
        if proxy is not None:
            proxy.fault = Fault.SWALLOWED
        with other.begin() as connection:
            serialization_failure(connection)

    event.listen(sync_engine(engine), "commit", publish, once=True)
    with pytest.raises(OperationalError):
        yield


async def test_what_a_listener_has_kept_from_commit_is_not_stored_later(
    kind: Kind, engine: Engine, rows: Rows, other: Engine
) -> None:
    """A transaction whose `commit` listener fails on another database is not stored later."""

    async with asking(engine, kind, transactional()) as request:
        with failing_before_commit(engine, other):
            await request(add("lost"))
        await request(add("kept"))
    assert rows.names == ["kept"]


@only_asyncpg
async def test_a_connection_that_cannot_roll_back_is_not_used_again(
    kind: Kind, make_engine: MakeEngine, proxy: Proxy, rows: Rows, other: Engine
) -> None:
    """If the rollback after a listener's failure times out, the listener's error is raised.

    The connection is closed, and the next request uses a new one. SQLAlchemy passes on asyncpg's
    timeout unchanged.
    """
    plain = {"ssl": False, "host": "127.0.0.1", "port": proxy.own_port, "command_timeout": 1}
    engine = make_engine(pool_size=1, max_overflow=0, connect_args=plain)

    async with asking(engine, kind, transactional()) as request:
        with failing_before_commit(engine, other, proxy):
            await request(add("lost"))
        proxy.fault = Fault.NONE
        await request(add("kept"))
    assert rows.names == ["kept"]


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_what_a_locked_sqlite_refuses_is_not_stored_later(kind: Kind, tmp_path: Path) -> None:
    """A request whose COMMIT finds SQLite locked fails, and its changes are not stored later.

    SQLite itself keeps the transaction open after such a COMMIT.
    """
    make = create_async_engine if kind.asynchronous else create_engine
    url = f"sqlite+{kind.driver}:///{tmp_path / 'items.db'}"
    engine = make(url, connect_args={"timeout": 0}, pool_size=1, max_overflow=0)
    with closing(sqlite3.connect(tmp_path / "items.db")) as reader:
        reader.executescript("CREATE TABLE item (id integer PRIMARY KEY, name, position); BEGIN")
        reader.execute("SELECT * FROM item").fetchall()
        async with asking(engine, kind, transactional()) as request:
            with pytest.raises(OperationalError, match="locked"):
                await request(add("lost"))
            reader.rollback()
            await request(add("kept"))
        assert reader.execute("SELECT name FROM item").fetchall() == [("kept",)]


# -- another task that uses the session --------------------------------------------------------


@only_asyncpg
async def test_a_commit_beside_another_tasks_statement_says_so(
    kind: Kind, engine: Any, rows: Rows
) -> None:
    """A COMMIT while another task uses the session raises the driver's error about that.

    It is not reported as an error that was ignored.
    """
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    left: list[asyncio.Task[Any]] = []

    @app.post("/")
    async def leave(session: Annotated[AsyncSession, Depends(transactional())]) -> None:
        session.add(Item(name="lost"))
        await session.flush()
        left.append(asyncio.create_task(session.execute(text("SELECT pg_sleep(5)"))))
        await until(lambda: rows.backends("active") == 1)

    async with running(app) as client:
        with pytest.raises(InterfaceError, match="another operation is in progress"):
            await client.post("/")
        await asyncio.wait(left)
        assert engine.pool.checkedout() == 0
    assert rows.names == []
