"""PgBouncer in transaction mode: what has to be set, what works then, and what does not work."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, bindparam, create_engine, func, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

from conftest import SERVER, WorkerPostgres
from fastapi_sqlnative import (
    get_db,
    health_router,
    install_database,
    install_error_handlers,
    reader,
    transactional,
)
from tests.ha.pgbouncer import ROLE, PgBouncer, pgbouncer, version
from tests.serving import Item, Kind, Rows, copy, route, serve, wait_until

# The settings for each driver in docs/pgbouncer.md.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "psycopg": {"prepare_threshold": None},
    "asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
}
ROOT = Path(__file__).parents[2]


def engine_through(
    bouncer: PgBouncer, kind: Kind, postgres: WorkerPostgres, **options: Any
) -> Engine | AsyncEngine:
    """Build an engine as docs/pgbouncer.md says."""
    url = bouncer.through(make_url(postgres.url(kind.driver)))
    create = create_async_engine if kind.asynchronous else create_engine
    return create(url, **{"connect_args": SETTINGS[kind.driver], "pool_size": 8} | options)


def application(kind: Kind, engine: Engine | AsyncEngine) -> FastAPI:
    """Build an application that writes and reads in every way that the package offers."""
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    install_error_handlers(app)
    app.include_router(health_router(databases={"default": "writable"}, max_age=0.01))

    def add(session: Session) -> int:
        with session.begin_nested():
            item = Item(name=str(session.scalar(text("SELECT gen_random_uuid()"))))
            session.add(item)
        return item.id

    def add_and_commit(session: Session) -> int:
        found = add(session)
        session.commit()
        return found

    def level(session: Session) -> Any:
        found = session.scalar(text("SHOW transaction_isolation"))
        return found, session.scalar(text("SHOW transaction_read_only"))

    def read(session: Session) -> list[Any]:
        one = session.scalar(select(bindparam("x", 1)))
        return [one, session.scalar(select(bindparam("y", "two")))]

    def add_by_copy(session: Session) -> None:
        copy(session, str(session.scalar(text("SELECT gen_random_uuid()"))))

    def stream(session: Session) -> int:
        numbers = text("SELECT generate_series(1, 500)").execution_options(yield_per=50)
        return sum(session.scalars(numbers))

    snapshot = transactional(isolation_level="REPEATABLE READ", read_only=True)
    route(app, kind, "/transaction", transactional(), add)
    route(app, kind, "/by-hand", get_db(), add_and_commit)
    route(app, kind, "/snapshot", snapshot, level, status_code=200)
    route(app, kind, "/read", reader(), read, status_code=200)
    route(app, kind, "/copy", transactional(), add_by_copy)
    route(app, kind, "/stream", get_db(), stream, status_code=200)
    return app


ANSWERS = {
    "/transaction": (201, None),
    "/by-hand": (201, None),
    "/snapshot": (200, ["repeatable read", "on"]),
    "/read": (200, [1, "two"]),
    "/copy": (201, None),
    "/stream": (200, 125250),
}


def test_it_is_the_version_that_the_guide_names() -> None:
    """The installed PgBouncer has the version that docs/pgbouncer.md names."""
    assert f"PgBouncer {version()}" in (ROOT / "docs" / "pgbouncer.md").read_text("utf-8")


def test_every_kind_of_session_works(
    bouncer: PgBouncer, kind: Kind, postgres: WorkerPostgres, rows: Rows
) -> None:
    """With eight clients on three connections, every answer is right and every write is stored."""
    paths = [*ANSWERS] * 40
    with (
        serve(application(kind, engine_through(bouncer, kind, postgres))) as served,
        ThreadPoolExecutor(8) as threads,
    ):
        answers = list(threads.map(served.client.post, paths))
    for path, answer in zip(paths, answers, strict=True):
        status, body = ANSWERS[path]
        assert answer.status_code == status, f"{path} {answer.text}"
        assert body is None or answer.json() == body
    assert len(rows.names) == 3 * 40  # three paths write


FAILING = [
    pytest.param("psycopg", {}, psycopg.errors.DuplicatePreparedStatement, id="psycopg"),
    pytest.param("asyncpg", {}, None, id="asyncpg"),
    pytest.param("asyncpg", {"prepared_statement_cache_size": 0}, None, id="asyncpg-half"),
]


@pytest.mark.parametrize(("driver", "settings", "expected"), FAILING)
def test_without_the_settings_statements_get_lost(
    bouncer: PgBouncer,
    postgres: WorkerPostgres,
    rows: Rows,
    driver: str,
    settings: Mapping[str, Any],
    expected: type[Exception] | None,
) -> None:
    """Unless a driver has all of its settings, requests fail because of prepared statements."""
    kind = Kind(driver, driver, True)
    engine = engine_through(bouncer, kind, postgres, connect_args=settings)
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    failures: list[BaseException] = []

    @app.exception_handler(Exception)
    async def note(_request: object, error: Exception) -> Any:
        failures.append(error)
        raise error

    route(app, kind, "/read", reader(), lambda session: session.scalar(select(1)))
    with serve(app) as served, ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda _: served.client.post("/read").status_code, range(400))
        assert 500 in set(found)
    said = str(failures[0])
    assert "prepared statement" in said
    assert expected is None or any(isinstance(each.__cause__, expected) for each in failures)


@pytest.mark.parametrize("how", ["options", "server_settings"])
def test_parameters_at_the_start_are_refused(
    bouncer: PgBouncer, postgres: WorkerPostgres, how: str
) -> None:
    """Connecting with `options` or `server_settings` raises an error that names the parameter."""
    setting = {"statement_timeout": "1s"}
    drivers: dict[str, tuple[str, dict[str, Any]]] = {
        "options": ("psycopg", {"options": "-c statement_timeout=1s"}),
        "server_settings": ("asyncpg", {"server_settings": setting}),
    }
    driver, given = drivers[how]
    engine = engine_through(
        bouncer, Kind(driver, driver, True), postgres, connect_args={**SETTINGS[driver], **given}
    )
    assert isinstance(engine, AsyncEngine)
    name = "options" if how == "options" else "statement_timeout"

    async def connect() -> None:
        async with engine.connect():
            pass

    with pytest.raises(Exception, match=f"unsupported startup parameter(: | in ){name}"):
        asyncio.run(connect())


@pytest.fixture
def role(postgres: WorkerPostgres) -> Iterator[str]:
    """Create a role with its own `statement_timeout`."""
    with psycopg.connect(postgres.dsn, autocommit=True) as owner:
        owner.execute(f"DROP ROLE IF EXISTS {ROLE}")
        owner.execute(f"CREATE ROLE {ROLE} LOGIN")
        owner.execute(f"ALTER ROLE {ROLE} SET statement_timeout = '1234ms'")
        yield ROLE
        owner.execute(f"DROP ROLE {ROLE}")


def test_settings_of_the_role_get_through(
    bouncer: PgBouncer, kind: Kind, postgres: WorkerPostgres, role: str
) -> None:
    """A setting of the role applies to a connection that PgBouncer makes for it."""
    url = bouncer.through(make_url(postgres.url(kind.driver))).set(username=role, password=None)
    create = create_async_engine if kind.asynchronous else create_engine
    engine = create(url, connect_args=SETTINGS[kind.driver])
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    show = text("SHOW statement_timeout")
    route(app, kind, "/show", reader(), lambda session: session.scalar(show))
    with serve(app) as served:
        assert served.client.post("/show").json() == "1234ms"


def test_what_belongs_to_a_connection_is_somebody_elses(
    bouncer: PgBouncer, postgres: WorkerPostgres
) -> None:
    """After `SET` without `LOCAL`, another client has the setting and the first client may not."""
    dsn = bouncer.dsn(postgres.dsn)
    asked = "SELECT current_setting('bookshop.tenant', true)"
    with psycopg.connect(dsn, autocommit=True) as one, psycopg.connect(dsn, autocommit=True) as two:
        one.execute("SET bookshop.tenant = 'acme'")
        with two.transaction():
            # This is the only server connection so far, and the other client has changed it.
            assert two.execute(asked).fetchone() == ("acme",)
            assert one.execute(asked).fetchone() == (None,)


def test_readiness_while_it_is_paused(
    bouncer: PgBouncer, kind: Kind, postgres: WorkerPostgres
) -> None:
    """Readiness fails only during a pause longer than `down_after`, and recovers when it ends."""
    app = FastAPI()
    engine = engine_through(bouncer, kind, postgres)
    install_database(app, engine=engine, shutdown=engine.dispose)
    for prefix, seconds in ("/patient", 120), ("/impatient", 0.5):
        router = health_router(prefix=prefix, timeout=0.2, max_age=0.01, down_after=seconds)
        app.include_router(router)
    with serve(app) as served:

        def status(prefix: str) -> str:
            answered: str = served.client.get(f"{prefix}/ready").json()["status"]
            return answered

        assert [status("/patient"), status("/impatient")] == ["ready", "ready"]
        bouncer.command(f"PAUSE {database_of(postgres)}")
        wait_until(lambda: status("/impatient") == "not_ready")
        assert status("/patient") == "ready"
        assert served.client.get("/patient/live").status_code == 200
        bouncer.command(f"RESUME {database_of(postgres)}")
        wait_until(lambda: status("/impatient") == "ready")
        assert status("/patient") == "ready"


def test_readiness_while_it_queues(
    bouncer: PgBouncer, kind: Kind, postgres: WorkerPostgres, rows: Rows
) -> None:
    """Requests that queue in PgBouncer succeed, and readiness meanwhile keeps its last answer."""
    app = application(kind, engine_through(bouncer, kind, postgres))
    lock = select(func.pg_advisory_xact_lock(7))
    route(app, kind, "/wait", transactional(), lambda session: session.execute(lock).scalar())
    with serve(app) as served, ThreadPoolExecutor(6) as threads:
        assert served.client.get("/health/ready").json()["status"] == "ready"
        with psycopg.connect(postgres.dsn) as holder:
            holder.execute("SELECT pg_advisory_xact_lock(7)")
            waiting = [threads.submit(served.client.post, "/wait") for _ in range(6)]
            wait_until(lambda: clients_waiting(bouncer, postgres) >= 3)
            assert served.client.get("/health/ready").json() == {
                "status": "ready",
                "databases": {"default": "up"},
                "checks": {},
            }
        assert {each.result(20).status_code for each in waiting} == {201}


def test_readiness_while_it_accepts_no_more_clients(
    pytestconfig: pytest.Config, kind: Kind, postgres: WorkerPostgres
) -> None:
    """If PgBouncer has no place for another client, a pool that is in use is only saturated."""
    limit, server = {"max_client_conn": "2"}, pytestconfig.stash[SERVER].url
    with pgbouncer(server, connections=2, options=limit) as bouncer:
        app = application(kind, engine_through(bouncer, kind, postgres))
        lock = select(func.pg_advisory_xact_lock(7))
        route(app, kind, "/wait", transactional(), lambda session: session.execute(lock).scalar())
        with serve(app) as served, ThreadPoolExecutor(1) as threads:
            with psycopg.connect(postgres.dsn) as holder:
                holder.execute("SELECT pg_advisory_xact_lock(7)")
                waiting = threads.submit(served.client.post, "/wait")
                wait_until(lambda: in_use(bouncer, postgres) == 1)
                with psycopg.connect(bouncer.dsn(postgres.dsn)):
                    asked = served.client.get("/health/ready")
                    refused = served.client.post("/transaction")
            assert waiting.result(20).status_code == 201
    assert asked.json()["databases"] == {"default": "saturated"}
    assert asked.status_code == 200
    assert refused.json() == {"detail": "The service is busy. Try again."}


def database_of(postgres: WorkerPostgres) -> str:
    return str(make_url(postgres.dsn).database)


def in_use(bouncer: PgBouncer, postgres: WorkerPostgres) -> int:
    return _count(bouncer, postgres, 2)


def clients_waiting(bouncer: PgBouncer, postgres: WorkerPostgres) -> int:
    return _count(bouncer, postgres, 3)


def _count(bouncer: PgBouncer, postgres: WorkerPostgres, column: int) -> int:
    pools = bouncer.command("SHOW POOLS")
    return sum(int(str(each[column])) for each in pools if each[0] == database_of(postgres))


# This test identifies the server's backends by libpq's pid, which PgBouncer makes up.
BY_PID = "examples/showcase/test_showcase.py::test_the_user_is_read_in_the_transaction"


@pytest.mark.timeout(300)
def test_the_showcase_passes_through_it(bouncer: PgBouncer, pytestconfig: pytest.Config) -> None:
    """All showcase tests but `BY_PID` pass through PgBouncer, with only `SETTINGS` added."""
    passed = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "examples/showcase", "--postgres=url"),
            *("-p", "tests.ha.showcase_through_pgbouncer", "-q", "--timeout=120"),
            f"--deselect={BY_PID}",
        ],
        cwd=ROOT,
        env={**os.environ, "TEST_DATABASE_URL": bouncer.dsn(pytestconfig.stash[SERVER].url)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert passed.returncode == 0, passed.stdout + passed.stderr
