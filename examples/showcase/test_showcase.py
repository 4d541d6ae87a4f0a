"""Tests of the showcase over HTTP."""

import json
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from conftest import WorkerPostgres
from examples.showcase.app import create_app
from examples.showcase.models import AnalyticsBase, Base
from examples.showcase.settings import Settings, read_settings
from fastapi_sqlnative.testing import (
    capture_statements,
    fail_next_commit,
    isolated,
    override_database,
)
from tests.serving import serve, wait_until

START = {"ada-1": 1_000_00, "grace-1": 1_000_00}

other = pytest.mark.other_driver
on_postgres = pytest.mark.parametrize(
    "settings", ["psycopg", pytest.param("asyncpg", marks=other)], indirect=True
)


@pytest.fixture(
    params=[
        "psycopg",
        *(pytest.param(each, marks=other) for each in ("asyncpg", "postgresql-alone", "sqlite")),
    ]
)
def settings(
    request: pytest.FixtureRequest, postgres: WorkerPostgres, tmp_path: Path, patient_probes: None
) -> Iterator[Settings]:
    """Provide two databases of each kind in turn, and clean up."""
    match request.param:
        case "sqlite":
            yield read_settings({"DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/demo.db"})
            return
        case "postgresql-alone":
            settings = read_settings({"DATABASE_URL": postgres.dsn})
        case driver:
            first, second = postgres.url(driver), postgres.second.url(driver)
            settings = read_settings({"DATABASE_URL": first, "SECOND_DATABASE_URL": second})
    yield settings
    _drop_tables(settings)


def _drop_tables(settings: Settings) -> None:
    for base, url in (Base, settings.database), (AnalyticsBase, settings.analytics):
        engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
        base.metadata.drop_all(engine)


@contextmanager
def served(settings: Settings) -> Generator["Bank"]:
    """Serve the showcase under uvicorn."""
    with serve(create_app(settings)) as running:
        yield Bank(running.client)


class Bank:
    """A client for the showcase."""

    def __init__(self, client: httpx.Client | TestClient) -> None:
        self.client = client

    def get(self, path: str, user: str) -> Any:
        """Send a GET request as that user."""
        response = self.client.get(path, headers={"X-User": user})
        assert response.status_code == 200, response.text
        return response.json()

    def transfer(self, user: str, source: str, target: str, amount: int, **more: str) -> Any:
        """Order a transfer as that user."""
        order = {"source": source, "target": target, "amount": amount} | more
        return self.client.post("/transfers", headers={"X-User": user}, json=order)

    @property
    def balances(self) -> dict[str, int]:
        """Read the balance of every account."""
        accounts = [*self.get("/accounts", "ada"), *self.get("/accounts", "grace")]
        return {account["number"]: account["balance"] for account in accounts}

    @property
    def booked(self) -> list[tuple[str, int]]:
        """Read every ledger entry."""
        entries = [*self.get("/ledger", "ada"), *self.get("/ledger", "grace")]
        return [(entry["account"], entry["amount"]) for entry in entries]

    @property
    def events(self) -> Any:
        """Read the event counts of the second database."""
        return self.client.get("/statistics").json()


@pytest.mark.driver_decides
def test_a_transfer_commits_everywhere(settings: Settings) -> None:
    """A 201 means that both balances, both ledger entries and the event are stored."""
    with served(settings) as bank:
        assert (bank.balances, bank.booked, bank.events) == (START, [], [])
        answer = bank.transfer("ada", "ada-1", "grace-1", 250, reference="rent")
        assert answer.status_code == 201
        shown = [(entry["account"], entry["reference"], entry["amount"]) for entry in answer.json()]
        assert shown == [("ada-1", "rent", -250), ("grace-1", "rent", 250)]
        assert bank.balances == {"ada-1": 997_50, "grace-1": 1_002_50}
        assert bank.booked == [("ada-1", -250), ("grace-1", 250)]
        assert bank.events == [{"name": "transfer", "events": 1, "amount": 250}]
        ids = {entry["id"] for user in ("ada", "grace") for entry in bank.get("/ledger", user)}
        assert {entry["id"] for entry in answer.json()} == ids


def test_insufficient_funds_change_nothing(settings: Settings) -> None:
    """A transfer of more than the balance is a 409 and leaves no trace in either database."""
    with served(settings) as bank:
        answer = bank.transfer("ada", "ada-1", "grace-1", 1_000_01)
        assert (answer.status_code, answer.json()) == (409, {"detail": "Insufficient funds."})
        assert (bank.balances, bank.booked, bank.events) == (START, [], [])


def test_a_ledger_that_refuses_gives_the_money_back(settings: Settings) -> None:
    """When a unique constraint refuses the ledger entry, the earlier balance updates are undone."""
    with served(settings) as bank:
        assert bank.transfer("ada", "ada-1", "grace-1", 100, reference="rent").status_code == 201
        before = (bank.balances, bank.booked, bank.events)
        answer = bank.transfer("ada", "ada-1", "grace-1", 900, reference="rent")
        assert answer.status_code == 409
        assert answer.json() == {"detail": "This reference has been used."}
        assert (bank.balances, bank.booked, bank.events) == before


@on_postgres
def test_a_second_database_that_refuses_gives_the_money_back(settings: Settings) -> None:
    """When `analytics` refuses the event, `default` does not commit the transfer."""
    with served(settings) as bank:
        _drop_tables(Settings(settings.analytics, settings.analytics))
        assert bank.transfer("ada", "ada-1", "grace-1", 100).status_code == 500
        assert (bank.balances, bank.booked) == (START, [])


@on_postgres
def test_opposite_transfers_do_not_deadlock(settings: Settings) -> None:
    """Simultaneous transfers in both directions all succeed, and no cent is lost."""
    orders = [("ada", "ada-1", "grace-1", 3), ("grace", "grace-1", "ada-1", 2)] * 20
    with served(settings) as bank, ThreadPoolExecutor(len(orders)) as threads:
        answers = list(threads.map(lambda order: bank.transfer(*order), orders))
        assert {answer.status_code for answer in answers} == {201}
        assert bank.balances == {"ada-1": 999_80, "grace-1": 1_000_20}
        assert sum(amount for _, amount in bank.booked) == 0
        assert bank.events == [{"name": "transfer", "events": 40, "amount": 100}]


@on_postgres
def test_the_user_is_read_in_the_transaction(settings: Settings) -> None:
    """A transfer that waits for a row lock has one connection, which also loaded the user."""
    dsn = settings.database.set(drivername="postgresql").render_as_string(hide_password=False)
    with (
        served(settings) as bank,
        ThreadPoolExecutor(1) as thread,
        psycopg.connect(dsn) as other,
        psycopg.connect(dsn, autocommit=True) as watching,
    ):
        other.execute("SELECT FROM showcase_account WHERE number = 'ada-1' FOR UPDATE")
        answer = thread.submit(bank.transfer, "ada", "ada-1", "grace-1", 1)
        wait_until(lambda: _backends(watching, besides=other) == [("Lock", "FOR UPDATE")])
        other.rollback()
        assert answer.result().status_code == 201


def _backends(
    watching: psycopg.Connection, *, besides: psycopg.Connection
) -> list[tuple[str, str]]:
    """List what each of the showcase's transactions is waiting for, and how its statement ends."""
    return watching.execute(
        "SELECT wait_event_type, right(query, 10) FROM pg_stat_activity"
        " WHERE datname = current_database() AND state <> 'idle'"
        " AND query LIKE '%%showcase%%' AND pid NOT IN (pg_backend_pid(), %s)",
        (besides.info.backend_pid,),
    ).fetchall()


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_sqlite_loses_no_update(settings: Settings) -> None:
    """Without row locks, simultaneous transfers still add up."""
    with served(settings) as bank, ThreadPoolExecutor(10) as threads:
        order = ("ada", "ada-1", "grace-1", 1)
        answers = list(threads.map(lambda _: bank.transfer(*order), range(10)))
        assert {answer.status_code for answer in answers} == {201}
        assert bank.balances == {"ada-1": 999_90, "grace-1": 1_000_10}


ORDERS: dict[str, tuple[tuple[str, str, str, int], int]] = {
    "unknown user": (("nobody", "ada-1", "grace-1", 1), 401),
    "no user": (("", "ada-1", "grace-1", 1), 401),
    "not the owner": (("ada", "grace-1", "ada-1", 1), 404),
    "unknown source": (("ada", "ada-9", "grace-1", 1), 404),
    "unknown target": (("ada", "ada-1", "grace-9", 1), 404),
    "same account": (("ada", "ada-1", "ada-1", 1), 422),
    "negative amount": (("ada", "ada-1", "grace-1", -1), 422),
    "absurd amount": (("ada", "ada-1", "grace-1", 10**12), 422),
    "no account number": (("ada", "ada-1\0", "grace-1", 1), 422),
}


@on_postgres
def test_refused_orders_change_nothing(settings: Settings) -> None:
    """A transfer that is not allowed or makes no sense is refused and moves nothing."""
    with served(settings) as bank:
        for name, (order, status) in ORDERS.items():
            answer = bank.transfer(*order)
            assert (answer.status_code, bank.balances, bank.booked) == (status, START, []), name


def test_readers_must_say_who_they_are(settings: Settings) -> None:
    """An unknown user sees neither accounts nor ledger, streamed or not."""
    with served(settings) as bank:
        for path in "/accounts", "/ledger", "/ledger/export":
            assert bank.client.get(path).status_code == 401
            assert bank.client.get(path, headers={"X-User": "nobody"}).status_code == 401


def test_the_ledger_streams(settings: Settings) -> None:
    """The export streams all of the user's own entries, oldest first."""
    with served(settings) as bank:
        for amount in 1, 2, 3:
            assert bank.transfer("ada", "ada-1", "grace-1", amount).status_code == 201
        with bank.client.stream("GET", "/ledger/export", headers={"X-User": "grace"}) as body:
            lines = [json.loads(line) for line in body.iter_lines()]
        assert [line["amount"] for line in lines] == [1, 2, 3]
        assert lines == bank.get("/ledger", "grace")[::-1]


def test_a_second_start_seeds_nothing(settings: Settings) -> None:
    """Stored data survives a restart, and is not overwritten by the demo data."""
    for transfers in 1, 2:
        with served(settings) as bank:
            assert bank.transfer("ada", "ada-1", "grace-1", 100).status_code == 201
            assert bank.balances["ada-1"] == START["ada-1"] - 100 * transfers


@on_postgres
def test_openapi_names_the_endpoints(settings: Settings) -> None:
    """The interactive documentation loads, and does not show the session."""
    with served(settings) as bank:
        assert bank.client.get("/docs").status_code == 200
        schema = bank.client.get("/openapi.json").json()
        assert {"/transfers", "/accounts", "/ledger", "/statistics"} < schema["paths"].keys()
        (parameter,) = schema["paths"]["/transfers"]["post"]["parameters"]
        assert parameter["name"] == "X-User"


def test_addresses_come_from_the_environment() -> None:
    """One address is enough; without any, the error names the variable."""
    alone = read_settings({"DATABASE_URL": "sqlite+aiosqlite:///data/demo.db"})
    assert alone.analytics.database == "data/demo-analytics.db"
    plain = read_settings({"DATABASE_URL": "postgresql://me:secret@db/bank"})
    assert plain.database.drivername == plain.analytics.drivername == "postgresql+psycopg"
    assert "secret" not in repr(plain)
    with pytest.raises(ValueError, match="DATABASE_URL is not set"):
        read_settings({"DATABASE_URL": ""})


@on_postgres
def test_a_second_database_that_is_away_is_reported(settings: Settings) -> None:
    """Without `analytics`, the showcase is degraded but ready, and still shows accounts."""
    app = create_app(settings)
    nobody = create_async_engine(settings.analytics.set(host="127.0.0.1", port=1, query={}))
    with TestClient(app) as client:
        with override_database(app, "analytics", nobody):
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
            assert ready.json()["databases"] == {"default": "up", "analytics": "down"}
            assert client.get("/accounts", headers={"X-User": "ada"}).status_code == 200
        assert client.get("/health/ready").json()["status"] == "ready"


@on_postgres
def test_a_deadlock_at_the_commit_moves_nothing(settings: Settings) -> None:
    """A failed COMMIT is a 503 with Retry-After, and no money has moved."""
    app = create_app(settings)
    with TestClient(app) as client, isolated(app):
        bank = Bank(client)
        with fail_next_commit(app, "deadlock"):
            refused = bank.transfer("ada", "ada-1", "grace-1", 250)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert (bank.balances, bank.booked, bank.events) == (START, [], [])
        assert bank.transfer("ada", "ada-1", "grace-1", 250).status_code == 201


@on_postgres
def test_a_transfer_is_one_transaction_on_each_database(settings: Settings) -> None:
    """Everything is sent before the first COMMIT, and the first database commits first."""
    app = create_app(settings)
    with TestClient(app) as client, isolated(app):
        with capture_statements(app) as statements:
            assert Bank(client).transfer("ada", "ada-1", "grace-1", 250).status_code == 201
        sent = [(each.database, each.sql.split()[0]) for each in statements]
    assert sent == [
        ("default", "BEGIN"),
        ("default", "SELECT"),  # the user
        ("default", "SELECT"),  # both accounts, locked
        ("default", "UPDATE"),  # each of them
        ("default", "UPDATE"),
        ("default", "INSERT"),
        ("analytics", "BEGIN"),
        ("analytics", "INSERT"),
        ("default", "COMMIT"),
        ("analytics", "COMMIT"),
    ]
