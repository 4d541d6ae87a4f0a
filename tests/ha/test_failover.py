"""A primary with a standby: which server is found, what a promotion costs, and what is lost."""

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from fastapi_sqlnative import (
    health_router,
    install_database,
    install_error_handlers,
    reader,
    transactional,
)
from tests.ha.cluster import (
    Attributes,
    Replication,
    address,
    configure,
    engine_at,
    replication,
)
from tests.ha.ledger import application, load
from tests.serving import KINDS, Item, Kind, route, serve, wait_until

pytestmark = pytest.mark.timeout(180)

IN_RECOVERY = text("SELECT pg_is_in_recovery()")


@pytest.fixture
def pair() -> Iterator[Replication]:
    """Start a primary and an asynchronous standby, which may be a little behind."""
    with replication(synchronous=False) as found:
        yield found


@pytest.fixture(scope="module")
def steady_pair() -> Iterator[Replication]:
    """Start a pair for tests that neither stop nor promote its servers."""
    with replication(synchronous=False) as found:
        yield found


@pytest.fixture
def synchronous_pair() -> Iterator[Replication]:
    """Start a primary that acknowledges only what its standby has received."""
    with replication(synchronous=True) as found:
        yield found


def is_on_standby(kind: Kind, ports: list[int], attributes: Attributes) -> bool:
    """Connect, and return whether the server is the standby."""
    engine = engine_at(kind, address(ports, kind.driver, attributes))
    if not isinstance(engine, AsyncEngine):
        with engine.connect() as connection:
            found = connection.scalar(IN_RECOVERY)
        engine.dispose()
        return bool(found)

    async def ask() -> bool:
        async with engine.connect() as connection:
            found = await connection.scalar(IN_RECOVERY)
        await engine.dispose()
        return bool(found)

    return asyncio.run(ask())


def test_a_url_with_several_hosts_finds_its_server(pair: Replication, kind: Kind) -> None:
    """`target_session_attrs` decides which server is used, whatever the order of the hosts."""
    for ports in pair.ports, pair.ports[::-1]:
        assert not is_on_standby(kind, ports, "read-write")
        assert is_on_standby(kind, ports, "read-only")
        assert is_on_standby(kind, ports, "prefer-standby")
    pair.standby.stop()
    assert not is_on_standby(kind, pair.ports, "prefer-standby")
    with pytest.raises(Exception, match=r"failed"):
        is_on_standby(kind, pair.ports, "read-only")


def replicated(kind: Kind, pair: Replication, policy: Any) -> FastAPI:
    """Build an application with the primary as default database and the standby as `replica`."""
    app = FastAPI()
    for name, attributes in ("default", "read-write"), ("replica", "prefer-standby"):
        wanted: Any = attributes
        engine = engine_at(kind, address(pair.ports, kind.driver, wanted))
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    install_error_handlers(app)
    app.include_router(health_router(databases={"replica": policy}, max_age=0.01))
    names = text("SELECT name FROM item ORDER BY id")
    route(
        app,
        kind,
        "/read",
        reader("replica"),
        lambda session: list(session.scalars(names)),
        status_code=200,
    )
    route(app, kind, "/write", transactional(), lambda session: session.add(Item(name=kind.id)))
    insert = text("INSERT INTO item (name) VALUES ('y')")
    route(
        app,
        kind,
        "/write-to-replica",
        transactional("replica"),
        lambda session: session.execute(insert).close(),
    )
    return app


def test_a_standby_is_read_by_name(steady_pair: Replication, kind: Kind) -> None:
    """Soon after a commit on the primary, the standby can be read by name, but not written."""
    with serve(replicated(kind, steady_pair, "required")) as served:
        assert served.client.post("/write").status_code == 201
        wait_until(steady_pair.caught_up)
        assert served.client.post("/read").json()[-1] == kind.id
        assert served.client.post("/write-to-replica").status_code == 500
        assert "y" not in steady_pair.names(steady_pair.primary)


@pytest.mark.parametrize(
    ("policy", "status", "state"),
    [("required", "ready", "up"), ("writable", "not_ready", "read_only")],
)
def test_readiness_on_a_standby(
    steady_pair: Replication, kind: Kind, policy: str, status: str, state: str
) -> None:
    """A standby is `up` if it is required for reading, and `read_only` if it has to be writable."""
    with serve(replicated(kind, steady_pair, policy)) as served:
        report = served.client.get("/health/ready").json()
    assert (report["status"], report["databases"]["replica"]) == (status, state)


def test_no_acknowledged_write_is_lost_with_a_synchronous_standby(
    synchronous_pair: Replication, kind: Kind
) -> None:
    """When the primary is killed under load, every write answered with 201 is on the new one."""
    pair = synchronous_pair
    engine = engine_at(kind, address(pair.ports, kind.driver, "read-write"))
    with serve(application(kind, engine)) as served:

        def ready() -> bool:
            return served.client.get("/health/ready").status_code == 200

        assert ready()
        with load(served) as ledger:
            wait_until(lambda: len(ledger.stored) > 50, 60)
            pair.primary.kill()
            wait_until(lambda: not ready(), 60)
            before = len(ledger.stored)
            pair.promote()
            wait_until(lambda: len(ledger.stored) > before + 50, 60)
            wait_until(ready, 60)
    assert ledger.unlike == []
    assert ledger.failed
    found = pair.names(pair.standby)
    assert ledger.stored <= found
    # A stored row that was not acknowledged comes from a request with an unknown outcome.
    assert len(found - ledger.stored) <= ledger.unknown


def test_an_asynchronous_standby_lacks_what_it_had_not_received(
    pair: Replication, kind: Kind
) -> None:
    """Writes answered with 201 while an asynchronous standby lags are lost with the primary."""
    engine = engine_at(kind, address(pair.ports, kind.driver, "read-write"))
    with serve(application(kind, engine)) as served:
        kept = {served.client.post("/items").json() for _ in range(5)}
        wait_until(pair.caught_up)
        pair.stop_receiving()
        lost = {served.client.post("/items") for _ in range(5)}
        assert {each.status_code for each in lost} == {201}
        pair.primary.kill()
        pair.promote()
        wait_until(lambda: served.client.post("/items").status_code == 201, 60)
    found = pair.names(pair.standby)
    assert kept <= found
    assert not found & {each.json() for each in lost}


def test_a_synchronous_standby_that_is_behind_delays_the_answer(
    synchronous_pair: Replication, kind: Kind
) -> None:
    """If the primary dies while a commit waits for the standby, the outcome is unknown."""
    pair = synchronous_pair
    engine = engine_at(kind, address(pair.ports, kind.driver, "read-write"))
    with serve(application(kind, engine)) as served, ThreadPoolExecutor(1) as thread:
        assert served.client.post("/items").status_code == 201
        pair.stop_receiving()
        configure(pair.primary, "statement_timeout", "200ms")  # does not end the COMMIT
        waiting = thread.submit(served.client.post, "/items")
        asked = "SELECT now() - query_start > '1 s' FROM pg_stat_activity"
        asked += " WHERE wait_event = 'SyncRep'"
        wait_until(lambda: pair.ask(pair.primary, asked) is True)
        assert not waiting.done()
        pair.primary.kill()
        answer = waiting.result(20)
    assert (answer.status_code, answer.json()) == (500, {"detail": "unknown"})


def test_a_host_that_is_silent_stands_in_front(steady_pair: Replication, kind: Kind) -> None:
    """A silent first host takes only its own timeout in libpq, but that of all hosts in asyncpg."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = [silent.getsockname()[1], steady_pair.primary.port]
        if kind.driver == "asyncpg":
            with pytest.raises(TimeoutError):
                is_on_standby(kind, ports, "read-write")
        else:
            assert not is_on_standby(kind, ports, "read-write")
        assert not is_on_standby(kind, ports[::-1], "read-write")


def test_a_command_timeout_leaves_the_outcome_of_a_commit_unknown(
    synchronous_pair: Replication,
) -> None:
    """If asyncpg times out on a COMMIT that waits for the standby, the outcome is unknown."""
    pair, kind = synchronous_pair, KINDS[1]
    url = address(pair.ports, kind.driver, "read-write")
    engine = engine_at(kind, url, connect_args={"timeout": 2, "command_timeout": 1})
    with serve(application(kind, engine)) as served:
        pair.stop_receiving()
        answer = served.client.post("/items")
    assert (answer.status_code, answer.json()) == (500, {"detail": "unknown"})
