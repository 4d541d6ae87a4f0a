"""Tests over HTTP of tenants with a database each."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from conftest import WorkerPostgres
from examples.tenants_by_name import app as example
from fastapi_sqlnative import install_database
from fastapi_sqlnative.exceptions import DatabaseNotInstalledError
from tests.serving import Served, serve

NOTES = "SELECT text FROM tenants_by_name_note ORDER BY id"


@contextmanager
def served() -> Generator[Served]:
    with serve(example.create_app()) as running:
        assert call(running, "POST", "acme", "ada", text="of acme").json() == 1
        assert call(running, "POST", "globex", "grace", text="of globex").json() == 1
        yield running


def call(served: Served, method: str, tenant: str, token: str, **query: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return served.client.request(method, f"/{tenant}/notes", params=query, headers=headers)


def stored(databases: WorkerPostgres) -> tuple[list[Any], list[Any]]:
    """List the notes in both databases, from separate connections."""
    with psycopg.connect(databases.dsn) as a, psycopg.connect(databases.second.dsn) as b:
        first, second = ([text for (text,) in each.execute(NOTES).fetchall()] for each in (a, b))
        return first, second


def test_each_tenant_has_its_database(databases: WorkerPostgres) -> None:
    """A user writes to and reads from their tenant's database, and no other."""
    with served() as running:
        assert call(running, "GET", "acme", "ada").json() == ["of acme"]
        assert call(running, "GET", "globex", "grace").json() == ["of globex"]
    assert stored(databases) == (["of acme"], ["of globex"])


REFUSED = {
    "foreign": ("globex", "ada", 404),
    "name of a database": ("tenant-b", "ada", 404),
    "unknown": ("nobody", "ada", 404),
    "own without a database": ("initech", "heidi", 403),
    "foreign without one of its own": ("acme", "heidi", 404),
    "other spelling": ("ACME", "ada", 404),
    "trailing space": ("acme%20", "ada", 404),
    "unknown token": ("acme", "unknown", 401),
}


def test_no_other_tenant_is_reached(databases: WorkerPostgres, subtests: pytest.Subtests) -> None:
    """A request for another user's tenant reads and writes nothing, anywhere."""
    with served() as running:
        for name, (tenant, token, status) in REFUSED.items():
            with subtests.test(name):
                for method in "GET", "POST":
                    assert call(running, method, tenant, token, text="x").status_code == status
                assert stored(databases) == (["of acme"], ["of globex"])


def test_a_failed_commit_is_no_success(databases: WorkerPostgres) -> None:
    """A constraint that is checked only at COMMIT fails the request, on the chosen database."""
    with served() as running, psycopg.connect(databases.dsn, autocommit=True) as owner:
        owner.execute(
            "ALTER TABLE tenants_by_name_note ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED"
        )
        assert call(running, "POST", "acme", "ada", text="of acme").status_code == 500
        assert call(running, "POST", "globex", "grace", text="of globex").status_code == 201
    assert stored(databases) == (["of acme"], ["of globex", "of globex"])


def test_tenants_at_once_do_not_mix(databases: WorkerPostgres) -> None:
    """Many requests from both tenants each reach their own database."""
    users = [("acme", "ada"), ("globex", "grace")]
    with served() as running, ThreadPoolExecutor(12) as threads:

        def add(number: int) -> int:
            tenant, token = users[number % 2]
            return call(running, "POST", tenant, token, text=tenant).status_code

        assert set(threads.map(add, range(24))) == {201}
    assert stored(databases) == (["of acme", *["acme"] * 12], ["of globex", *["globex"] * 12])


def test_a_database_that_is_away_takes_no_other_with_it(databases: WorkerPostgres) -> None:
    """If one tenant's table is missing, only this tenant's requests fail."""
    with served() as running:
        with psycopg.connect(databases.dsn) as owner:
            owner.execute("DROP TABLE tenants_by_name_note")
        assert call(running, "GET", "acme", "ada").status_code == 500
        assert call(running, "GET", "globex", "grace").json() == ["of globex"]


def test_a_name_that_is_not_installed_fails_the_start(
    databases: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that uses a database that is not installed does not start."""

    def install_the_first(app: FastAPI, *, name: str, **options: Any) -> None:
        if name == "tenant-a":
            install_database(app, name=name, **options)

    monkeypatch.setattr(example, "install_database", install_the_first)
    with (
        pytest.raises(DatabaseNotInstalledError, match="'tenant-b'"),
        TestClient(example.create_app()),
    ):
        pass
