"""When a task runs, and when it never does, over HTTP."""

from collections.abc import Iterator
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
    """Note the members whose task has begun."""
    begun: list[int] = []
    greet = example.greet

    async def noting(database: AsyncDatabase, member_id: int) -> None:
        begun.append(member_id)
        await greet(database, member_id)

    monkeypatch.setattr(example, "greet", noting)
    return begun


@contextmanager
def served() -> Iterator[Served]:
    with serve(example.create_app()) as running:
        yield running


def sign_up(served: Served, name: str, badge: int) -> Any:
    return served.client.post("/members", params={"name": name, "badge": badge})


def greeted(served: Served) -> Any:
    return served.client.get("/members").json()


def test_who_is_stored_is_greeted(databases: WorkerPostgres, tasks: list[int]) -> None:
    """A task that the request added finds what the request has stored."""
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
    """When the transaction is rolled back, by whatever, no task begins."""
    with served() as running:
        sign_up(running, "ada", 1)
        wait_until(lambda: greeted(running) == {"ada": True})
        assert sign_up(running, name, badge).status_code == status
        assert sign_up(running, "alan", 3).status_code == 201  # the task would have been before
        wait_until(lambda: greeted(running) == {"ada": True, "alan": True})
    assert len(tasks) == 2


def test_a_task_that_fails_changes_no_answer(
    databases: WorkerPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that is gone when its task runs is for the log; the 201 has left."""
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
