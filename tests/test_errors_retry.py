"""`run_in_transaction`: what is retried, how often, and what is never retried."""

import asyncio
import functools
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from conftest import WorkerPostgres
from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    _retries,
    describe_database_error,
    http_errors,
)
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.exceptions import CommitOutcomeUnknownError
from tests.conftest import MakeEngine
from tests.failing import disposing
from tests.proxy import Fault, Proxy
from tests.serving import ASYNCPG, Item, Kind, Rows, items, pid_of, wait_until

Work = Callable[[Session], Any]


def run(engine: Engine | AsyncEngine, work: Work, **options: Any) -> Any:
    """Run work that takes a `Session` through a handle of the engine's colour."""
    if isinstance(engine, Engine):
        with disposing(engine):
            return Database(engine).run_in_transaction(work, **options)

    async def with_async_session(session: AsyncSession) -> Any:
        return await session.run_sync(work)

    async def main() -> Any:
        try:
            database = AsyncDatabase(engine)
            return await database.run_in_transaction(with_async_session, **options)
        finally:
            await engine.dispose()

    return asyncio.run(main())


def fail_with(sqlstate: str) -> str:
    """Return a statement that fails with this SQLSTATE."""
    return f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$"


class Failing:
    """Work that adds a row and fails with a server's code the first `times` times."""

    def __init__(self, sqlstate: str, times: int) -> None:
        self.sqlstate = sqlstate
        self.times = times
        self.sessions: list[Session] = []

    def __call__(self, session: Session) -> str:
        assert not session.in_transaction()
        self.sessions.append(session)
        session.add(Item(name="a"))
        session.flush()
        if len(self.sessions) <= self.times:
            session.execute(text(fail_with(self.sqlstate)))
        return f"after {len(self.sessions)}"


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_work_is_repeated_until_it_succeeds(
    kind: Kind, engine: Engine, rows: Rows, sqlstate: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt has a new session, and only the last attempt's work is stored and returned."""
    work = Failing(sqlstate, times=2)
    with caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        assert run(engine, work) == "after 3"
    assert rows.names == ["a"]
    assert len(set(map(id, work.sessions))) == 3
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("options", "made"),
    [({"attempts": 4}, 4), ({"attempts": 1}, 1), ({"timeout": 0}, 1), ({"backoff": 0}, 3)],
    ids=str,
)
def test_the_last_error_is_kept(
    kind: Kind, engine: Engine, rows: Rows, options: dict[str, Any], made: int
) -> None:
    """When no attempt is left, the last failure is raised unchanged and nothing is stored."""
    work = Failing("40001", times=9)
    with pytest.raises(DBAPIError) as raised:
        run(engine, work, **options)
    failure = describe_database_error(raised.value)
    assert failure is not None
    assert failure.code == "40001"
    assert len(work.sessions) == made
    assert rows.names == []


@pytest.mark.parametrize(
    "sqlstate", ["23505", "55P03", "57014", "53300", "08007", "40003", "25P02", "P0001", "22012"]
)
def test_nothing_else_is_repeated(kind: Kind, engine: Engine, rows: Rows, sqlstate: str) -> None:
    """A conflict, an overload, a bug or an unknown outcome ends the work at the first attempt."""
    work = Failing(sqlstate, times=9)
    with pytest.raises(DBAPIError):
        run(engine, work)
    assert len(work.sessions) == 1


def test_an_exhausted_pool_is_not_tried_again(kind: Kind, make_engine: MakeEngine) -> None:
    """Work that waits for a connection in vain is not retried, which leaves room for other work."""
    engine = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.1)
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        session.execute(select(items))
        bind = session.get_bind()
        assert isinstance(bind, Engine)
        bind.connect()

    with pytest.raises(PoolTimeoutError):
        run(engine, work)
    assert calls == 1


def lose(session: Session, _rows: Rows) -> None:
    session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


def lose_in_savepoint(session: Session, rows: Rows) -> None:
    with suppress(DBAPIError), session.begin_nested():
        lose(session, rows)


def lose_and_go_on(session: Session, rows: Rows) -> None:
    lose_in_savepoint(session, rows)
    session.execute(select(items))


def idle(session: Session, rows: Rows) -> None:
    """Make the server end the connection before the driver uses it again."""
    # Not shorter: if the server's last message came with the answer to this, psycopg would drop it.
    session.execute(text("SET idle_in_transaction_session_timeout = 100"))
    wait_until(lambda: rows.backends() == 0)


@pytest.mark.driver_decides
@pytest.mark.parametrize("end", [lose, lose_in_savepoint, lose_and_go_on, idle])
def test_a_connection_lost_before_commit_is_replaced(
    kind: Kind, engine: Engine, rows: Rows, end: Callable[[Session, Rows], None]
) -> None:
    """Work that loses its connection before COMMIT has stored nothing and runs again on another."""
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        session.add(Item(name="a"))
        session.flush()
        if calls == 1:
            end(session, rows)

    run(engine, work)
    assert (calls, rows.names) == (2, ["a"])


@pytest.mark.driver_decides
@pytest.mark.parametrize("writes", [True, False])
def test_what_a_connection_commits_is_not_repeated(
    kind: Kind, engine: Engine, rows: Rows, writes: bool
) -> None:
    """Work that commits on the session's connection is retried only if that stored nothing."""
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            connection = session.connection()
            connection.execute(items.insert().values(name="a") if writes else select(items))
            connection.commit()
            lose(session, rows)

    with pytest.raises(DBAPIError) if writes else nullcontext():
        run(engine, work)
    assert (calls, rows.names) == ((1, ["a"]) if writes else (2, []))


@pytest.mark.parametrize("kind", [ASYNCPG], indirect=True, ids=lambda kind: kind.id)
def test_a_commit_that_asyncpg_does_not_send_is_repeated(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """Work is retried if asyncpg does not send its COMMIT because the connection is closed."""
    lost: list[object] = []

    def lose_once(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        if not lost:
            lost.append(driver)
            closed = asyncio.Event()
            driver.add_termination_listener(lambda _: closed.set())
            rows.connection.execute("SELECT pg_terminate_backend(%s)", (driver.get_server_pid(),))
            await_only(asyncio.wait_for(closed.wait(), 10))

    event.listen(sync_engine(engine), "commit", lose_once)
    run(engine, lambda session: session.add(Item(name="a")))
    assert rows.names == ["a"]


class HalfEnded(asyncpg.Connection):  # type: ignore[misc] # asyncpg has no types
    """A connection that fails like one that has read only the first part of what ends it."""

    async def prepare(self, query: str, *args: Any, **options: Any) -> Any:
        if query == "SELECT 'lost'":
            raise asyncpg.InternalClientError(
                "cannot switch to state 11; another operation (2) is in progress"
            )
        return await super().prepare(query, *args, **options)


@pytest.mark.parametrize("kind", [ASYNCPG], indirect=True, ids=lambda kind: kind.id)
def test_a_connection_that_asyncpg_finds_half_ended_is_replaced(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """Work that asyncpg cannot send, because the server is ending the connection, runs again."""
    pids: list[int] = []

    def work(session: Session) -> None:
        session.add(Item(name="a"))
        session.flush()
        pids.append(pid_of(session))
        if len(pids) == 1:
            session.execute(text("SELECT 'lost'"))

    run(make_engine(connect_args={"connection_class": HalfEnded}), work)
    assert (len(set(pids)), rows.names) == (2, ["a"])


@pytest.mark.driver_decides
@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.ANSWER_LOST], ids=lambda fault: fault.name)
def test_an_unknown_outcome_is_never_repeated(
    kind: Kind, behind_proxy: Engine, proxy: Proxy, rows: Rows, fault: Fault
) -> None:
    """Work that may be stored, because its connection was lost during COMMIT, is not retried."""
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        session.add(Item(name="a"))

    proxy.fault = fault
    with pytest.raises(CommitOutcomeUnknownError):
        run(behind_proxy, work)
    assert calls == 1
    assert rows.names == (["a"] if fault is Fault.ANSWER_LOST else [])


def test_a_cause_that_may_pass_is_enough(kind: Kind, engine: Engine, rows: Rows) -> None:
    """Work that raises another error because of a transient failure is retried."""
    work = Failing("40001", times=1)

    def mapping(session: Session) -> str:
        with http_errors(unique="Taken."):
            return work(session)

    assert run(engine, mapping) == "after 2"


def test_options_apply_to_every_attempt(kind: Kind, engine: Engine, rows: Rows) -> None:
    """The second attempt has the isolation level and the read-only mode of the first."""
    seen: list[tuple[str, str]] = []

    def work(session: Session) -> None:
        level = session.scalar(text("SHOW transaction_isolation"))
        seen.append((str(level), str(session.scalar(text("SHOW transaction_read_only")))))
        if len(seen) == 1:
            session.execute(text(fail_with("40001")))

    run(engine, work, isolation_level="SERIALIZABLE", read_only=True)
    assert seen == [("serializable", "on")] * 2


def test_pauses_grow_up_to_a_limit_and_jitter(
    monkeypatch: pytest.MonkeyPatch, postgres: WorkerPostgres, rows: Rows
) -> None:
    """A pause is a random part of a limit that doubles up to two seconds."""
    limits: list[float] = []
    slept: list[float] = []

    def longest(low: float, high: float) -> float:
        assert low == 0
        limits.append(high)
        return high / 100

    monkeypatch.setattr(random, "uniform", longest)
    monkeypatch.setattr(time, "sleep", slept.append)
    engine = create_engine(postgres.url("psycopg"))
    Database(engine).run_in_transaction(Failing("40001", times=5), attempts=6, backoff=0.25)
    engine.dispose()
    assert limits == [0.25, 0.5, 1, 2, 2]
    assert slept == [limit / 100 for limit in limits]


def test_no_attempt_is_begun_after_the_deadline(
    kind: Kind, engine: Engine, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause that would end after the deadline is not started, and the failure is raised."""
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    stopped = SimpleNamespace(monotonic=lambda: 0.0)  # so that only the pauses count
    monkeypatch.setattr(_retries, "time", stopped)
    work = Failing("40001", times=9)
    with pytest.raises(DBAPIError):
        run(engine, work, attempts=9, timeout=0.3, backoff=0.1)  # pauses: 0.1, 0.2, and no 0.4
    assert len(work.sessions) == 3


def test_a_cancelled_pause_ends_the_work(
    postgres: WorkerPostgres, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is cancelled during the pause makes no second attempt."""
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    work = Failing("40001", times=9)

    async def main() -> None:
        engine = create_async_engine(postgres.url("psycopg"))
        database = AsyncDatabase(engine)

        async def with_async_session(session: AsyncSession) -> str:
            return await session.run_sync(work)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await database.run_in_transaction(with_async_session, attempts=9, backoff=2)
        await engine.dispose()

    asyncio.run(main())
    assert len(work.sessions) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"attempts": 0}, ValueError),
        ({"attempts": -1}, ValueError),
        ({"attempts": 1.5}, TypeError),
        ({"timeout": -1}, ValueError),
        ({"backoff": float("nan")}, ValueError),
        ({"isolation_level": "SERIALISABLE"}, ValueError),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_the_work(
    kind: Kind, engine: Engine, options: dict[str, Any], error: type[Exception]
) -> None:
    """An invalid option raises an error that names its value, and the work does not run."""
    work = Failing("40001", times=0)
    with pytest.raises(error, match=str(next(iter(options.values())))):
        run(engine, work, **options)
    assert work.sessions == []


def test_a_synchronous_handle_refuses_a_coroutine(postgres: WorkerPostgres) -> None:
    """A sync handle raises TypeError for an `async def`, and the error names AsyncDatabase.

    The `async def` would do nothing and be committed.
    """
    engine = create_engine(postgres.url("psycopg"))

    async def work(session: Session) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match="AsyncDatabase"):
        Database(engine).run_in_transaction(work)  # type: ignore[unused-coroutine] # what is tested
    engine.dispose()


@pytest.mark.anyio
async def test_an_asynchronous_handle_refuses_a_def(postgres: WorkerPostgres) -> None:
    """An async handle raises TypeError for a `def`, and the error says that it needs `async def`.

    A `def` cannot await an AsyncSession.
    """
    engine = create_async_engine(postgres.url("psycopg"))

    def work(session: AsyncSession) -> None:
        session.add(Item(name="lost"))

    async def works(session: AsyncSession) -> AsyncGenerator[None]:
        yield

    for each in work, works:
        with pytest.raises(TypeError, match="needs an `async def`"):
            await AsyncDatabase(engine).run_in_transaction(each)  # type: ignore[arg-type] # likewise
    await engine.dispose()


# --- real contention ----------------------------------------------------------------------------

WRITERS = 20


def take_if_two_are_left(number: int) -> Work:
    """Return work that takes an item if two are left, and so always leaves an item if run alone."""

    def work(session: Session) -> bool:
        left = session.scalars(select(Item.name).where(Item.position > 0)).all()
        if len(left) < 2:
            return False
        session.execute(update(items).where(items.c.name == f"item-{number}").values(position=None))
        return True

    return work


def run_all(engine: Engine | AsyncEngine, works: list[Work], **options: Any) -> list[Any]:
    """Run all works at once, as tasks on one event loop or in threads."""
    if isinstance(engine, Engine):
        database = Database(engine)
        with disposing(engine), ThreadPoolExecutor(len(works)) as threads:
            run_one = functools.partial(database.run_in_transaction, **options)
            return list(threads.map(run_one, works))

    def asynchronous(work: Work) -> Callable[[AsyncSession], Awaitable[Any]]:
        return lambda session: session.run_sync(work)

    async def main() -> list[Any]:
        database = AsyncDatabase(engine)
        running = [database.run_in_transaction(asynchronous(work), **options) for work in works]
        try:
            return await asyncio.gather(*running)
        finally:
            await engine.dispose()

    return asyncio.run(main())


def test_write_skew_ends_right(
    kind: Kind, make_engine: MakeEngine, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty concurrent works that must leave one item leave exactly one, and all succeed."""
    for number in range(WRITERS):
        rows.add(f"item-{number}", number + 1)
    engine = make_engine(pool_size=WRITERS)
    works = [take_if_two_are_left(number) for number in range(WRITERS)]
    with caplog.at_level(logging.INFO, "fastapi_sqlnative"):
        taken = run_all(
            engine, works, isolation_level="SERIALIZABLE", attempts=100, timeout=40, backoff=0.02
        )
    found = rows.connection.execute("SELECT count(*) FROM item WHERE position > 0").fetchone()
    assert found == (1,)
    assert sum(taken) == WRITERS - 1
    assert [each for each in caplog.records if "retrying" in each.message], "nobody collided"


class Crossing:
    """Two works that change the same two rows in opposite order, so that they collide."""

    def __init__(self) -> None:
        self.halfway = {"a": Future[None](), "b": Future[None]()}
        self.attempts = 0

    def work(self, first: str, second: str) -> Work:
        def work(session: Session) -> None:
            self.attempts += 1
            session.execute(text(f"UPDATE crossing SET n = n + 1 WHERE name = '{first}'"))
            if not self.halfway[first].done():
                self.halfway[first].set_result(None)
            # Wait until each work has its first row and needs the other's.
            if session.get_bind().dialect.is_async:
                await_only(asyncio.wrap_future(self.halfway[second]))
            else:
                self.halfway[second].result(30)
            session.execute(text(f"UPDATE crossing SET n = n + 1 WHERE name = '{second}'"))

        return work

    def works(self) -> list[Work]:
        return [self.work("a", "b"), self.work("b", "a")]


CROSSING = (
    "DROP TABLE IF EXISTS crossing",
    "CREATE TABLE crossing (name varchar(9) PRIMARY KEY, n int)",
    "INSERT INTO crossing VALUES ('a', 0), ('b', 0)",
)


def check_crossing(engine: Engine | AsyncEngine, crossing: Crossing, outside: Engine) -> None:
    with outside.begin() as connection:
        for statement in CROSSING:
            connection.execute(text(statement))
    run_all(engine, crossing.works(), attempts=20)
    assert crossing.attempts >= 3  # more if the survivor wakes up late and they collide again
    with outside.connect() as connection:
        assert connection.execute(text("SELECT n FROM crossing")).scalars().all() == [2, 2]
    outside.dispose()


@pytest.mark.driver_decides
def test_a_deadlock_ends_right(
    kind: Kind, make_engine: MakeEngine, postgres: WorkerPostgres
) -> None:
    """Two works that lock the same rows in opposite order both succeed, one of them on a retry."""
    outside = create_engine(postgres.url("psycopg"))
    check_crossing(make_engine(), Crossing(), outside)


@pytest.mark.mariadb
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
def test_a_deadlock_on_mariadb_ends_right(mariadb: str, driver: str) -> None:
    """On MariaDB, whose deadlocks have another error code, both works succeed as well."""
    admin = make_url(mariadb).set(drivername="mysql+pymysql")
    server = create_engine(admin)
    with server.begin() as connection:
        connection.execute(text(f"CREATE OR REPLACE DATABASE sqlnative_crossing_{driver}"))
    server.dispose()
    url = admin.set(database=f"sqlnative_crossing_{driver}")
    create = create_async_engine if driver == "asyncmy" else create_engine
    engine = create(url.set(drivername=f"mysql+{driver}"))
    check_crossing(engine, Crossing(), create_engine(url))


@pytest.mark.mariadb
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
def test_an_unknown_second_phase_is_never_repeated(mariadb: str, driver: str) -> None:
    """Work whose connection is lost in MariaDB's second phase, and may be stored, is not retried.

    The second phase is a statement there.
    """
    url = make_url(mariadb).set(drivername="mysql+pymysql", database=f"sqlnative_phases_{driver}")
    server = create_engine(url.set(database=""))
    with server.begin() as connection:
        connection.execute(text(f"CREATE OR REPLACE DATABASE {url.database}"))
        connection.execute(text(f"CREATE TABLE {url.database}.phase (n int)"))
    calls = 0

    def work(session: Session) -> None:
        nonlocal calls
        calls += 1
        session.twophase = True
        session.execute(text("INSERT INTO phase VALUES (1)"))
        proxy.fault = Fault.ANSWER_LOST

    create = create_async_engine if driver == "asyncmy" else create_engine
    with Proxy(url.host or "", url.port or 3306).listening() as proxy:
        own = url.set(drivername=f"mysql+{driver}", port=proxy.own_port)
        with pytest.raises(CommitOutcomeUnknownError):
            run(create(own), work)
    with server.connect() as connection:
        stored = connection.scalar(text(f"SELECT count(*) FROM {url.database}.phase"))
    server.dispose()
    assert (calls, stored) == (1, 1)
