"""Rule 8: what is raised when one of a request's databases commits and another does not."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Connection, Engine, delete, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session

from fastapi_sqlnative import get_db, install_database, reader, transactional
from fastapi_sqlnative.exceptions import (
    AfterCommitError,
    CommitOutcomeUnknownError,
    PartialCommitError,
    TransactionAbortedError,
)
from fastapi_sqlnative.testing import fail_next_commit
from tests.conftest import MakeEngine
from tests.in_process import Hearing, async_sqlite, running, session_class, sqlite
from tests.proxy import Fault, Proxy
from tests.serving import ASYNCPG, SQLITE, Item, Kind, Rows, copy, items, route, using

pytestmark = pytest.mark.anyio

Body = Callable[[Session], Any]

STORE = """
CREATE OR REPLACE FUNCTION store(name text) RETURNS int LANGUAGE sql AS
    'INSERT INTO item (name) VALUES (name) RETURNING id'
"""


@pytest.fixture
def stores(rows: Rows, second_rows: Rows) -> tuple[Rows, Rows]:
    """Return the rows of both databases, of which the second has a row that takes a position."""
    rows.connection.execute(STORE)
    second_rows.add("there", position=7)
    return rows, second_rows


def two(
    kind: Kind,
    make_engine: MakeEngine,
    first: Body,
    second: Body,
    classes: tuple[type[Session], type[Session]] = (Session, Session),
) -> FastAPI:
    """Make an application whose one route uses two databases, in the order of installation."""
    app = FastAPI()
    for name, class_ in zip(("default", "second"), classes, strict=True):
        engine = make_engine(second=name == "second")
        options = session_class(kind, class_)
        install_database(
            app, name=name, engine=engine, shutdown=engine.dispose, session_options=options
        )
    beside = Depends(using(kind, Depends(transactional("second")), second))
    route(app, kind, "/", transactional(), first, dependencies=[beside])
    return app


async def ask(app: FastAPI) -> int:
    async with running(app) as client:
        return (await client.post("/")).status_code


def taken(session: Session) -> None:
    """Write a row that fails at COMMIT."""
    session.add(Item(name="refused", position=7))


def commit_and_read(session: Session) -> None:
    """Commit a row and then read, so that the request's COMMIT has nothing to store."""
    session.add(Item(name="a"))
    session.commit()
    session.execute(select(items)).close()


WRITES: dict[str, Body] = {
    "flush": lambda session: session.add(Item(name="a")),
    "text": lambda session: session.execute(text("INSERT INTO item (name) VALUES ('a')")).close(),
    "function": lambda session: session.execute(select(func.store("a"))).close(),
    "function in text": lambda session: session.execute(text("SELECT store('a')")).close(),
    "copy": lambda session: copy(session, "a"),
    "commit of its own": commit_and_read,
}


@pytest.mark.parametrize("first", WRITES.values(), ids=WRITES)
async def test_a_first_half_that_is_stored_is_named(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows], first: Body
) -> None:
    """If the second database fails to commit, the error names the first, whatever wrote to it."""
    with pytest.raises(PartialCommitError) as caught:
        await ask(two(kind, make_engine, first, taken))
    assert (caught.value.committed, caught.value.failed) == (("default",), "second")
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert [each.names for each in stores] == [["a"], ["there"]]


async def test_a_first_half_whose_outcome_is_unknown_is_reported_as_such(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """If the outcome of the first COMMIT is unknown, the second database stores nothing."""
    app = two(kind, make_engine, WRITES["flush"], WRITES["flush"])
    async with running(app) as client:
        with (
            fail_next_commit(app, "connection_lost_after"),
            pytest.raises(CommitOutcomeUnknownError, match="'default'"),
        ):
            await client.post("/")
    assert [each.names for each in stores] == [["a"], ["there"]]


READS: dict[str, Body] = {
    "connection": lambda s: s.connection().exec_driver_sql("SELECT 1").close(),
    "read": lambda session: session.execute(select(items)).close(),
    "unknown function": lambda s: s.execute(text("SELECT quote_nullable('a')")).close(),
    "update of no row": lambda s: s.execute(text("UPDATE item SET id = 1 WHERE id = 0")).close(),
}


@pytest.mark.parametrize("first", READS.values(), ids=READS)
@pytest.mark.parametrize("class_", [Session, Hearing])
async def test_a_first_half_that_stores_nothing_is_not_named(
    kind: Kind,
    make_engine: MakeEngine,
    stores: tuple[Rows, Rows],
    first: Body,
    class_: type[Session],
) -> None:
    """If only the failing database had something to store, its own error is raised."""
    with pytest.raises(IntegrityError):
        await ask(two(kind, make_engine, first, taken, (class_, Session)))
    assert [each.names for each in stores] == [[], ["there"]]


class Listening(Session):
    """A session class whose listener fails before the COMMIT."""


@event.listens_for(Listening, "before_commit")
def _fail(_session: Session) -> None:
    raise ZeroDivisionError


async def test_a_listener_that_fails_hides_no_half(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """A before_commit listener of the second database that fails raises a PartialCommitError.

    The first database keeps what it has committed.
    """

    def second(session: Session) -> None:
        session.add(Item(name="b"))

    with pytest.raises(PartialCommitError) as caught:
        await ask(two(kind, make_engine, WRITES["flush"], second, (Session, Listening)))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert [each.names for each in stores] == [["a"], ["there"]]


class Publishing(Session):
    """A session class whose listener fails after the COMMIT."""


event.listen(Publishing, "after_commit", _fail)


async def test_a_failure_after_the_first_commit_hides_no_half(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """An after_commit listener of the first database that fails keeps the second from storing.

    The error is a PartialCommitError, because the first has committed.
    """

    def second(session: Session) -> None:
        session.add(Item(name="b"))

    with pytest.raises(PartialCommitError) as caught:
        await ask(two(kind, make_engine, WRITES["flush"], second, (Publishing, Session)))
    assert (caught.value.committed, caught.value.failed) == (("default",), "second")
    assert isinstance(caught.value.__cause__, AfterCommitError)
    assert [each.names for each in stores] == [["a"], ["there"]]


ROW = "INSERT INTO item (name) VALUES ('a')"
STORED_ON_SQLITE = {
    "UPDATE item SET position = 1": False,
    f"{ROW} ON CONFLICT DO NOTHING RETURNING id": True,
    ROW: True,
}


@pytest.mark.parametrize("statement", STORED_ON_SQLITE)
@pytest.mark.parametrize("own", [False, True], ids=["", "own commit"])
@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_sqlite_names_a_half_that_is_stored_and_no_other(
    kind: Kind, statement: str, own: bool
) -> None:
    """On SQLite, PartialCommitError is raised only if the first database has changed a row."""

    def first(session: Session) -> None:
        session.execute(text(statement)).close()
        if own:
            session.commit()

    def engine(**_: object) -> Any:
        made = async_sqlite() if kind.asynchronous else sqlite()
        event.listen(getattr(made, "sync_engine", made), "connect", _create)
        return made

    app = two(kind, engine, first, WRITES["flush"], (Session, Listening))
    with pytest.raises(PartialCommitError if STORED_ON_SQLITE[statement] else ZeroDivisionError):
        await ask(app)


def _create(driver: Any, _record: object) -> None:
    driver.execute("CREATE TABLE item (id integer PRIMARY KEY, name text, position integer)")


# -- a second database with nothing to store ---------------------------------------------------


async def test_a_second_half_that_has_only_read_fails_nobody(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """A second database that has only read does not fail the first if its connection is lost."""

    assert await ask(two(kind, make_engine, WRITES["flush"], stores[1].lose)) == 201
    assert [each.names for each in stores] == [["a"], ["there"]]


class Archiving(Session):
    """A session class whose listener writes before the COMMIT."""


event.listen(Archiving, "before_commit", lambda session: session.add(Item(name="archived")))


class Sealing(Session):
    """A session class whose commit() writes first."""

    def commit(self) -> None:
        self.add(Item(name="sealed"))
        super().commit()


@pytest.mark.parametrize("class_", [Archiving, Sealing])
async def test_a_second_half_that_its_class_writes_is_missed(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows], class_: type[Session]
) -> None:
    """A second database whose connection is lost before its class can write fails the request.

    It did not only read, because a listener or an override was to write.
    """
    classes = Session, class_
    with pytest.raises(PartialCommitError) as caught:
        await ask(two(kind, make_engine, WRITES["flush"], stores[1].lose, classes))
    assert (caught.value.committed, caught.value.failed) == (("default",), "second")


@pytest.mark.parametrize("kind", [ASYNCPG], indirect=True, ids=lambda kind: kind.id)
async def test_a_second_half_that_hangs_fails_nobody(
    kind: Kind, make_engine: MakeEngine, proxy: Proxy, stores: tuple[Rows, Rows]
) -> None:
    """A COMMIT of nothing that times out in asyncpg does not fail the other database."""

    def second(session: Session) -> None:
        session.scalar(select(1))
        proxy.fault = Fault.SWALLOWED

    there = {"ssl": False, "host": "127.0.0.1", "port": proxy.own_port, "command_timeout": 2}
    app = FastAPI()
    for name, options in ("default", {}), ("second", {"second": True, "connect_args": there}):
        engine = make_engine(**options)
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    beside = Depends(using(kind, Depends(transactional("second")), second))
    route(app, kind, "/", transactional(), WRITES["flush"], dependencies=[beside])
    assert await ask(app) == 201
    assert stores[0].names == ["a"]


async def test_a_second_half_with_a_handled_failure_is_a_success(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """A second database that has only read, and failed in that, does not fail the first."""

    def second(session: Session) -> None:
        session.execute(select(items)).close()
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1 / 0"))

    assert await ask(two(kind, make_engine, WRITES["flush"], second)) == 201
    assert [each.names for each in stores] == [["a"], ["there"]]


async def test_a_swallowed_error_in_the_second_half_stores_nothing(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """A swallowed error in the second database is found before any COMMIT: nothing is stored."""

    def second(session: Session) -> None:
        session.execute(insert(items).values(name="b"))
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1 / 0"))

    with pytest.raises(TransactionAbortedError):
        await ask(two(kind, make_engine, WRITES["flush"], second))
    assert [each.names for each in stores] == [[], ["there"]]


# -- unobserved writes -------------------------------------------------------------------------

LOG = """
CREATE TABLE IF NOT EXISTS gone (name text);
TRUNCATE gone;
CREATE OR REPLACE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO gone VALUES (OLD.name); RETURN NULL; END';
CREATE OR REPLACE TRIGGER remember BEFORE DELETE ON item FOR EACH ROW EXECUTE FUNCTION remember()
"""


class Auditing(Session):
    """A session class whose listener writes on the connection as soon as there is one."""


@event.listens_for(Auditing, "after_begin")
def _audit(session: Session, _transaction: Any, connection: Connection) -> None:
    if not session.in_nested_transaction():
        connection.execute(insert(items).values(name="audited"))


async def test_a_half_that_was_written_unseen_is_stored(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """Rows that a listener or a trigger has written are committed, as with SQLAlchemy alone."""

    def second(session: Session) -> None:
        session.execute(delete(items).where(items.c.name == "there"))

    stores[1].connection.execute(LOG)
    app = two(
        kind, make_engine, lambda session: session.scalar(select(1)), second, (Auditing, Session)
    )
    try:
        assert await ask(app) == 201
        found = stores[1].connection.execute("SELECT name FROM gone").fetchall()
    finally:
        stores[1].connection.execute("DROP TRIGGER remember ON item; DROP TABLE gone")
    assert (stores[0].names, found) == (["audited"], [("there",)])


async def test_a_half_that_the_other_s_listener_writes_is_stored(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """An after_commit listener of the first database may still add to the second."""
    second: list[Session] = []

    class Forwarding(Session): ...

    def forward(_session: Session) -> None:
        second[0].add(Item(name="forwarded"))

    event.listen(Forwarding, "after_commit", forward)
    app = two(kind, make_engine, WRITES["flush"], second.append, (Forwarding, Session))
    assert await ask(app) == 201
    assert [each.names for each in stores] == [["a"], ["forwarded", "there"]]


@pytest.mark.driver_decides
@pytest.mark.parametrize("first", ["function", "copy"])
async def test_a_half_that_is_lost_before_its_commit_keeps_the_other_from_storing(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows], first: str
) -> None:
    """If the first database is lost before its COMMIT, the second stores nothing, either.

    The first can no longer be asked whether it has something to store, so it may have.
    """

    def write(session: Session) -> None:
        WRITES[first](session)
        stores[0].lose(session)

    with pytest.raises(DBAPIError):
        await ask(two(kind, make_engine, write, lambda session: session.add(Item(name="b"))))
    assert [each.names for each in stores] == [[], ["there"]]


async def test_a_half_that_the_endpoint_has_committed_is_named(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows]
) -> None:
    """A database that the endpoint itself has committed is named when the other fails to commit."""

    def first(session: Session) -> None:
        session.add(Item(name="a"))
        session.commit()

    with pytest.raises(PartialCommitError) as caught:
        await ask(two(kind, make_engine, first, taken))
    assert (caught.value.committed, caught.value.failed) == (("default",), "second")
    assert [each.names for each in stores] == [["a"], ["there"]]


def add_first(session: Session) -> None:
    session.add(Item(name="a"))
    session.commit()


FAILING: dict[str, Body] = {
    "at COMMIT": taken,
    "in the last flush": lambda session: session.add(Item(name="there")),
}


@pytest.mark.parametrize("dependency", [get_db(), transactional()], ids=["get_db", "transactional"])
@pytest.mark.parametrize("fail", FAILING.values(), ids=FAILING)
async def test_whoever_has_committed_a_half_it_is_named(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows], dependency: Any, fail: Body
) -> None:
    """An explicitly committed database is named, whatever the dependency and the later failure."""
    app = two(kind, make_engine, add_first, fail)
    app.router.routes.pop()
    beside = Depends(using(kind, Depends(dependency), add_first))
    route(app, kind, "/", transactional("second"), fail, dependencies=[beside])
    with pytest.raises(PartialCommitError) as caught:
        await ask(app)
    assert (caught.value.committed, caught.value.failed) == (("default",), "second")
    assert [each.names for each in stores] == [["a"], ["there"]]


# -- beside another session --------------------------------------------------------------------


def flush_twice(session: Session) -> None:
    session.add(Item(name="lost"))
    session.flush()
    session.add(Item(name="there"))
    with pytest.raises(IntegrityError):
        session.flush()


@pytest.mark.parametrize(
    ("beside", "body"),
    [
        (transactional("second"), lambda session: session.add(Item(name="b"))),
        (reader("second"), lambda session: session.scalar(select(1))),
        (reader(), lambda session: session.scalar(select(1))),
    ],
    ids=["transactional", "reader of another", "reader"],
)
async def test_a_failed_flush_is_refused_beside_another_session(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows], beside: Any, body: Body
) -> None:
    """After a failed flush, SQLAlchemy's PendingRollbackError is raised, before any COMMIT."""
    stores[0].add("there")
    app = FastAPI()
    for name in "second", "default":
        engine = make_engine(second=name == "second", pool_size=2)
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    first = Depends(using(kind, Depends(beside), body))
    route(app, kind, "/", transactional(), flush_twice, dependencies=[first])
    with pytest.raises(PendingRollbackError):
        await ask(app)
    assert [each.names for each in stores] == [["there"], ["there"]]


@pytest.mark.parametrize("beside", [get_db("second"), reader()], ids=["get_db", "reader"])
async def test_a_failure_after_the_only_commit_names_no_half(
    kind: Kind, make_engine: MakeEngine, stores: tuple[Rows, Rows], beside: Any
) -> None:
    """A failure after the only commit raises an AfterCommitError, not a PartialCommitError.

    A session that is not to be committed does not count, whatever it may have written.
    """
    app = FastAPI()
    for name, class_ in ("default", Publishing), ("second", Session):
        engine = make_engine(second=name == "second", pool_size=2)
        options = session_class(kind, class_)
        install_database(
            app, name=name, engine=engine, shutdown=engine.dispose, session_options=options
        )
    look = Depends(using(kind, Depends(beside), READS["unknown function"]))
    route(app, kind, "/", transactional(), WRITES["flush"], dependencies=[look])
    with pytest.raises(AfterCommitError):
        await ask(app)
    assert stores[0].names == ["a"]


async def test_a_flush_that_dies_with_its_connection_is_refused(
    kind: Kind, engine: Engine, stores: tuple[Rows, Rows]
) -> None:
    """A connection that is lost in a flush raises TransactionAbortedError, as rows are lost."""

    def body(session: Session) -> None:
        stores[0].lose(session)
        session.add(Item(name="lost"))
        with pytest.raises(DBAPIError):
            session.flush()

    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/", transactional(), body)
    with pytest.raises(TransactionAbortedError):
        await ask(app)
