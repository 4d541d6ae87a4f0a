"""Ready-made pytest fixtures; what they need is a fixture `app` of your own.

Write in your `conftest.py`:

    pytest_plugins = ["fastapi_sqlnative.testing.fixtures"]

or import those that you want, with `isolated_client`, `cloned_client` and `database_templates`
that the others need. The asynchronous clients work in tests of pytest-asyncio and of
anyio alike, because the application has an event loop of its own. `cloned_client` needs a fixture
`prepare_database`, too: what `Templates` takes, such as `Base.metadata.create_all`.
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
    """Give a client of the running application, whose databases are isolated for the test."""
    with TestClient(app) as client, isolated(app):
        yield client


@pytest.fixture
def isolated_session(app: Starlette, isolated_client: TestClient) -> Generator[Session]:
    """Give the test's own session in those databases, synchronous for an AsyncEngine too."""
    with isolated(app) as session:
        yield session


@pytest.fixture
def isolated_async_client(isolated_client: TestClient) -> httpx.AsyncClient:
    """Give an asynchronous client of the same application."""
    return client_beside(isolated_client)


@pytest.fixture(scope="session")
def database_templates(prepare_database: Any) -> Generator[Templates]:
    """Keep the templates of the run, one set for each worker of pytest-xdist."""
    with Templates(prepare_database) as templates:
        yield templates


@pytest.fixture
def cloned_client(app: Starlette, database_templates: Templates) -> Generator[TestClient]:
    """Give a client of the application on databases of the test's own."""
    with cloned(app, templates=database_templates), TestClient(app) as client:
        yield client


@pytest.fixture
def cloned_async_client(cloned_client: TestClient) -> httpx.AsyncClient:
    """Give an asynchronous client of the same application."""
    return client_beside(cloned_client)


@pytest.fixture
def statements(app: Starlette) -> Generator[CapturedStatements]:
    """Give what is sent during the test."""
    with capture_statements(app) as captured:
        yield captured
