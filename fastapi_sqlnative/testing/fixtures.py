"""Ready-made pytest fixtures. They need a fixture `app` of your own.

Write in your `conftest.py`:

    pytest_plugins = ["fastapi_sqlnative.testing.fixtures"]

or import the fixtures that you want, with `isolated_client`, `cloned_client` and
`database_templates`, on which the others depend. The asynchronous clients work with pytest-asyncio
and anyio, because the application has its own event loop. `cloned_client` also needs a fixture
`prepare_database` with the argument of `Templates`, such as `Base.metadata.create_all`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.testclient import TestClient

from . import CapturedStatements, Templates, capture_statements, cloned, isolated
from ._client import client_beside

if TYPE_CHECKING:
    import httpx

__all__ = [
    "cloned_async_client",
    "cloned_client",
    "database_templates",
    "isolated_async_client",
    "isolated_client",
    "isolated_session",
    "statements",
]


@pytest.fixture
def isolated_client(app: Starlette) -> Generator[TestClient]:
    """Yield a client for the running application, whose databases are isolated for the test."""
    with TestClient(app) as client, isolated(app):
        yield client


@pytest.fixture
def isolated_session(app: Starlette, isolated_client: TestClient) -> Generator[Session]:
    """Yield the test's own session in the isolated databases; sync even for an AsyncEngine."""
    with isolated(app) as session:
        yield session


@pytest.fixture
def isolated_async_client(isolated_client: TestClient) -> httpx.AsyncClient:
    """Return an asynchronous client for the same application."""
    return client_beside(isolated_client)


@pytest.fixture(scope="session")
def database_templates(prepare_database: Any) -> Generator[Templates]:
    """Yield the templates of the test run, one set per pytest-xdist worker."""
    with Templates(prepare_database) as templates:
        yield templates


@pytest.fixture
def cloned_client(app: Starlette, database_templates: Templates) -> Generator[TestClient]:
    """Yield a client for the application on cloned databases of the test's own."""
    with cloned(app, templates=database_templates), TestClient(app) as client:
        yield client


@pytest.fixture
def cloned_async_client(cloned_client: TestClient) -> httpx.AsyncClient:
    """Return an asynchronous client for the same application."""
    return client_beside(cloned_client)


@pytest.fixture
def statements(app: Starlette) -> Generator[CapturedStatements]:
    """Yield the statements sent during the test."""
    with capture_statements(app) as captured:
        yield captured
