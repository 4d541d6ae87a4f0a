"""A session is a `Session` with the class and options that were installed."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, Engine, delete, event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria

from fastapi_sqlnative import get_db, transactional
from fastapi_sqlnative._sessions.engines import sync_engine
from tests.conftest import MakeEngine
from tests.serving import Item, Kind, Rows, items, make_app, route, serve


class Own(Session):
    """An application's own session class."""


class OwnAsync(AsyncSession):
    sync_session_class = Own


class Routing(Own):
    """A session class that writes to a second engine, as SQLAlchemy's documentation shows."""

    def get_bind(self, mapper: Any = None, *, clause: Any = None, **options: Any) -> Any:
        if self._flushing or getattr(clause, "is_dml", False):
            return self.info["writer"]
        return super().get_bind(mapper=mapper, clause=clause, **options)


class RoutingAsync(AsyncSession):
    sync_session_class = Routing


def class_options(kind: Kind, sync: type[Session], asynchronous: type[AsyncSession]) -> Any:
    return {"class_": asynchronous if kind.asynchronous else sync}


@contextmanager
def listening(
    target: Any, name: str, function: Callable[..., Any], *, insert: bool = False
) -> Generator[None]:
    """Listen to an event of sessions until the block ends."""
    event.listen(target, name, function, insert=insert)
    try:
        yield
    finally:
        event.remove(target, name, function)


# -- options ---------------------------------------------------------------------------------


def test_sessions_have_the_options_of_the_installation(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """Sessions have the installed class_, autoflush, expire_on_commit and info."""
    rows.add("there")
    options = class_options(kind, Own, OwnAsync)
    app = make_app(
        engine,
        session_options={"autoflush": False, "expire_on_commit": True, "info": {"tenant": 7}}
        | options,
    )

    def body(session: Session) -> None:
        assert isinstance(session, Own)
        assert type(session).__name__ == "Own"
        assert session.info == {"tenant": 7}
        session.info["tenant"] = 8
        row = session.scalars(select(Item)).one()
        session.add(Item(name="pending"))
        assert len(session.scalars(select(Item)).all()) == 1
        session.commit()
        assert "name" not in vars(row)

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 201
        rows.connection.execute("DELETE FROM item WHERE name = 'pending'")
        assert served.post("/").status_code == 201


def test_objects_are_usable_after_a_commit(kind: Kind, engine: Engine, rows: Rows) -> None:
    """By default a commit expires no objects, because an async handler could not reload them."""
    app = make_app(engine)

    def body(session: Session) -> dict[str, Any]:
        row = Item(name="a")
        session.add(row)
        session.commit()
        return {"id": row.id, "name": row.name}

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").json() == {"id": 1, "name": "a"}


@pytest.mark.parametrize("way", ["class_", "sync_session_class"])
def test_an_async_session_keeps_its_sync_class(
    make_engine: MakeEngine, kind: Kind, way: str
) -> None:
    """An AsyncSession uses the application's sync class, from `class_` or `sync_session_class`."""
    if not kind.asynchronous:
        with pytest.raises(TypeError, match="'sync_session_class' is not allowed"):
            make_app(make_engine(), session_options={"sync_session_class": Own})
        return
    options = {"class_": OwnAsync} if way == "class_" else {"sync_session_class": Own}
    app = make_app(make_engine(), session_options=options)
    kinds: list[type[Session]] = []
    route(app, kind, "/", get_db(), lambda session: kinds.append(type(session)))
    with serve(app) as served:
        assert served.post("/").status_code == 201
    assert issubclass(kinds[0], Own)


# -- two engines behind one session ----------------------------------------------------------


def routed(
    kind: Kind, reading: Engine | AsyncEngine, writing: Engine | AsyncEngine, **options: Any
) -> FastAPI:
    """Make an application whose sessions read from one engine and write to another."""
    options |= {"info": {"writer": sync_engine(writing)}}
    options |= class_options(kind, Routing, RoutingAsync)
    app = make_app(reading, session_options=options)
    app.router.add_event_handler("shutdown", writing.dispose)
    return app


@pytest.fixture
def routing(kind: Kind, make_engine: MakeEngine, rows: Rows) -> FastAPI:
    """Return such an application on the first and the second database."""
    return routed(kind, make_engine(pool_size=1), make_engine(second=True, pool_size=1))


def test_a_class_of_the_applications_routes(
    kind: Kind, routing: FastAPI, rows: Rows, second_rows: Rows
) -> None:
    """The application's get_bind() chooses among its engines, and all of them commit."""
    rows.add("read")

    def body(session: Session) -> list[str]:
        session.add(Item(name="orm"))
        session.flush()
        session.execute(insert(items).values(name="core"))
        return list(session.scalars(select(Item.name)))

    route(routing, kind, "/", transactional(), body)
    with serve(routing) as served:
        assert served.post("/").json() == ["read"]
        assert rows.backends("idle in transaction%") == 0
        assert second_rows.backends("idle in transaction%") == 0
    assert (rows.names, second_rows.names) == (["read"], ["core", "orm"])


def test_the_guards_hold_on_every_engine(
    kind: Kind, routing: FastAPI, rows: Rows, second_rows: Rows
) -> None:
    """A swallowed error and a forgotten commit also fail a request on an engine from get_bind()."""
    second_rows.add("taken")

    def swallow(session: Session) -> None:
        session.execute(select(items))
        session.execute(insert(items).values(name="lost"))
        with pytest.raises(IntegrityError):
            session.execute(insert(items).values(name="taken"))

    def forget(session: Session) -> None:
        session.execute(select(items))
        session.execute(delete(items))

    route(routing, kind, "/swallow", transactional(), swallow)
    route(routing, kind, "/forget", get_db(), forget)
    with serve(routing) as served:
        assert served.post("/swallow").json() == {"error": "TransactionAbortedError"}
        assert served.post("/forget").json() == {"error": "UncommittedChangesError"}
        assert rows.backends("idle in transaction%") == 0
        assert second_rows.backends("idle in transaction%") == 0
    assert second_rows.names == ["taken"]


@pytest.mark.driver_decides
def test_what_a_listener_swallows_on_another_engine_counts(
    kind: Kind, routing: FastAPI, rows: Rows, second_rows: Rows
) -> None:
    """A mapper listener's swallowed error on an engine from get_bind() fails the request, too."""
    second_rows.add("taken")

    def swallow(_mapper: object, connection: Connection, _row: object) -> None:
        with pytest.raises(IntegrityError):
            connection.execute(insert(items).values(name="taken"))

    def body(session: Session) -> None:
        session.execute(select(items))
        session.add(Item(name="lost"))

    route(routing, kind, "/", transactional(), body)
    with serve(routing) as served, listening(Item, "after_insert", swallow):
        assert served.post("/").json() == {"error": "TransactionAbortedError"}
    assert second_rows.names == ["taken"]


def test_a_half_that_one_engine_has_stored_is_unknown(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """If the second of two engines in a session fails to commit, the outcome is unknown."""
    reading, writing = make_engine(), make_engine(second=True)
    app = routed(kind, reading, writing)
    committing: list[Connection] = []

    def refuse_the_second(connection: Connection) -> None:
        committing.append(connection)  # SQLAlchemy chooses the order
        if len(committing) == 2:
            connection.execute(insert(items).values(name="refused", position=7))

    for engine, stored in (reading, rows), (writing, second_rows):
        stored.add("there", position=7)
        event.listen(sync_engine(engine), "commit", refuse_the_second)

    def body(session: Session) -> None:
        session.connection().execute(insert(items).values(name="stored"))
        session.add(Item(name="stored"))

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").json() == {"error": "CommitOutcomeUnknownError"}
    assert sorted([*rows.names, *second_rows.names]) == ["stored", "there", "there"]


def test_two_phases_store_all_or_nothing(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """With `twophase`, nothing is stored on either engine if the second one does not prepare."""
    reading, writing = make_engine(), make_engine(second=True)
    app = routed(kind, reading, writing, twophase=True)
    preparing: list[Connection] = []

    def refuse_the_second(connection: Connection, _id: object) -> None:
        preparing.append(connection)
        if len(preparing) == 2:
            raise LookupError

    for engine in reading, writing:
        event.listen(sync_engine(engine), "prepare_twophase", refuse_the_second)

    def body(session: Session) -> None:
        session.connection().execute(insert(items).values(name="lost"))
        session.add(Item(name="lost"))

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        assert served.post("/").status_code == 500
    assert (len(preparing), rows.names, second_rows.names) == (2, [], [])
    assert rows.connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall() == []


# -- the application's events ----------------------------------------------------------------


@pytest.mark.parametrize("target", [Session, Own])
def test_the_applications_listeners_are_called(
    kind: Kind, engine: Engine, rows: Rows, target: type[Session]
) -> None:
    """Listeners on Session or the application's class are called at commit, and may add rows."""
    app = make_app(engine, session_options=class_options(kind, Own, OwnAsync))
    heard: list[str] = []

    def outbox(session: Session) -> None:
        heard.append("before")
        session.add(Item(name="outbox"))

    def after(_session: Session) -> None:
        heard.append("after")

    route(app, kind, "/", transactional(), lambda session: session.add(Item(name="a")))
    with (
        serve(app) as served,
        listening(target, "before_commit", outbox),
        listening(target, "after_commit", after),
    ):
        assert served.post("/").status_code == 201
    assert heard == ["before", "after"]
    assert rows.names == ["a", "outbox"]


def test_a_listener_may_filter_what_is_read(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A do_orm_execute listener with loader criteria, used to filter by tenant, works unchanged."""
    rows.add("mine", position=1)
    rows.add("theirs", position=2)
    app = make_app(engine, session_options=class_options(kind, Own, OwnAsync))

    def mine(state: ORMExecuteState) -> None:
        state.statement = state.statement.options(with_loader_criteria(Item, Item.position == 1))

    route(app, kind, "/", get_db(), lambda session: list(session.scalars(select(Item.name))))
    with serve(app) as served, listening(Own, "do_orm_execute", mine):
        assert served.post("/").json() == ["mine"]


def test_a_listener_may_send_driver_sql_instead(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A do_orm_execute listener may return the result of SQL that SQLAlchemy has not compiled."""
    app = make_app(engine, session_options=class_options(kind, Own, OwnAsync))

    def instead(state: ORMExecuteState) -> Any:
        return state.session.connection().exec_driver_sql("SELECT 'instead'")

    route(app, kind, "/", get_db(), lambda session: list(session.scalars(select(Item.name))))
    with serve(app) as served, listening(Own, "do_orm_execute", instead):
        assert served.post("/").json() == ["instead"]


@pytest.mark.parametrize("first", [False, True], ids=["after-ours", "before-ours"])
def test_a_listener_sets_up_the_transaction(
    kind: Kind, engine: Engine, rows: Rows, first: bool
) -> None:
    """An after_begin listener can set up row security, and its failure frees the connection."""
    app = make_app(engine, session_options=class_options(kind, Own, OwnAsync))

    def fail(_session: Session, _transaction: Any, connection: Any) -> None:
        connection.execute(text("SELECT set_config('app.tenant', '7', true)"))
        if rows.names:
            connection.execute(text("SELECT 1 / 0"))

    def body(session: Session) -> Any:
        return session.execute(text("SELECT current_setting('app.tenant', true)")).scalar()

    route(app, kind, "/", transactional(), body)
    with serve(app) as served:
        # The order of the listeners of a class is fixed at its first use.
        assert served.post("/").json() is None
        with listening(Session, "after_begin", fail, insert=first):
            assert served.post("/").json() == "7"
            rows.add("fails")
            assert served.post("/").status_code == 500
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined] # a QueuePool's
            assert rows.backends("idle in transaction%") == 0
        assert served.post("/").json() == ""
