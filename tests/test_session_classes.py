"""Rule 9: an application's own session class is used as it is written."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction

from fastapi_sqlnative import AsyncDatabase, Database, get_db, install_database, transactional
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative._sessions.factory import Outermost
from fastapi_sqlnative._sessions.session import NativeSession
from fastapi_sqlnative.exceptions import (
    AfterCommitError,
    TransactionAbortedError,
    UncommittedChangesError,
)
from tests.conftest import MakeEngine, asynchronous
from tests.in_process import (
    ask,
    async_sqlite,
    dispose,
    run_in_transaction,
    running,
    session_class,
    sqlite,
)
from tests.serving import Item, Kind, Rows, add, items, route, using

pytestmark = pytest.mark.anyio

Body = Callable[[Session], Any]
add_a = add("a", flush=True)


def fail(session: Session) -> None:
    add_a(session)
    session.add(Item(name="pending"))
    raise ZeroDivisionError


def nothing(_session: Session) -> None: ...


# -- overrides ---------------------------------------------------------------------------------


def telling(log: list[str]) -> tuple[type[Session], type[AsyncSession]]:
    """Make session classes of both colours that log the calls of their overrides."""

    class Telling(Session):
        def commit(self) -> None:
            super().commit()
            log.append("commit")

        def rollback(self) -> None:
            super().rollback()
            log.append("rollback")

        def close(self) -> None:
            super().close()
            log.append("close")

    class AsyncTelling(AsyncSession):
        async def commit(self) -> None:
            await super().commit()
            log.append("commit")

        async def rollback(self) -> None:
            await super().rollback()
            log.append("rollback")

        async def close(self) -> None:
            await super().close()
            log.append("close")

    return Telling, AsyncTelling


@pytest.fixture(params=["class_", "sync_session_class"])
def telling_options(kind: Kind, request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[str]]:
    """Return the session options for an overriding class, and its log.

    With `sync_session_class`, an AsyncSession only wraps the class.
    """
    log: list[str] = []
    synchronous, asynchronous = telling(log)
    if request.param == "class_":
        return {"class_": asynchronous if kind.asynchronous else synchronous}, log
    return session_class(kind, synchronous), log


@pytest.mark.parametrize(
    ("dependency", "body", "expected"),
    [
        (transactional(), add_a, ["commit", "close"]),
        (transactional(), nothing, ["commit", "close"]),
        (transactional(), fail, ["rollback", "close"]),
        (get_db(), lambda session: session.execute(select(items)).close(), ["close"]),
    ],
    ids=["stored", "no SQL", "failed", "read"],
)
async def test_an_override_is_called_at_the_end_of_a_request(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    telling_options: tuple[dict[str, Any], list[str]],
    dependency: Any,
    body: Body,
    expected: list[str],
) -> None:
    """The application's own commit(), rollback() and close() end the request's session."""
    options, log = telling_options
    try:
        await ask(engine, kind, dependency, body, session_options=options)
    except ZeroDivisionError:
        assert body is fail
    assert log == expected
    assert rows.names == (["a"] if body is add_a else [])


async def run_block(engine: Engine | AsyncEngine, body: Body, options: dict[str, Any]) -> None:
    if isinstance(engine, AsyncEngine):
        async with AsyncDatabase(engine, session_options=options).transaction() as session:
            await session.run_sync(body)
    else:
        with Database(engine, session_options=options).transaction() as session:
            body(session)


@pytest.mark.parametrize("body", [add_a, fail], ids=["add", "fail"])
async def test_an_override_is_called_at_the_end_of_a_block(
    kind: Kind,
    engine: Engine | AsyncEngine,
    rows: Rows,
    telling_options: tuple[dict[str, Any], list[str]],
    body: Body,
) -> None:
    """The application's own commit(), rollback() and close() end a handle's transaction."""
    options, log = telling_options
    try:
        await run_block(engine, body, options)
    except ZeroDivisionError:
        assert body is fail
    finally:
        await dispose(engine)
    assert log == (["commit", "close"] if body is add_a else ["rollback", "close"])
    assert rows.names == (["a"] if body is add_a else [])


class AsyncOutbox(AsyncSession):
    """A session class whose commit() fails after its COMMIT."""

    async def commit(self) -> None:
        await super().commit()
        raise ZeroDivisionError


@asynchronous
async def test_an_async_override_that_fails_after_the_commit(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """An async commit() that fails after its COMMIT raises AfterCommitError and undoes nothing."""
    options = {"class_": AsyncOutbox}
    with pytest.raises(AfterCommitError):
        await ask(engine, kind, transactional(), add_a, session_options=options)
    assert rows.names == ["a"]


@asynchronous
async def test_a_commit_calls_no_override_of_run_sync(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """The end of a request doesn't call the class's own run_sync(), as in SQLAlchemy."""
    called: list[str] = []

    class Recording(AsyncSession):
        async def run_sync(self, fn: Any, *arg: Any, **kw: Any) -> Any:
            called.append(fn.__qualname__)
            return await super().run_sync(fn, *arg, **kw)

    options = {"class_": Recording}
    assert await ask(engine, kind, transactional(), add_a, session_options=options) == 201
    assert called == ["asking.<locals>.last"]
    assert rows.names == ["a"]


class Flushing(Session):
    """A session class whose commit() only flushes."""

    def commit(self) -> None:
        self.flush()


class Swallowing(Session):
    """A session class whose commit() swallows its failure."""

    def commit(self) -> None:
        try:
            super().commit()
        except IntegrityError:
            self.rollback()


def add_conflict(session: Session) -> None:
    session.add_all([Item(name="a", position=1), Item(name="b", position=1)])


@pytest.mark.parametrize("class_", [Flushing, Swallowing])
async def test_an_override_that_commits_nothing_fails_the_request(
    kind: Kind, engine: Engine, rows: Rows, class_: type[Session]
) -> None:
    """A commit() that leaves changes unstored fails the request with UncommittedChangesError.

    Without changes, the request succeeds.
    """
    options = {"session_options": session_class(kind, class_)}
    with pytest.raises(UncommittedChangesError, match="super"):
        await ask(engine, kind, transactional(), add_conflict, **options)
    read: Body = lambda session: session.execute(select(items)).close()  # noqa: E731
    assert await ask(engine, kind, transactional(), read, **options) == 201
    assert rows.names == []


class Twice(Session):
    """A session class whose commit() commits again, in case of writes after the first COMMIT."""

    def commit(self) -> None:
        super().commit()
        super().commit()


class Leaving(Session):
    """A session class whose commit() writes after its COMMIT."""

    def commit(self) -> None:
        super().commit()
        add("left", flush=True)(self)


async def test_an_override_may_commit_again(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A commit() may commit twice, but changes after its last COMMIT fail the request."""
    twice, leaving = ({"session_options": session_class(kind, each)} for each in (Twice, Leaving))
    assert await ask(engine, kind, transactional(), add_a, **twice) == 201
    with pytest.raises(UncommittedChangesError, match="super"):
        await ask(engine, kind, transactional(), add("b"), **leaving)
    assert rows.names == ["a", "b"]


class Refusing(Session):
    """A session class whose commit() may fail before its COMMIT."""

    def commit(self) -> None:
        if self.new:
            raise ZeroDivisionError
        super().commit()


async def test_an_override_that_fails_after_an_earlier_commit(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """If commit() fails before its COMMIT, its error is raised, even after an earlier commit."""

    def commit_and_add(session: Session) -> None:
        add_a(session)
        session.commit()
        session.add(Item(name="b"))

    options = session_class(kind, Refusing)
    with pytest.raises(ZeroDivisionError):
        await ask(engine, kind, transactional(), commit_and_add, session_options=options)
    assert rows.names == ["a"]


def with_argument(method: str, base: type[Any]) -> type[Any]:
    return type("Wanting", (base,), {method: lambda self, reason: None})


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_an_override_that_cannot_be_called_is_refused(method: str, asynchronous: bool) -> None:
    """A commit(), rollback() or close() that needs arguments fails the installation."""
    class_ = with_argument(method, AsyncSession if asynchronous else Session)
    engine = async_sqlite() if asynchronous else sqlite()
    with pytest.raises(TypeError, match=rf"{method}\(\) of Wanting has required arguments"):
        install_database(FastAPI(), engine=engine, session_options={"class_": class_})


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
def test_an_override_of_the_wrong_colour_is_refused(method: str) -> None:
    """An AsyncSession's override that cannot be awaited fails the installation."""
    class_ = type("Plain", (AsyncSession,), {method: lambda self: None})
    with pytest.raises(TypeError, match=rf"{method}\(\) of Plain is not an `async def`"):
        install_database(FastAPI(), engine=async_sqlite(), session_options={"class_": class_})


# -- listeners where no SQL was sent -----------------------------------------------------------


def close(session: Session) -> None:
    session.close()


@pytest.mark.parametrize("body", [nothing, close])
@pytest.mark.parametrize("hook", ["before_commit", "after_commit"])
async def test_commit_listeners_run_without_sql(
    kind: Kind, engine: Engine, rows: Rows, hook: str, body: Callable[[Session], None]
) -> None:
    """An endpoint without SQL still commits, so that listeners run and their rows are stored."""

    class Outbox(Session): ...

    heard: list[str] = []

    @event.listens_for(Outbox, hook)
    def listen(session: Session) -> None:
        heard.append(hook)
        if hook == "before_commit":
            session.add(Item(name="by the listener"))

    options = session_class(kind, Outbox)
    assert await ask(engine, kind, transactional(), body, session_options=options) == 201
    assert (rows.names, heard) == (["by the listener"] * (hook == "before_commit"), [hook])


# -- listeners and context variables -----------------------------------------------------------

transaction: ContextVar[str] = ContextVar("transaction", default="none")


class Scoped(Session):
    """A session class whose listeners set a context variable for the length of a transaction."""


@event.listens_for(Scoped, "after_begin")
def enter(session: Session, *_: object) -> None:
    session.info["token"] = transaction.set("open")


@event.listens_for(Scoped, "after_transaction_end")
def leave(session: Session, ended: SessionTransaction) -> None:
    if ended.parent is None:  # a flush that ends has a parent
        transaction.reset(session.info.pop("token"))


def commit_b(session: Session) -> None:
    session.add(Item(name="b"))
    session.commit()


def wrapping(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
    """Make tasks that wrap their work, as Sentry and other monitoring tools do."""

    async def watched() -> Any:
        return await work

    return asyncio.Task(watched(), loop=loop, **options)


FACTORIES: dict[str, Any] = {"none": None, "wrapping": wrapping}
if sys.version_info >= (3, 12):
    FACTORIES["eager"] = asyncio.eager_task_factory


@pytest.fixture(params=FACTORIES)
async def task_factory(request: pytest.FixtureRequest) -> AsyncGenerator[None]:
    """Set a task factory that an application may have set on its event loop."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(FACTORIES[request.param])
    yield
    loop.set_task_factory(None)


@pytest.mark.usefixtures("task_factory")
async def test_listeners_share_the_context_of_a_transaction(
    kind: Kind, engine: Engine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener at a transaction's end may reset a context variable that was set at its start."""
    options = {"session_options": session_class(kind, Scoped)}
    with pytest.raises(ZeroDivisionError):
        await run_in_transaction(engine, fail, **options)
    await run_in_transaction(engine, add_a, **options)
    if kind.asynchronous:  # FastAPI itself runs a `def` endpoint in a copy of the context
        assert await ask(engine, kind, get_db(), commit_b, **options) == 201
        assert await ask(engine, kind, transactional(), add("c"), **options) == 201
        with pytest.raises(IntegrityError):
            await ask(engine, kind, get_db(), fail, **options)
    assert rows.names == (["a", "b", "c"] if kind.asynchronous else ["a"])
    assert (transaction.get(), caplog.records) == ("none", [])


# -- classes that are made in other ways -------------------------------------------------------


def sharded(engine: Engine) -> type[Session]:
    class Sharded(ShardedSession):
        def __init__(self, *, bind: Any = None, **options: Any) -> None:
            super().__init__(
                shard_chooser=lambda *_, **__: "one",
                identity_chooser=lambda *_, **__: ["one"],
                execute_chooser=lambda _context: ["one"],
                shards={"one": engine},
                **options,
            )

    return Sharded


def tenant_first(_engine: Engine) -> type[Session]:
    class Tenants(Session):
        def __init__(self, tenant: str = "none", **options: Any) -> None:
            super().__init__(**options)
            self.info["tenant"] = tenant

    return Tenants


def of_a_base_with_keywords(_engine: Engine) -> type[Session]:
    class Base(Session):
        def __init_subclass__(cls, *, tenant: str) -> None:
            super().__init_subclass__()

    class Tenant(Base, tenant="one"): ...

    return Tenant


@pytest.mark.parametrize("make", [sharded, tenant_first, of_a_base_with_keywords])
async def test_a_class_is_made_as_it_wants_to_be(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows, make: Callable[[Engine], type[Session]]
) -> None:
    """Sharded sessions and classes with their own parameters commit and report forgotten writes."""
    inner = sync_engine(engine)
    options = {"session_options": session_class(kind, make(inner))}
    assert await ask(engine, kind, transactional(), add_a, **options) == 201
    assert rows.names == ["a"]

    def forget(session: Session) -> None:
        session.add(Item(name="b"))
        session.flush()

    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), forget, **options)
    assert rows.names == ["a"]


# -- a method beside execute() -----------------------------------------------------------------


class Executing(Session):
    """A session class with its own method for statements, like SQLModel's `exec`."""

    def exec(self, statement: Any) -> Any:
        return super().execute(statement).scalars()

    def execute(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("exec() goes past it")


def exec_on(session: Session, statement: Any) -> Any:
    assert isinstance(session, Executing)
    return session.exec(statement)


async def test_a_method_that_goes_past_execute_is_seen(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """Forgotten writes and swallowed errors are found even if a method calls super().execute()."""
    options = session_class(kind, Executing)
    new = insert(items).values(name="a").returning(items.c.id)

    def forget(session: Session) -> None:
        assert exec_on(session, new).one() > 0

    def swallow(session: Session) -> None:
        forget(session)
        with pytest.raises(IntegrityError):
            exec_on(session, new)

    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), forget, session_options=options)
    with pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), swallow, session_options=options)
    assert await ask(engine, kind, transactional(), forget, session_options=options) == 201
    assert rows.names == ["a"]


async def test_scalars_call_no_override_of_execute(kind: Kind, engine: Engine, rows: Rows) -> None:
    """scalars() and scalar() don't call the class's own execute(), as in SQLAlchemy."""
    rows.add("a")

    def read(session: Session) -> None:
        assert session.scalars(select(items.c.name)).all() == ["a"]
        assert session.scalar(select(items.c.name)) == "a"

    options = session_class(kind, Executing)
    assert await ask(engine, kind, get_db(), read, session_options=options) == 201


# -- a listener's own result -------------------------------------------------------------------


class Freezing(Session):
    """A session class whose listener freezes each result, as for a cache."""


@event.listens_for(Freezing, "do_orm_execute")
def freeze(state: ORMExecuteState) -> Any:
    return state.invoke_statement().freeze()()


@pytest.mark.parametrize(
    ("statement", "writes"),
    [
        (text("INSERT INTO item (name) VALUES ('a') RETURNING id"), True),
        (insert(items).values(name="a").returning(items.c.id), True),
        (select(items), False),
    ],
    ids=["text", "insert", "select"],
)
async def test_a_listener_with_a_result_of_its_own_hides_no_write(
    kind: Kind, engine: Engine, rows: Rows, statement: Any, writes: bool
) -> None:
    """A forgotten write is found, and a read is not taken for one, whatever a listener returns."""
    options = session_class(kind, Freezing)

    def body(session: Session) -> None:
        session.execute(statement).all()

    if writes:
        with pytest.raises(UncommittedChangesError):
            await ask(engine, kind, get_db(), body, session_options=options)
    else:
        assert await ask(engine, kind, get_db(), body, session_options=options) == 201


# -- after an exception ------------------------------------------------------------------------


async def test_objects_stay_as_they_were_loaded(kind: Kind, engine: Engine, rows: Rows) -> None:
    """Objects that an endpoint has loaded can still be read after it failed, as in a handler."""
    rows.add("there")
    loaded: list[Item] = []

    def body(session: Session) -> None:
        loaded.extend(session.scalars(select(Item)))
        session.execute(insert(items).values(name="undone"))
        raise ZeroDivisionError

    for dependency in get_db(), transactional():
        with pytest.raises(ZeroDivisionError):
            await ask(engine, kind, dependency, body, shutdown=None)
    with pytest.raises(ZeroDivisionError):
        await run_in_transaction(engine, body)
    assert [each.name for each in loaded] == ["there"] * 3
    assert rows.names == ["there"]


async def test_a_listener_of_the_rollback_may_use_the_session(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """A listener of `after_soft_rollback` may use the session, as in SQLAlchemy's manual.

    What it opens is closed with the session.
    """
    heard: list[int] = []

    class Listening(Session): ...

    @event.listens_for(Listening, "after_soft_rollback")
    def look(session: Session, _previous: object) -> None:
        if session.is_active:
            heard.append(session.scalars(select(1)).one())

    with pytest.raises(ZeroDivisionError):
        await ask(
            engine, kind, transactional(), fail, session_options=session_class(kind, Listening)
        )
    assert (heard, rows.names) == ([1], [])


Listening = tuple[type[Session], list[Session]]


@pytest.fixture
def listening() -> Listening:
    """Return a class with a listener of `after_rollback`, and the sessions that it has recorded."""
    heard: list[Session] = []

    class Hearing(Session): ...

    event.listen(Hearing, "after_rollback", heard.append)
    return Hearing, heard


async def test_a_failed_flush_is_rolled_back_once(
    kind: Kind, engine: Engine, rows: Rows, listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    """With an `after_rollback` listener, a failed flush is rolled back once, and nothing is logged.

    This also holds if the endpoint adds a row afterwards and fails.
    """
    rows.add("a")
    class_, heard = listening

    def fail_and_add(session: Session) -> None:
        with pytest.raises(IntegrityError):
            add_a(session)
        session.add(Item(name="later"))
        raise ZeroDivisionError

    options = session_class(kind, class_)
    with pytest.raises(ZeroDivisionError):
        await ask(engine, kind, transactional(), fail_and_add, session_options=options)
    assert (len(heard), caplog.messages, rows.names) == (1, [], ["a"])


def commit_conflict(session: Session) -> None:
    add_conflict(session)
    session.commit()


@pytest.mark.parametrize(
    ("dependency", "body", "error"),
    [
        (transactional(), add_conflict, IntegrityError),
        (get_db(), commit_conflict, IntegrityError),
        (get_db(), add_a, UncommittedChangesError),
    ],
    ids=["at the end", "the endpoint's own", "forgotten"],
)
async def test_listeners_hear_a_rollback_if_the_commit_fails(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    listening: Listening,
    dependency: Any,
    body: Body,
    error: type[Exception],
) -> None:
    """`after_rollback` runs if a COMMIT fails or is forgotten, as after any other error."""
    class_, heard = listening
    options = session_class(kind, class_)
    with pytest.raises(error):
        await ask(engine, kind, dependency, body, session_options=options)
    assert (len(heard), rows.names) == (1, [])


async def test_listeners_of_a_block_hear_a_rollback_if_the_commit_fails(
    kind: Kind,
    engine: Engine | AsyncEngine,
    rows: Rows,
    listening: Listening,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a handle's transaction, `after_rollback` runs if the COMMIT fails.

    It does not run if the COMMIT succeeds and an `after_commit` listener fails.
    """
    class_, heard = listening
    options = session_class(kind, class_)
    with pytest.raises(IntegrityError):
        await run_block(engine, add_conflict, options)
    assert (len(heard), rows.names) == (1, [])

    @event.listens_for(class_, "after_commit")
    def explode(_session: Session) -> None:
        raise ZeroDivisionError

    with pytest.raises(AfterCommitError):
        await run_block(engine, add_a, options)
    assert (len(heard), caplog.messages, rows.names) == (1, [], ["a"])
    await dispose(engine)


# -- names -------------------------------------------------------------------------------------


def test_a_class_may_name_its_own_methods_as_it_likes() -> None:
    """The package's session classes add no names to SQLAlchemy's, except for the record."""
    ours = {name for each in (Outermost, NativeSession) for name in vars(each)}
    assert {name for name in ours - set(dir(Session)) if not name.startswith("__")} == set()
    assert "sqlnative" in NativeSession.__annotations__


class Equal(Session):
    """A session that equals every other of its class."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    def __hash__(self) -> int:
        return 1

    def commit(self) -> None:
        super().commit()


class Unhashable(Equal):
    """One that SQLAlchemy accepts only without an `AsyncSession` around it."""

    __hash__ = None  # type: ignore[assignment]


async def test_sessions_that_are_equal_are_not_confused(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """Each of a request's sessions is committed, even if their class says that they are equal."""
    app = FastAPI()
    equal = session_class(kind, Equal if kind.asynchronous else Unhashable)
    for name, engine in ("a", make_engine()), ("b", make_engine(second=True)):
        install_database(
            app, name=name, engine=engine, shutdown=engine.dispose, session_options=equal
        )
    first = Depends(using(kind, Depends(transactional("a")), add("a")))
    route(app, kind, "/", transactional("b"), add("b"), dependencies=[first])
    async with running(app) as client:
        assert (await client.post("/")).status_code == 201
    assert (rows.names, second_rows.names) == (["a"], ["b"])
