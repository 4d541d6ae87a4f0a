"""Fixtures for the suite: the application, its database, and the contents of clones."""

from collections.abc import Callable, Iterator

import pytest
from factory.alchemy import SQLAlchemyModelFactory
from factory.declarations import Sequence
from fastapi import FastAPI
from sqlalchemy import Connection
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from conftest import SERVER, PostgresDatabase, fresh_database
from examples.testing.app import Base, Show, create_app

# In the conftest.py at the top of your tests: pytest_plugins = [this module's name].
from fastapi_sqlnative.testing.fixtures import (
    cloned_client,
    database_templates,
    isolated_async_client,
    isolated_client,
    isolated_session,
    statements,
)

__all__ = [
    "cloned_client",
    "database_templates",
    "isolated_async_client",
    "isolated_client",
    "isolated_session",
    "statements",
]


@pytest.fixture(scope="module")
def database_url(pytestconfig: pytest.Config) -> Iterator[str]:
    """Provide the database that all isolated tests share, in which they leave nothing behind."""
    worker = getattr(pytestconfig, "workerinput", {}).get("workerid", "main")
    server = pytestconfig.stash[SERVER].url
    with fresh_database(server, f"sqlnative_{worker}_testing") as dsn:  # yours: os.environ[...]
        yield PostgresDatabase(dsn).url("psycopg")


@pytest.fixture(scope="module")
def app(database_url: str) -> FastAPI:
    """Build the application once; the clients start it for each test."""
    return create_app(database_url)


@pytest.fixture(scope="session")
def prepare_database() -> Callable[[Connection], object]:
    """Return the function that creates a clone's tables; in production, use Alembic."""
    return Base.metadata.create_all


Scoped = scoped_session(sessionmaker())


class ShowFactory(SQLAlchemyModelFactory):
    """A factory that creates shows in the test's own session."""

    class Meta:  # pyright: ignore[reportIncompatibleVariableOverride] # as factory_boy wants it
        model = Show
        sqlalchemy_session = Scoped
        sqlalchemy_session_persistence = "flush"

    title = Sequence(lambda number: f"Show {number}")  # type: ignore[no-untyped-call]
    left = 1


@pytest.fixture
def show_factory(isolated_session: Session) -> Iterator[type[ShowFactory]]:
    """Provide the factory with this test's session."""
    Scoped.registry.set(isolated_session)
    yield ShowFactory
    Scoped.registry.clear()
