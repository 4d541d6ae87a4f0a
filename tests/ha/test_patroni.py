"""Automatic failover by Patroni, after which the application finds the new primary."""

from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic

import psycopg
import pytest

from tests.ha.cluster import SCHEMA, address, engine_at
from tests.ha.ledger import application, load
from tests.ha.patroni import TTL, Cluster, patroni
from tests.serving import KINDS, Kind, Served, serve, wait_until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Start two nodes, the second one a synchronous standby."""
    with patroni(synchronous=True, schema=SCHEMA) as found:
        yield found


def names(url: str) -> set[str]:
    with psycopg.connect(url) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM item").fetchall()}


def test_a_lost_primary_is_replaced_and_no_acknowledged_write_is_lost(cluster: Cluster) -> None:
    """When the leader is killed under load, all drivers recover and lose no acknowledged write."""
    first, second = cluster.leader, cluster.other
    ports = [first.port, second.port]
    with ExitStack() as closing:

        def start(kind: Kind) -> Served:
            engine = engine_at(kind, address(ports, kind.driver, "read-write"))
            return closing.enter_context(serve(application(kind, engine)))

        served = [start(kind) for kind in KINDS]

        def ready(each: Served) -> bool:
            return each.client.get("/health/ready").status_code == 200

        assert all(map(ready, served))
        with ExitStack() as loading:
            ledgers = [loading.enter_context(load(each, clients=2)) for each in served]
            wait_until(lambda: all(len(each.stored) > 20 for each in ledgers), 60)
            first.kill()
            began = monotonic()
            wait_until(lambda: not any(map(ready, served)), 60)
            before = [len(each.stored) for each in ledgers]
            wait_until(second.is_leader, TTL + 60)
            wait_until(lambda: all(map(ready, served)), 60)
            print(f"ready again {monotonic() - began:.1f} s after the leader was lost")
            wait_until(
                lambda: all(
                    len(each.stored) > was + 20 for each, was in zip(ledgers, before, strict=True)
                ),
                60,
            )
    found = names(second.url)
    for ledger in ledgers:
        assert ledger.unlike == []
        assert ledger.failed
        assert ledger.stored <= found
    acknowledged = set[str]().union(*(each.stored for each in ledgers))
    assert len(found - acknowledged) <= sum(each.unknown for each in ledgers)
