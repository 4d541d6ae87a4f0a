"""The password of a database appears in no message, log record or repr, however it was given.

The package's own messages do not show its address, either.
"""

import asyncio
import functools
import logging
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from alembic.command import upgrade
from alembic.config import Config
from fastapi import Depends, FastAPI
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import Engine, create_engine, insert, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from conftest import WorkerPostgres
from examples.__main__ import main
from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    health_router,
    http_errors,
    install_database,
    install_error_handlers,
    installed_databases,
    transactional,
)
from fastapi_sqlnative._sessions.engines import dispose
from fastapi_sqlnative.exceptions import CommitOutcomeUnknownError
from fastapi_sqlnative.health import ReadinessCheck
from fastapi_sqlnative.migrations import alembic_check
from fastapi_sqlnative.telemetry import instrument_pools
from fastapi_sqlnative.testing import Templates, capture_statements, cloned, override_database
from tests.in_process import running, start_and_stop
from tests.proxy import Fault, Proxy
from tests.serving import Item, Kind, Rows, route

pytestmark = pytest.mark.anyio

CANARY = "canary7h3n"
HOST = "127.0.0.1"
NOBODY = 1  # a port on which no server listens
ROOT = Path(__file__).parents[1]
MIGRATIONS = ROOT / "migrations_example" / "alembic.ini"


class Heard(logging.Handler):
    """A handler that collects all log records as they are printed, and other output."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))
        self.texts: list[str] = []
        self.own: list[str] = []  # written by the package alone, unlike a traceback

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))
        if record.name == "fastapi_sqlnative":
            self.own.append(record.getMessage())

    def raised(self, error: BaseException) -> None:
        """Add an exception, with its causes and notes, as a server would log it."""
        self.texts.append("".join(traceback.format_exception(error)))
        self.texts.append(repr(error))

    def answered(self, response: httpx.Response) -> None:
        """Add a response as a client sees it."""
        self.own.append(f"{response.status_code} {dict(response.headers)} {response.text}")


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Yield a handler of all loggers, and assert at the end that it found no password.

    In what the package itself has written, there is no address, either.
    """
    handler = Heard()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)
    heard = handler.texts + handler.own
    assert heard, "nothing was heard"
    assert not [text for text in heard if CANARY in text]
    assert not [text for text in handler.own if HOST in text]


Build = Callable[..., Engine | AsyncEngine]


@pytest.fixture
def build(kind: Kind, postgres: WorkerPostgres) -> Build:
    """Return a function that builds engines with the password wherever it can be given.

    The server of the tests needs no password.
    """

    def make(port: int | None = None, **options: Any) -> Engine | AsyncEngine:
        url = make_url(postgres.url(kind.driver))
        url = url.set(host=HOST, port=port or url.port, password=CANARY)
        url = url.update_query_dict({"password": CANARY})
        given = {"ssl": False} if kind.driver == "asyncpg" else {"sslmode": "disable"}
        create = create_async_engine if kind.asynchronous else create_engine
        return create(url, connect_args=given | {"password": CANARY}, **options)

    return make


def add(session: Any) -> None:
    session.execute(insert(Item).values(name="x"))


def application(kind: Kind, engine: Engine | AsyncEngine, **options: Any) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, **{"shutdown": engine.dispose, **options})
    route(app, kind, "/items", transactional(), add)
    return app


async def test_what_is_printed_of_a_database(build: Build, kind: Kind, heard: Heard) -> None:
    """A handle, its pool status and an app's installations are printed without an address.

    A handle is printed with its driver.
    """
    app = application(kind, build())
    async with running(app):
        database = installed_databases(app)["default"]
        assert repr(database).startswith(f"<{type(database).__name__} 'default' postgresql+")
        for shown in (database, database.pool_status(), installed_databases(app), app.state._state):
            heard.own += [repr(shown), str(shown)]


@pytest.mark.parametrize("problem_details", [False, True])
async def test_a_database_that_is_away(
    build: Build, kind: Kind, heard: Heard, problem_details: bool
) -> None:
    """A failed request or readiness check shows no address, and a failed ping no password."""
    app = application(kind, build(NOBODY))
    app.include_router(health_router(checks={"migrations": alembic_check(MIGRATIONS)}))
    install_error_handlers(app, problem_details=problem_details)
    async with running(app) as client:
        for response in await client.post("/items"), await client.get("/health/ready"):
            assert response.status_code == 503
            heard.answered(response)
        with pytest.raises(Exception) as raised:  # noqa: PT011 # the driver's own
            await ping(installed_databases(app)["default"])
        heard.raised(raised.value)


async def ping(database: Database | AsyncDatabase) -> None:
    if isinstance(database, AsyncDatabase):
        await database.ping()
    else:
        await asyncio.to_thread(database.ping)


async def test_an_unanswered_failure(build: Build, kind: Kind, heard: Heard) -> None:
    """The server's log of an unhandled failure shows no password."""
    app = application(kind, build(NOBODY))
    async with running(app) as client:
        with pytest.raises(Exception) as raised:  # noqa: PT011 # the driver's own
            await client.post("/items")
        heard.raised(raised.value)


async def test_a_start_that_fails(build: Build, kind: Kind, heard: Heard) -> None:
    """A start that waits in vain names the database in its error, and shows no password."""
    with pytest.raises(Exception, match="Database 'default' did not answer") as raised:
        await start_and_stop(application(kind, build(NOBODY), startup_wait=0.2))
    heard.raised(raised.value)


async def test_a_shutdown_that_fails(build: Build, kind: Kind, heard: Heard) -> None:
    """A failing shutdown hook and a connection still in use are reported without a password."""

    async def fail() -> None:
        raise OSError("the hook has failed")

    engine = build()
    app = application(kind, engine, shutdown=fail, shutdown_timeout=0.05)
    lifespan = app.router.lifespan_context(app)
    await lifespan.__aenter__()
    database: Any = installed_databases(app)["default"]
    async with AsyncExitStack() as closing:
        closing.push_async_callback(dispose, engine)
        if kind.asynchronous:
            await (await closing.enter_async_context(database.session())).connection()
        else:
            closing.enter_context(database.session()).connection()
        with pytest.raises(ExceptionGroup) as raised:
            await lifespan.__aexit__(None, None, None)
        heard.raised(raised.value)
    assert any("still in use" in text for text in heard.own)


async def test_a_commit_whose_answer_is_lost(
    build: Build, kind: Kind, heard: Heard, proxy: Proxy, rows: Rows
) -> None:
    """An unknown outcome of a COMMIT is reported without a password, and without an address."""
    proxy.fault = Fault.ANSWER_LOST
    async with running(application(kind, build(proxy.own_port))) as client:
        with pytest.raises(CommitOutcomeUnknownError) as raised:
            await client.post("/items")
        heard.raised(raised.value)
        heard.own.append(str(raised.value))
    assert rows.names == ["x"]


async def test_metrics(build: Build, kind: Kind, heard: Heard, rows: Rows) -> None:
    """The metrics of a pool have the name of its database, and no address."""
    app = application(kind, build())
    reader = InMemoryMetricReader()
    instrument_pools(app, meter_provider=MeterProvider([reader]))
    async with running(app) as client:
        assert (await client.post("/items")).status_code == 201
        data = reader.get_metrics_data()
        assert data is not None
        heard.own.append(data.to_json())
    assert '"default"' in heard.own[-1]


async def test_the_toolkit(build: Build, kind: Kind, heard: Heard, rows: Rows) -> None:
    """Clones, overrides and captures work on a database with a password and do not show it."""
    app = application(kind, build())
    with Templates(lambda _engine: None) as templates, cloned(app, templates=templates):
        async with running(app):
            heard.texts.append(repr(installed_databases(app)["default"]))
    other = build()
    with (
        pytest.raises(ValueError, match="leads to the very database") as raised,
        override_database(app, "default", engine=other),
    ):
        pass
    heard.raised(raised.value)
    async with running(app) as client:
        with capture_statements(app) as statements:
            assert (await client.post("/items")).status_code == 201
        heard.texts += [repr(statements), *map(repr, statements)]
    assert rows.names == ["x"]


# In the query as well, because SQLAlchemy prints such a password.
ADDRESS = f"postgresql+psycopg://ada:{CANARY}@127.0.0.1:{NOBODY}/shop?password={CANARY}"


def build_with(settings: object, url: str = ADDRESS) -> Engine:
    raise NotImplementedError


def check_with(app: FastAPI, settings: object, url: str = ADDRESS) -> bool:
    raise NotImplementedError


# `Any`, because a type checker would find these mistakes.
install: Any = install_database
sync: Any = Database
asynchronous: Any = AsyncDatabase
block: Any = http_errors


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: install(FastAPI(), engine=ADDRESS),
        lambda: install(FastAPI(), engine=make_url(ADDRESS)),
        lambda: install(FastAPI(), engine=build_with),
        lambda: install(
            FastAPI(),
            engine=functools.partial(build_with, url=ADDRESS),
        ),
        lambda: install(
            FastAPI(),
            engine=create_engine(ADDRESS),
            shutdown=build_with,
        ),
        lambda: sync(ADDRESS),
        lambda: asynchronous(create_engine(ADDRESS)),
        lambda: block(ADDRESS),
        lambda: block(create_engine(ADDRESS.replace(f":{CANARY}", "") + f"?password={CANARY}")),
        lambda: health_router(checks={"x": functools.partial(check_with, url=ADDRESS)}),
        lambda: health_router(
            checks={"x": ReadinessCheck(functools.partial(check_with, url=ADDRESS))}
        ),
    ],
)
def test_mistakes(mistake: Callable[[], object], heard: Heard) -> None:
    """The TypeError for a wrong argument shows neither its value nor its parameters' defaults."""
    with pytest.raises(TypeError) as raised:
        mistake()
    heard.texts += [str(raised.value), repr(raised.value)]


async def test_a_factory_of_something_else(heard: Heard) -> None:
    """A factory that returns a URL raises an error that names the returned type and not the URL."""
    app = FastAPI()
    install_database(app, engine=lambda: ADDRESS)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="it returned str") as raised:
        await start_and_stop(app)
    heard.texts.append(str(raised.value))


async def test_two_databases_that_are_dependencies(heard: Heard) -> None:
    """A printed dependency shows no password."""
    heard.texts += [repr(transactional("x")), repr(Annotated[object, Depends(transactional())])]


@pytest.mark.parametrize(
    "address",
    [
        ADDRESS,
        f"ada:{CANARY}@127.0.0.1/shop",
    ],
    ids=["away", "no-address"],
)
@pytest.mark.parametrize(
    "command",
    [lambda: main(["quick_start"]), lambda: upgrade(Config(MIGRATIONS), "head")],
    ids=["example", "migration"],
)
def test_commands(
    command: Callable[[], None],
    address: str,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Examples and migrations that cannot connect print no password."""
    monkeypatch.setenv("PORT", "0")
    monkeypatch.setenv("DATABASE_URL", address)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep pytest's handlers
    with pytest.raises((SystemExit, SQLAlchemyError, ValueError)) as raised:
        command()
    heard.raised(raised.value)
    heard.texts += capfd.readouterr()
