"""What the suite shares: the application on one database, and what its databases begin with."""

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
    """Give the database that all isolated tests share: none of them leaves anything there."""
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
    """Say what makes the tables of a clone; in production Alembic does."""
    return Base.metadata.create_all


Scoped = scoped_session(sessionmaker())


class ShowFactory(SQLAlchemyModelFactory):
    """Make shows, in the test's own session."""

    class Meta:  # pyright: ignore[reportIncompatibleVariableOverride] # as factory_boy wants it
        model = Show
        sqlalchemy_session = Scoped
        sqlalchemy_session_persistence = "flush"

    title = Sequence(lambda number: f"Show {number}")  # type: ignore[no-untyped-call]
    left = 1


@pytest.fixture
def show_factory(isolated_session: Session) -> Iterator[type[ShowFactory]]:
    """Give the factory, with the session of this test."""
    Scoped.registry.set(isolated_session)
    yield ShowFactory
    Scoped.registry.clear()
