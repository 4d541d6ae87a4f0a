"""`cloned`: a real database for each test, from a template that is made once."""

import asyncio
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from sqlalchemy import Connection, Engine, create_engine, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from fastapi_sqlnative import install_database, reader, transactional
from fastapi_sqlnative._sessions.engines import run_on_engine, sync_engine
from fastapi_sqlnative.testing import IsolationError, Templates, async_client, cloned, isolated
from tests.conftest import MakeEngine, asynchronous
from tests.serving import KINDS, Base, Item, Kind, Rows, route


def add(session: Session) -> None:
    session.add(Item(name="added"))


def names(session: Session) -> list[str]:
    return list(session.scalars(select(Item.name).order_by(Item.name)))


def prepare(connection: Connection) -> None:
    Base.metadata.create_all(connection)
    connection.execute(text("INSERT INTO item (name) VALUES ('seeded')"))


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    with Templates(prepare) as templates:
        yield templates


def make_app(kind: Kind, engine: Any) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=getattr(engine, "dispose", None))
    route(app, kind, "/add", transactional(), add)
    route(app, kind, "/names", reader(), names)
    return app


def databases(rows: Rows) -> int:
    """Count the databases made of this worker's, because other workers clone at the same time."""
    asked = "SELECT count(*) FROM pg_database WHERE datname ~ ('^' || %s || '_[0-9]+_')"
    found = rows.connection.execute(asked, [rows.connection.info.dbname]).fetchone()
    assert found is not None
    return int(found[0])


def test_templates_that_nobody_would_drop_are_refused(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """`cloned` makes templates only within their block, which drops them, and raises outside it."""
    app = make_app(kind, make_engine())
    templates = Templates(prepare)
    before = databases(rows)
    with templates, cloned(app, templates=templates):
        assert databases(rows) == before + 2
    assert databases(rows) == before
    for each in (templates, Templates(prepare)):
        with pytest.raises(RuntimeError, match="with Templates"), cloned(app, templates=each):
            pass


@pytest.mark.parametrize("given", ["engine", "factory"])
def test_each_block_has_a_database_of_its_own(
    kind: Kind, make_engine: MakeEngine, rows: Rows, templates: Templates, given: str
) -> None:
    """Each block's database starts as the template, keeps what is committed, and is dropped."""
    app = make_app(kind, make_engine() if given == "engine" else make_engine)
    for _ in range(2):
        with cloned(app, templates=templates):
            before = databases(rows)
            with TestClient(app) as client, ThreadPoolExecutor(4) as threads:
                assert client.post("/names").json() == ["seeded"]
                assert client.post("/add").status_code == 201
                answers = threads.map(lambda _: client.post("/names").json(), range(4))
                assert [*answers] == [["added", "seeded"]] * 4
        assert databases(rows) == before - 1
    with TestClient(app) as client:
        assert client.post("/names").json() == rows.names == []


def test_a_template_that_could_not_be_prepared_leaves_no_connection(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """If a template cannot be prepared, the engine connects to the installed database again.

    Its migration may have failed, for example.
    """

    def migrate(connection: Connection) -> None:
        connection.execute(text("SELECT 1/0"))

    app = make_app(kind, make_engine())
    with Templates(migrate) as failing:
        with pytest.raises(DBAPIError), cloned(app, templates=failing):
            pass
        with TestClient(app) as client:
            assert client.post("/add").status_code == 201
    assert rows.names == ["added"]


def test_a_clone_inside_another_hides_it(
    kind: Kind, make_engine: MakeEngine, templates: Templates, rows: Rows
) -> None:
    """A clone inside another has its own rows, of its own template, until its block ends.

    One may be for the whole run and the other for a test.
    """
    engine = make_engine()
    app = make_app(kind, engine)

    def asked(add: bool = False) -> object:
        with TestClient(app) as client:
            if add:
                client.post("/add")
            return client.post("/names").json()

    with cloned(app, templates=templates):
        assert asked(add=True) == ["added", "seeded"]
        with Templates(Base.metadata.create_all) as empty, cloned(app, templates=empty):
            assert asked() == []
        with cloned(app, templates=templates):
            assert asked() == ["seeded"]
        assert asked() == ["added", "seeded"]
    assert rows.names == []


@pytest.mark.parametrize(
    "kind", [each for each in KINDS if not each.asynchronous], ids=lambda kind: kind.id
)
def test_an_engine_that_has_connections_already(
    kind: Kind, make_engine: MakeEngine, templates: Templates, rows: Rows
) -> None:
    """Connections that wait in an engine's pool are never used for another database."""
    engine: Any = make_engine()
    app = make_app(kind, make_engine())
    install_database(app, name="second", engine=engine)  # shares the first one's clone
    engine.connect().close()
    with cloned(app, templates=templates), engine.connect() as connection:
        assert connection.scalars(select(Item.name)).all() == ["seeded"]
    with engine.connect() as connection:
        assert connection.scalars(select(Item.name)).all() == []
    engine.dispose()


def test_two_names_of_one_database_share_its_clone(
    kind: Kind, make_engine: MakeEngine, templates: Templates
) -> None:
    """Two names of one database share its clone: rows stored under one are read under the other."""
    app = make_app(kind, make_engine())
    engine = make_engine()
    install_database(app, name="other", engine=engine, shutdown=engine.dispose)
    route(app, kind, "/other", reader("other"), names)
    with cloned(app, templates=templates), TestClient(app) as client:
        assert client.post("/add").status_code == 201
        assert client.post("/other").json() == ["added", "seeded"]


@pytest.mark.parametrize("given", ["engine", "factory"])
def test_clones_of_one_database_are_isolated_apart(
    kind: Kind, make_engine: MakeEngine, given: str
) -> None:
    """Two names with different templates are isolated from each other, each on its own clone."""
    app = FastAPI()
    for name in ("default", "other"):
        engine = make_engine() if given == "engine" else make_engine
        install_database(app, name=name, engine=engine, shutdown=getattr(engine, "dispose", None))
    route(app, kind, "/add", transactional(), add)
    route(app, kind, "/other", reader("other"), names)
    with (
        Templates({"default": prepare, "other": Base.metadata.create_all}) as templates,
        cloned(app, templates=templates),
        TestClient(app) as client,
        isolated(app),
    ):
        assert client.post("/add").status_code == 201
        assert client.post("/other").json() == []


@asynchronous
def test_a_block_that_could_not_be_entered_leaves_nothing_behind(
    kind: Kind, make_engine: MakeEngine
) -> None:
    """A block on another event loop than the outer block's raises, and the outer one can end."""
    app = FastAPI()
    for name in ("default", "other"):
        engine = make_engine()
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
        route(app, kind, f"/{name}", transactional(name), add)
    stack = AsyncExitStack()

    async def begin() -> None:
        client = await stack.enter_async_context(async_client(app))
        await stack.enter_async_context(isolated(app))
        for name in ("default", "other"):
            assert (await client.post(f"/{name}")).status_code == 201

    with (
        Templates({"default": prepare, "other": Base.metadata.create_all}) as templates,
        cloned(app, templates=templates),
        asyncio.Runner() as loop,
        asyncio.Runner() as another,
    ):
        loop.run(begin())
        with pytest.raises(IsolationError, match="'default' is isolated: its event loop"):
            another.run(isolated(app).__aenter__())
        loop.run(stack.aclose())


async def prepare_later(connection: Connection) -> None:
    raise AssertionError(connection)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        ({"analytics": prepare}, ValueError, r"'default', only for \['analytics'\]"),
        ({"default": prepare_later}, TypeError, "'default' is an `async def`"),
        (prepare_later, TypeError, "'default' is an `async def`"),
    ],
    ids=["missing", "async-of-a-name", "async"],
)
def test_what_cannot_prepare_a_template_is_refused(
    kind: Kind, make_engine: MakeEngine, prepare: Any, error: type[Exception], message: str
) -> None:
    """A missing or asynchronous `prepare` raises an error that names the database."""
    app = make_app(kind, make_engine())
    refused = pytest.raises(error, match=message)
    with Templates(prepare) as templates, refused, cloned(app, templates=templates):
        pass


@pytest.mark.anyio
async def test_on_an_event_loop(
    kind: Kind, make_engine: MakeEngine, templates: Templates, rows: Rows
) -> None:
    """On an event loop, sessions and Core use the clone, and the engine's listeners are called."""

    def names_in_core(engine: Engine) -> list[str]:
        with engine.connect() as connection:
            return list(connection.scalars(select(Item.name)))

    engine = make_engine()
    app = make_app(kind, engine)
    heard: list[object] = []
    inner = sync_engine(engine)
    event.listen(inner, "connect", lambda *_: heard.append(1))
    with cloned(app, templates=templates):
        async with async_client(app) as client:
            assert (await client.post("/names")).json() == ["seeded"]
            assert heard
            assert await run_on_engine(engine, names_in_core) == ["seeded"]
    assert rows.names == []


def test_alembic_makes_a_template(kind: Kind, make_engine: MakeEngine) -> None:
    """Alembic migrates a template over the connection that it receives, of either colour."""

    def migrate(connection: Connection) -> None:
        config = Config(Path(__file__).parents[1] / "migrations_example" / "alembic.ini")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    app = make_app(kind, make_engine())
    revision = text("SELECT count(*) FROM alembic_version")
    route(app, kind, "/revisions", reader(), lambda session: session.scalar(revision))
    with Templates(migrate) as templates:
        for _ in range(2):
            with cloned(app, templates=templates), TestClient(app) as client:
                assert client.post("/revisions").json() == 1


def test_what_cannot_be_cloned_is_named(
    kind: Kind, make_engine: MakeEngine, templates: Templates
) -> None:
    """A running application and SQLite in memory raise errors that name the problem."""
    app = make_app(kind, make_engine())
    with TestClient(app), pytest.raises(IsolationError, match=r"enter cloned\(\) first"):
        cloned(app, templates=templates).__enter__()
    memory = make_app(kind, create_engine("sqlite://"))
    with pytest.raises(IsolationError, match="cannot be cloned"):
        cloned(memory, templates=templates).__enter__()


def test_an_engine_with_a_creator_is_refused(tmp_path: Path, templates: Templates) -> None:
    """An engine with `creator=` cannot be cloned, because it would use the installed database."""
    creator: Callable[[], Any] = lambda: sqlite3.connect(tmp_path / "installed.db")  # noqa: E731
    app = make_app(
        Kind("", "", False), create_engine(f"sqlite:///{tmp_path}/a.db", creator=creator)
    )
    with pytest.raises(IsolationError, match="creator="):
        cloned(app, templates=templates).__enter__()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sqlite3", "aiosqlite"])
def test_sqlite(asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SQLite, the template's file is copied, and all files are removed at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine: Engine | AsyncEngine = (
        create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db")
        if asynchronous
        else create_engine(f"sqlite:///{tmp_path}/a.db")
    )
    app = make_app(Kind("", "", asynchronous), engine)
    with Templates(prepare) as templates:
        for _ in range(2):
            with cloned(app, templates=templates), TestClient(app) as client:
                assert client.post("/add").status_code == 201
                assert client.post("/names").json() == ["added", "seeded"]
    assert [*tmp_path.iterdir()] == []
