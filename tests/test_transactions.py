"""Rules 1 and 4 to 8: what a response says about what is stored."""

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import (
    Engine,
    Executable,
    StaticPool,
    create_engine,
    delete,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import Session

from fastapi_sqlnative import Database, get_db, install_database, transactional
from fastapi_sqlnative.exceptions import (
    UncommittedChangesError,
)
from tests.conftest import MakeEngine
from tests.serving import KINDS, Item, Kind, Rows, add, items, make_app, route, serve, using


@pytest.mark.driver_decides
def test_a_success_is_stored(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A transactional endpoint's changes are committed before the client receives its 201."""
    app = make_app(engine)
    route(app, kind, "/", transactional(), add("a"))
    with serve(app) as served:
        assert served.post("/").status_code == 201
        assert rows.names == ["a"]


def test_a_commit_that_fails_is_no_success(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A constraint that fails at COMMIT reaches the application's handler instead of a 2xx."""
    rows.add("first", position=1)
    app = make_app(engine)
    route(app, kind, "/taken", transactional(), add("second", position=1))
    route(app, kind, "/free", transactional(), add("third", position=2))
    with serve(app) as served:
        response = served.post("/taken")
        assert (response.status_code, response.json()) == (409, {"error": "IntegrityError"})
        assert served.post("/free").status_code == 201
    assert rows.names == ["first", "third"]


def raise_http(_session: Session) -> None:
    raise HTTPException(409)


def raise_unexpected(_session: Session) -> None:
    raise ZeroDivisionError


class Answer(BaseModel):
    number: int


@pytest.mark.parametrize(
    ("failure", "options", "status"),
    [
        (raise_http, {}, 409),
        (raise_unexpected, {}, 500),
        (lambda _: {"number": "none"}, {"response_model": Answer}, 500),
    ],
    ids=["HTTPException", "unexpected", "response-model"],
)
def test_any_exception_rolls_back(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    failure: Callable[[Session], Any],
    options: dict[str, Any],
    status: int,
) -> None:
    """Any exception up to the serialization of the response rolls the whole request back."""
    app = make_app(engine)

    def body(session: Session) -> Any:
        add("lost")(session)
        session.flush()
        return failure(session)

    route(app, kind, "/", transactional(), body, **options)
    route(app, kind, "/next", transactional(), add("kept"))
    with serve(app) as served:
        assert served.post("/").status_code == status
        assert rows.backends("idle in transaction%") == 0
        assert served.post("/next").status_code == 201
    assert rows.names == ["kept"]


def test_an_invalid_request_rolls_back(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A 422 rolls back what a dependency wrote before the request was found invalid."""
    app = make_app(engine)

    def write(session: Session) -> None:
        add("lost")(session)
        session.flush()

    writing = using(kind, Depends(transactional()), write)
    app.post("/", dependencies=[Depends(writing)])(lambda number: number)
    with serve(app) as served:
        assert served.post("/").status_code == 422
    assert rows.names == []
    assert rows.backends("idle in transaction%") == 0


def test_a_returned_error_response_commits(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A 4xx response that is returned, not raised, commits the transaction."""
    app = make_app(engine)

    def body(session: Session) -> JSONResponse:
        add("kept")(session)
        return JSONResponse({}, 402)

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 402
    assert rows.names == ["kept"]


def test_explicit_commit_and_rollback_are_allowed(kind: Kind, engine: Engine, rows: Rows) -> None:
    """With `transactional`, commit() stores at once and rollback() discards; both may go on."""
    app = make_app(engine)

    def body(session: Session) -> None:
        session.add(Item(name="committed"))
        session.commit()
        assert rows.names == ["committed"]
        session.add(Item(name="rolled back"))
        session.flush()
        session.rollback()
        session.add(Item(name="at the end"))

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["at the end", "committed"]


def test_a_rollback_lets_the_session_go_on_after_a_loss(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A session that has lost its connection can be rolled back, written to again and committed."""
    app = make_app(engine)

    def body(session: Session) -> None:
        session.execute(insert(items).values(name="lost"))
        rows.lose(session)
        with pytest.raises(DBAPIError):
            session.execute(insert(items).values(name="lost"))
        session.rollback()
        session.execute(insert(items).values(name="kept"))

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["kept"]


def swallow(session: Session) -> None:
    """Insert a row twice, and ignore the failure of the second insert."""
    session.execute(insert(items).values(name="twice"))
    try:
        session.execute(insert(items).values(name="twice"))
    except IntegrityError:
        return
    pytest.fail("the constraint did not hold")


def swallow_in_savepoint(session: Session) -> None:
    """Insert a row twice, the second time in a savepoint, and ignore the failure."""
    session.execute(insert(items).values(name="twice"))
    try:
        with session.begin_nested():
            session.execute(insert(items).values(name="twice"))
    except IntegrityError:
        return
    pytest.fail("the constraint did not hold")


def roll_back_in_sql(session: Session) -> None:
    """Roll a swallowed failure back by SQL to the application's savepoint, and insert the row."""
    session.execute(text("SAVEPOINT mine"))
    swallow(session)
    session.execute(text("ROLLBACK TO SAVEPOINT mine"))
    session.execute(insert(items).values(name="twice"))


@pytest.mark.driver_decides
def test_a_swallowed_error_is_no_success(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A handler that ignores an IntegrityError is not answered with 201, and stores nothing."""
    app = make_app(engine)
    route(app, kind, "/swallow", transactional(), swallow)
    route(app, kind, "/next", transactional(), add("next"))
    with serve(app) as served:
        response = served.post("/swallow")
        assert (response.status_code, response.json()) == (
            409,
            {"error": "TransactionAbortedError"},
        )
        assert rows.names == []
        assert served.post("/next").status_code == 201
    assert rows.names == ["next"]


@pytest.mark.driver_decides
def test_an_explicit_commit_of_a_swallowed_error_is_refused(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """With get_db, session.commit() after a swallowed error raises TransactionAbortedError."""
    app = make_app(engine)

    def body(session: Session) -> None:
        swallow(session)
        session.commit()

    route(app, kind, "/", get_db(), body)
    with serve(app) as served:
        assert served.post("/").json() == {"error": "TransactionAbortedError"}
    assert rows.names == []


@pytest.mark.driver_decides
@pytest.mark.parametrize("body", [swallow_in_savepoint, roll_back_in_sql])
def test_an_error_in_a_savepoint_may_be_ignored(
    kind: Kind, engine: Engine, rows: Rows, body: Callable[[Session], None]
) -> None:
    """A failure that was rolled back to a savepoint does not stop the commit."""
    app = make_app(engine)
    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["twice"]


def swallow_client_error(session: Session) -> None:
    """Pass an argument that the driver itself rejects, and ignore the error."""
    session.execute(insert(items).values(name="kept"))
    with pytest.raises((DBAPIError, TypeError)):
        session.execute(text("SELECT CAST(:number AS integer)"), {"number": object()})


@pytest.mark.driver_decides
def test_an_error_of_the_client_alone_does_not_count(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A transaction with an error that never reached the server remains usable and commits."""
    app = make_app(engine)
    route(app, kind, "/", transactional(), swallow_client_error)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["kept"]


def flush_change(session: Session) -> None:
    session.scalars(select(Item)).one().name = "changed"
    session.flush()


def run(statement: Executable) -> Callable[[Session], None]:
    """Return a handler's body that sends one statement."""

    def body(session: Session) -> None:
        session.execute(statement).close()

    return body


new = insert(items).values(name="a")
FORGOTTEN: dict[str, Callable[[Session], Any]] = {
    "orm-add": add("a"),
    "orm-change": lambda session: setattr(session.scalars(select(Item)).one(), "name", "b"),
    "orm-delete": lambda session: session.delete(session.scalars(select(Item)).one()),
    "flushed": flush_change,
    "core-insert": run(new),
    "core-update": run(update(items).values(name="b")),
    "core-delete": run(delete(items)),
    "returning": run(new.returning(items.c.id)),
    "cte": run(select(new.returning(items.c.id).cte("new"))),
    "through-the-connection": lambda session: session.connection().execute(new).close(),
}


def test_a_forgotten_commit_is_no_success(
    kind: Kind, engine: Engine, rows: Rows, subtests: pytest.Subtests
) -> None:
    """Changes that were made through get_db and not committed fail the request."""
    app = make_app(engine)
    for name, body in FORGOTTEN.items():
        route(app, kind, f"/{name}", get_db(), body)
    with serve(app) as served:
        for name in FORGOTTEN:
            rows.clear("there")
            with subtests.test(name):
                response = served.post(f"/{name}")
                refused = 409, {"error": "UncommittedChangesError"}
                assert (response.status_code, response.json()) == refused
                assert rows.names == ["there"]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_get_db_with_an_explicit_end_is_a_success(
    kind: Kind, engine: Engine, rows: Rows, end: str, subtests: pytest.Subtests
) -> None:
    """With get_db, a request that ends its transaction by commit() or rollback() succeeds."""
    app = make_app(engine)

    def decided(body: Callable[[Session], Any]) -> Callable[[Session], None]:
        def both(session: Session) -> None:
            body(session)
            getattr(session, end)()

        return both

    for name, body in FORGOTTEN.items():
        route(app, kind, f"/{name}", get_db(), decided(body))
    with serve(app) as served:
        for name in FORGOTTEN:
            rows.clear("there")
            with subtests.test(name):
                assert served.post(f"/{name}").status_code == 201
                assert (rows.names == ["there"]) is (end == "rollback")


def test_a_write_undone_by_a_savepoint_is_not_forgotten(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A write needs no commit if the savepoint around it was rolled back."""
    app = make_app(engine)

    def body(session: Session) -> None:
        savepoint = session.begin_nested()
        session.execute(insert(items).values(name="undone"))
        savepoint.rollback()

    route(app, kind, "/", get_db(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == []


def test_background_tasks_see_the_commit(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A background task runs after the commit, and not at all when the commit fails."""
    rows.add("first", position=1)
    seen: list[list[str]] = []
    app = make_app(engine)

    def note(tasks: BackgroundTasks) -> None:
        tasks.add_task(lambda: seen.append(rows.names))

    depends = [Depends(note)]
    route(app, kind, "/ok", transactional(), add("second", 2), dependencies=depends)
    route(app, kind, "/taken", transactional(), add("third", 1), dependencies=depends)
    with serve(app) as served:
        assert served.post("/ok").status_code == 201
        assert served.post("/taken").status_code == 409
    assert seen == [["first", "second"]]


def two_databases(kind: Kind, make_engine: MakeEngine, positions: tuple[int, int]) -> FastAPI:
    """Build an application whose endpoint writes to two databases, to the second database first."""
    app = make_app(make_engine())
    second = make_engine(second=True)
    install_database(app, name="second", engine=second, shutdown=second.dispose)

    second_write = using(kind, Depends(transactional("second")), add("b", positions[1]))
    depends = [Depends(second_write)]
    route(app, kind, "/", transactional(), add("a", positions[0]), dependencies=depends)
    return app


def test_two_databases_commit_in_the_order_of_installation(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """If the second database fails at COMMIT, the first has committed, and the error says so."""
    second_rows.add("there", position=7)
    with serve(two_databases(kind, make_engine, (1, 7))) as served:
        response = served.post("/")
        assert (response.status_code, response.json()) == (409, {"error": "PartialCommitError"})
    assert (rows.names, second_rows.names) == (["a"], ["there"])


def test_a_first_database_that_fails_leaves_nothing(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """If the database installed first fails at COMMIT, neither database stores anything."""
    rows.add("there", position=7)
    with serve(two_databases(kind, make_engine, (7, 1))) as served:
        assert served.post("/").json() == {"error": "IntegrityError"}
    assert (rows.names, second_rows.names) == (["there"], [])


def test_a_flush_that_fails_leaves_nothing_anywhere(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """All flushes precede the first COMMIT, so a failed flush leaves both databases unchanged."""
    second_rows.add("b")
    with serve(two_databases(kind, make_engine, (1, 1))) as served:
        assert served.post("/").json() == {"error": "IntegrityError"}
    assert (rows.names, second_rows.names) == ([], ["b"])


def fail_before_sending(session: Session) -> None:
    """Make SQLAlchemy itself reject a statement, by omitting a parameter."""
    with pytest.raises(StatementError):
        session.execute(text("SELECT :number"), {})


def swallow_two(session: Session) -> None:
    swallow(session)
    fail_before_sending(session)


def swallow_in_a_listener(session: Session) -> None:
    """Write through a listener that hides its failure, as an audit log might."""

    def audit(session: Session, _context: object) -> None:
        with contextlib.suppress(IntegrityError):
            session.execute(insert(items).values(id=100, name="again"))

    event.listen(session, "after_flush", audit)
    session.execute(insert(items).values(id=100, name="a"))
    session.add(Item(name="b"))
    session.commit()


@pytest.mark.driver_decides
@pytest.mark.parametrize("body", [swallow_two, swallow_in_a_listener])
def test_a_swallowed_error_is_remembered(
    kind: Kind, engine: Engine, rows: Rows, body: Callable[[Session], None]
) -> None:
    """A swallowed error still counts if a listener hides it or an unsent statement fails later."""
    app = make_app(engine)
    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").json() == {"error": "TransactionAbortedError"}
    assert rows.names == []


@pytest.mark.driver_decides
def test_an_error_that_was_never_sent_does_not_count(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A statement that SQLAlchemy itself rejects does not abort the transaction.

    Here, a savepoint has saved the transaction from an earlier error.
    """
    app = make_app(engine)

    def body(session: Session) -> None:
        swallow_in_savepoint(session)
        fail_before_sending(session)

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert rows.names == ["twice"]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], indirect=True, ids=lambda kind: kind.id)
def test_an_error_on_the_drivers_own_connection_counts(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """With psycopg, a failed statement on the driver's own cursor fails the request, too.

    Psycopg reports a lost transaction, whatever sent the statement.
    """
    app = make_app(engine)

    def body(session: Session) -> None:
        session.execute(insert(items).values(name="a"))
        cursor = session.connection().connection.cursor()
        with contextlib.suppress(Exception):
            cursor.execute("SELECT 1 / 0")

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").json() == {"error": "TransactionAbortedError"}
    assert rows.names == []


def write_unseen(engine: Engine) -> None:
    """Write with Core and close the session, so that only a listener can notice the write."""
    with Database(engine).transaction() as session:
        session.execute(text("CREATE TABLE item (id integer PRIMARY KEY, name text)"))
        session.execute(insert(items).values(name="a"))
        session.close()


def test_every_new_engine_is_watched() -> None:
    """A new engine is watched, even if it has the address of an engine that no longer exists."""
    dialects: list[object] = []  # SQLAlchemy's caches may keep them longer than their engine
    for _ in range(30):
        engine = create_engine("sqlite://", poolclass=StaticPool)
        dialects.append(engine.dialect)
        with pytest.raises(UncommittedChangesError):
            write_unseen(engine)
        engine.dispose()
        del engine
        gc.collect(1)  # the engine is young, and a full collection takes 100 times as long
