"""Tests of the synchronous quick start over HTTP."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from conftest import WorkerPostgres
from examples.quick_start_sync.app import create_app
from fastapi_sqlnative.exceptions import BlockingSessionError
from tests.serving import serve


@pytest.mark.usefixtures("databases")
def test_many_requests_share_two_connections() -> None:
    """Fifty simultaneous requests succeed with a pool of two; none is stored twice or lost."""
    with serve(create_app()) as served, ThreadPoolExecutor(50) as threads:
        answers = threads.map(
            lambda number: served.client.post("/notes", json={"text": f"note {number}"}),
            range(50),
        )
        assert sorted(answer.json() for answer in answers) == list(range(1, 51))
        assert served.client.get("/notes/count").json() == 50


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_the_event_loop_is_never_blocked(
    driver: str, databases: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An `async def` endpoint that uses a synchronous session is refused, and named."""
    monkeypatch.setenv("DATABASE_URL", databases.url(driver))
    with TestClient(create_app()) as client:
        assert client.post("/notes", json={"text": "buy bread"}).status_code == 201
        with pytest.raises(BlockingSessionError):
            client.get("/blocking")
