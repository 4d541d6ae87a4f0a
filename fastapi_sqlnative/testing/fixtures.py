"""Ready-made pytest fixtures; what they need is a fixture `app` of your own.

Write in your `conftest.py`:

    pytest_plugins = ["fastapi_sqlnative.testing.fixtures"]

or import those that you want. The asynchronous one runs with anyio's pytest plugin, which comes
with FastAPI: mark the tests `@pytest.mark.anyio`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING

import pytest
from starlette.applications import Starlette

from . import CapturedStatements, async_client, capture_statements, isolated

if TYPE_CHECKING:
    import httpx
    from starlette.testclient import TestClient

__all__ = ["isolated_async_client", "isolated_client", "statements"]


@pytest.fixture
def isolated_client(app: Starlette) -> Generator[TestClient]:
    """Give a client of the running application, whose databases are isolated for the test."""
    from starlette.testclient import TestClient  # needs httpx, which not everybody has

    with TestClient(app) as client, isolated(app):
        yield client


@pytest.fixture
async def isolated_async_client(
    app: Starlette, anyio_backend: object
) -> AsyncGenerator[httpx.AsyncClient]:
    """Give the same on the event loop of the test."""
    async with async_client(app) as client, isolated(app):
        yield client


@pytest.fixture
def statements(app: Starlette, request: pytest.FixtureRequest) -> Generator[CapturedStatements]:
    """Give what is sent during the test; after the client, where the test has one."""
    for client in ("isolated_client", "isolated_async_client"):
        if client in request.fixturenames:
            request.getfixturevalue(client)
    with capture_statements(app) as captured:
        yield captured
