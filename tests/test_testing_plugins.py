"""The testing fixtures with the usual plugins, in suites as application authors write them."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import WorkerPostgres
from tests.serving import Rows

CONFTEST = """
import os
from typing import Annotated, Any
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from fastapi_sqlnative import get_db, install_database, transactional
from tests.serving import Base, Item

pytest_plugins = ["fastapi_sqlnative.testing.fixtures"]

def make_app(asynchronous: bool) -> FastAPI:
    app = FastAPI()
    make: Any = create_async_engine if asynchronous else create_engine
    engine = make(os.environ["DATABASE_URL"])
    install_database(app, engine=engine, shutdown=engine.dispose)
    query = select(Item.name).order_by(Item.name)

    async def names(session: Annotated[AsyncSession, Depends(get_db())]) -> list[str]:
        return list(await session.scalars(query))

    def sync_names(session: Annotated[Session, Depends(get_db())]) -> list[str]:
        return list(session.scalars(query))

    async def add(name: str, session: Annotated[AsyncSession, Depends(transactional())]) -> None:
        session.add(Item(name=name))

    def sync_add(name: str, session: Annotated[Session, Depends(transactional())]) -> None:
        session.add(Item(name=name))

    app.get("/names")(names if asynchronous else sync_names)
    app.post("/add")(add if asynchronous else sync_add)
    return app

@pytest.fixture(params=[True, False], ids=["async", "sync"])
def app(request):
    return make_app(request.param)

@pytest.fixture(scope="session")
def prepare_database():
    return Base.metadata.create_all
"""

SYNCHRONOUS = """
import factory
from factory.alchemy import SQLAlchemyModelFactory
from polyfactory.factories.sqlalchemy_factory import SQLAlchemyFactory
from datetime import datetime
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import scoped_session, sessionmaker
import pytest
import time_machine
from tests.serving import Item

Scoped = scoped_session(sessionmaker())

class ItemFactory(SQLAlchemyModelFactory):
    class Meta:
        model = Item
        sqlalchemy_session = Scoped
        sqlalchemy_session_persistence = "commit"

    name = factory.Sequence(lambda n: f"made-{n}")
    position = None

class PolyFactory(SQLAlchemyFactory[Item]):
    __model__ = Item
    id = None
    position = None

@pytest.fixture
def factories(isolated_session):
    Scoped.registry.set(isolated_session)
    PolyFactory.__session__ = isolated_session
    ItemFactory.reset_sequence()
    yield
    Scoped.registry.clear()

def test_factory_boy(factories, isolated_client):
    item = ItemFactory()
    assert isolated_client.get("/names").json() == [item.name] == ["made-0"]
    ItemFactory()
    assert isolated_client.get("/names").json() == ["made-0", "made-1"]

def test_polyfactory(factories, isolated_client, isolated_session):
    item = PolyFactory.create_sync(name="poly")
    assert isolated_client.get("/names").json() == ["poly"]
    isolated_client.post("/add?name=added")
    found = isolated_session.scalars(select(Item.name).order_by(Item.name))
    assert found.all() == ["added", "poly"]

class FlushedFactory(ItemFactory):
    class Meta:
        sqlalchemy_session_persistence = "flush"

def test_a_batch_that_is_flushed(factories, isolated_client, isolated_session):
    items = FlushedFactory.create_batch(3)
    assert len(isolated_client.get("/names").json()) == 3
    isolated_session.delete(items[0])
    assert isolated_client.get("/names").json() == ["made-1", "made-2"]

def test_a_duplicate(factories, isolated_client, isolated_session):
    ItemFactory(name="taken")
    with pytest.raises(IntegrityError):
        isolated_client.post("/add?name=taken")
    isolated_session.add(Item(name="taken"))
    with pytest.raises(IntegrityError):
        isolated_session.commit()
    isolated_session.rollback()
    assert isolated_client.get("/names").json() == ["taken"]

def test_the_query_of_old(isolated_client, isolated_session):
    isolated_client.post("/add?name=added")
    isolated_session.bulk_save_objects([Item(name="bulk")])
    assert isolated_session.query(Item).filter_by(name="added").one().position is None
    assert isolated_session.query(Item).count() == 2
    isolated_session.query(Item).delete()
    assert isolated_client.get("/names").json() == []

def test_another_time(isolated_client):
    with time_machine.travel("2031-01-01", tick=False):
        isolated_client.post(f"/add?name={datetime.now().year}")
    assert isolated_client.get("/names").json() == ["2031"]

def test_nothing_was_left(isolated_client):
    assert isolated_client.get("/names").json() == []
"""

ASYNCHRONOUS = """
import asyncio
import pytest
from sqlalchemy import select
from tests.serving import Item

async def test_the_async_client(isolated_async_client, isolated_session, statements):
    item = Item(name="mine")
    isolated_session.add(item)
    isolated_session.commit()
    isolated_session.refresh(item)
    statements.clear()
    assert (await isolated_async_client.get("/names")).json() == ["mine"]
    assert len(statements.queries) == 1
    assert (await isolated_async_client.post("/add?name=added")).status_code == 200
    found = isolated_session.scalars(select(Item.name).order_by(Item.name))
    assert found.all() == ["added", "mine"]

async def test_at_once(isolated_async_client, isolated_session):
    isolated_session.add(Item(name="mine"))
    paths = [f"/add?name={number}" for number in range(8)]
    answers = await asyncio.gather(*map(isolated_async_client.post, paths))
    assert {each.status_code for each in answers} == {200}
    assert len((await isolated_async_client.get("/names")).json()) == 9

async def test_nothing_is_left(isolated_async_client):
    assert (await isolated_async_client.get("/names")).json() == []

async def test_a_clone(cloned_async_client):
    await cloned_async_client.post("/add?name=cloned")
    assert (await cloned_async_client.get("/names")).json() == ["cloned"]
"""

OWN_FIXTURES = """
import asyncio
import pytest
import pytest_asyncio
from conftest import make_app
from fastapi_sqlnative.testing import async_client, isolated
from sqlalchemy import select
from tests.serving import Item

@pytest_asyncio.fixture
async def client():
    app = make_app(True)
    async with async_client(app) as client:
        client.app = app
        yield client

@pytest_asyncio.fixture
async def db_session(client):
    async with isolated(client.app) as session:
        yield session

async def test_own_fixtures(client, db_session):
    item = Item(name="mine")
    db_session.add(item)
    await db_session.commit()
    await db_session.refresh(item)
    assert (await client.get("/names")).json() == ["mine"]
    await client.post("/add?name=added")
    found = await db_session.scalars(select(Item.name).order_by(Item.name))
    assert found.all() == ["added", "mine"]
    db_session.add(Item(name="unflushed"))
    paths = [f"/add?name={number}" for number in range(8)]
    answers = await asyncio.gather(*map(client.post, paths))
    assert {each.status_code for each in answers} == {200}
    assert len((await client.get("/names")).json()) == 11
"""

STRICT = "import pytest\npytestmark = pytest.mark.asyncio\n" + ASYNCHRONOUS + OWN_FIXTURES
ANYIO_FIXTURES = """
import pytest
from sqlalchemy import select
from tests.serving import Item

@pytest.fixture(scope="module", autouse=True)
async def around_the_module():
    yield  # the tests run in the context of this fixture

@pytest.fixture
def item(isolated_session):
    isolated_session.add(item := Item(name="mine"))
    return item

@pytest.mark.anyio
async def test_what_a_synchronous_fixture_has_added(isolated_async_client, item, isolated_session):
    assert (await isolated_async_client.get("/names")).json() == ["mine"]
    assert (await isolated_async_client.post("/add?name=added")).status_code == 200
    isolated_session.rollback()
    found = isolated_session.scalars(select(Item.name).order_by(Item.name))
    assert found.all() == ["added", "mine"]

@pytest.mark.anyio
async def test_nothing_is_left(isolated_async_client):
    assert (await isolated_async_client.get("/names")).json() == []
"""

ANYIO = (
    "import pytest\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'\n"
    + ASYNCHRONOUS.replace("async def", "@pytest.mark.anyio\nasync def")
)

# Settings and test modules. Strict pytest-asyncio and anyio can be used in one suite.
SUITES = {
    "pytest-asyncio-auto": (
        "asyncio_mode = auto",
        {"auto": ASYNCHRONOUS + OWN_FIXTURES, "synchronous": SYNCHRONOUS},
    ),
    "others-on-two-workers": (
        "asyncio_mode = strict\naddopts = -n 2",
        {"strict": STRICT, "anyio": ANYIO, "every_backend_of_anyio": ANYIO_FIXTURES},
    ),
}
others = pytest.mark.slow("three interpreters, 8 s; the fixtures are those of the other suite")


@pytest.mark.timeout(240)  # a whole run of pytest, with clones
@pytest.mark.parametrize(
    "suite", ["pytest-asyncio-auto", pytest.param("others-on-two-workers", marks=others)]
)
def test_suites_of_applications(
    suite: str,
    tmp_path: Path,
    postgres: WorkerPostgres,
    rows: Rows,
    pytestconfig: pytest.Config,
) -> None:
    """Fixtures, factories and async clients work with each plugin, and leave nothing behind."""
    settings, modules = SUITES[suite]
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\n{settings}\nasyncio_default_fixture_loop_scope = function\n"
        "filterwarnings = error\n"
    )
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name, module in modules.items():
        (tmp_path / f"test_with_{name}.py").write_text(module)
    # This run's own options for warnings: the lowest versions raise further ones.
    warnings = [f"-W{each}" for each in pytestconfig.known_args_namespace.pythonwarnings or ()]
    # An application has only those of the plugins installed here that it uses.
    without = (
        f"-pno:{each}" for each in ("cacheprovider", "faker", "hypothesispytest", "schemathesis")
    )
    command = [sys.executable, "-m", "pytest", "-q", *without, *warnings, "."]
    environment = {
        "DATABASE_URL": postgres.url("psycopg"),
        "PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows.names == []
