"""Tests over HTTP: when a task runs, and when it does not."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from conftest import WorkerPostgres
from examples.background import app as example
from fastapi_sqlnative import AsyncDatabase
from tests.serving import Served, serve, wait_until


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the members whose task has started."""
    begun: list[int] = []
    greet = example.greet

    async def noting(database: AsyncDatabase, member_id: int) -> None:
        begun.append(member_id)
        await greet(database, member_id)

    monkeypatch.setattr(example, "greet", noting)
    return begun


@contextmanager
def served() -> Generator[Served]:
    with serve(example.create_app()) as running:
        yield running


def sign_up(served: Served, name: str, badge: int) -> Any:
    return served.client.post("/members", params={"name": name, "badge": badge})


def greeted(served: Served) -> Any:
    return served.client.get("/members").json()


def test_who_is_stored_is_greeted(databases: WorkerPostgres, tasks: list[int]) -> None:
    """A task that a request adds finds the rows that the request stored."""
    with served() as running:
        assert sign_up(running, "ada", 1).status_code == 201
        wait_until(lambda: greeted(running) == {"ada": True})
    assert tasks == [1]


@pytest.mark.parametrize(
    ("name", "badge", "status"),
    [
        pytest.param("grace", -1, 422, id="the-request-raises-after-adding-the-task"),
        pytest.param("ada", 2, 409, id="a-constraint-refuses"),
        pytest.param("grace", 1, 409, id="the-commit-fails"),
    ],
)
def test_who_is_not_stored_is_not_greeted(
    databases: WorkerPostgres, tasks: list[int], name: str, badge: int, status: int
) -> None:
    """When the transaction is rolled back for any reason, no task starts."""
    with served() as running:
        sign_up(running, "ada", 1)
        wait_until(lambda: greeted(running) == {"ada": True})
        assert sign_up(running, name, badge).status_code == status
        assert sign_up(running, "alan", 3).status_code == 201  # the task would have run before this
        wait_until(lambda: greeted(running) == {"ada": True, "alan": True})
    assert len(tasks) == 2


def test_a_task_that_fails_changes_no_answer(
    databases: WorkerPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """If a row is gone when its task runs, the error is logged; the 201 has already been sent."""
    with served() as running, psycopg.connect(databases.dsn, autocommit=True) as owner:
        owner.execute(
            "CREATE FUNCTION vanish() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN DELETE FROM background_member WHERE id = NEW.id; RETURN NULL; END $$"
        )
        owner.execute(
            "CREATE CONSTRAINT TRIGGER vanish AFTER INSERT ON background_member"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION vanish()"
        )
        assert sign_up(running, "ada", 1).status_code == 201
        wait_until(lambda: "Member 1 has not been greeted." in caplog.text)
        assert greeted(running) == {}
