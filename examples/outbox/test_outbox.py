"""Tests of two databases and a worker, over HTTP and with a killed process."""

import asyncio
import sys
from pathlib import Path

import psycopg
import pytest
from fastapi import HTTPException
from psycopg import sql
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import create_async_engine

from conftest import PostgresDatabase, WorkerPostgres
from examples.outbox.app import Transaction, create_app
from examples.outbox.models import Base, Message, WarehouseBase
from examples.outbox.worker import carry_on
from fastapi_sqlnative import AsyncDatabase
from tests.serving import backends, launch, serve, wait_until


def items(database: PostgresDatabase, table: str) -> list[str]:
    """List the items in a table, from a separate connection."""
    with psycopg.connect(database.dsn) as connection:
        query = sql.SQL("SELECT item FROM {} ORDER BY item")
        found = connection.execute(query.format(sql.Identifier(table)))
        return [item for (item,) in found]


def test_an_order_becomes_a_parcel(databases: WorkerPostgres) -> None:
    """A stored order arrives in the second database once, and its message is deleted."""
    with serve(create_app()) as running:
        for number in range(5):
            assert running.client.post(f"/orders?item={number}").status_code == 201
        wait_until(lambda: items(databases, "outbox_message") == [])
        assert running.client.get("/parcels").json() == ["0", "1", "2", "3", "4"]
        assert running.client.get("/messages").json() == []
    assert items(databases, "outbox_order") == ["0", "1", "2", "3", "4"]


def test_what_is_rolled_back_sends_nothing(databases: WorkerPostgres) -> None:
    """A request that fails after writing its message leaves no message."""
    app = create_app()

    @app.post("/refused")
    async def refuse(session: Transaction) -> None:
        session.add(Message(item="never"))
        await session.flush()
        raise HTTPException(409)

    with serve(app) as running:
        assert running.client.post("/refused").status_code == 409
        assert running.client.post("/orders?item=lamp").status_code == 201
        wait_until(lambda: items(databases.second, "outbox_parcel") == ["lamp"])
        wait_until(lambda: items(databases, "outbox_message") == [])


def test_messages_wait_for_a_database_that_is_away(
    databases: WorkerPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """While the second database fails, orders are accepted; afterwards they arrive."""
    with (
        serve(create_app()) as running,
        psycopg.connect(databases.second.dsn, autocommit=True) as owner,
    ):
        owner.execute("ALTER TABLE outbox_parcel RENAME TO outbox_away")
        assert running.client.post("/orders?item=lamp").status_code == 201
        wait_until(lambda: "could not be carried on" in caplog.text)
        assert running.client.get("/messages").json() == ["lamp"]
        owner.execute("ALTER TABLE outbox_away RENAME TO outbox_parcel")
        wait_until(lambda: items(databases.second, "outbox_parcel") == ["lamp"])


# -- killed between the two COMMITs ------------------------------------------------------------

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "uvicorn", "--factory", "examples.outbox.app:create_app", "--port", "0"]

WAIT_BEFORE_DELETE = """
CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN OLD; END $$;
CREATE TRIGGER wait BEFORE DELETE ON outbox_message
FOR EACH ROW EXECUTE FUNCTION wait_for_the_test();
"""


def test_a_worker_that_is_killed_between_its_commits_loses_nothing(
    databases: WorkerPostgres,
) -> None:
    """The parcel is stored but the message is not deleted: a second delivery changes nothing."""
    with psycopg.connect(databases.dsn, autocommit=True) as owner:
        with launch([sys.executable, *COMMAND], ROOT) as (killed, client):
            owner.execute(WAIT_BEFORE_DELETE)
            owner.execute("SELECT pg_advisory_lock(4711)")
            assert client.post("/orders?item=lamp").status_code == 201
            # Its second transaction waits to delete; the first one is committed.
            wait_until(lambda: backends(owner, wait="Lock/%") == 1)
            assert items(databases.second, "outbox_parcel") == ["lamp"]
            killed.kill()
            killed.wait(60)
        owner.execute("SELECT pg_advisory_unlock(4711)")
        wait_until(lambda: backends(owner, wait="Lock/%") == 0)
        assert items(databases, "outbox_message") == ["lamp"]
        with serve(create_app()) as running:
            wait_until(lambda: items(databases, "outbox_message") == [])
            assert running.client.get("/parcels").json() == ["lamp"]


# -- several workers -----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_workers_share_the_work(databases: WorkerPostgres, driver: str) -> None:
    """Concurrent workers deliver each message once, without waiting for each other."""
    engine = create_async_engine(databases.url(driver))
    warehouse = create_async_engine(databases.second.url(driver))
    for base, on in (Base, engine), (WarehouseBase, warehouse):
        async with on.begin() as connection:
            await connection.run_sync(base.metadata.create_all)
    source, target = AsyncDatabase(engine), AsyncDatabase(warehouse, name="warehouse")
    async with source.transaction() as session:
        await session.execute(insert(Message), [{"item": str(each)} for each in range(40)])
    # The others do not wait for messages that one has locked.
    async with source.transaction() as session:
        await session.scalars(select(Message).limit(10).with_for_update())
        moved = await asyncio.gather(*(carry_on(source, target, limit=10) for _ in range(3)))
        assert sum(moved) == 30
    assert await carry_on(source, target) == 10
    assert await carry_on(source, target) == 0
    assert len(items(databases.second, "outbox_parcel")) == 40
    await engine.dispose()
    await warehouse.dispose()
