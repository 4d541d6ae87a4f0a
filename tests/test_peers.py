"""The comparison with other packages: all do the same work and are measured the same way."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from sqlalchemy import create_engine, func, make_url, select
from sqlalchemy.engine import Engine

from conftest import WorkerPostgres
from tests.in_process import running
from tests.peers.contestants import BY_HAND, CONTESTANTS, OURS, Contestant
from tests.peers.load import open_loop
from tests.peers.page import cell, title_of, write_page
from tests.peers.results import Results, Row
from tests.peers.wire import Wire
from tests.peers.workloads import NOTES, WORKLOADS, Base, Entry, Note, create_tables
from tests.serving import Kind, serve

pytestmark = pytest.mark.anyio


@pytest.fixture
def database(postgres: WorkerPostgres) -> Iterator[Engine]:
    """Yield a separate engine on a database with the comparison's tables."""
    engine = create_engine(postgres.url("psycopg"))
    create_tables(engine)
    yield engine
    Base.metadata.drop_all(engine)
    engine.dispose()


one = pytest.mark.slow("1 s in all: with three databases it does all that it does with one")


@pytest.mark.parametrize("number", [pytest.param(1, marks=one), 3])
@pytest.mark.parametrize(
    "contestant", [each for each in CONTESTANTS if not each.package], ids=lambda each: each.name
)
async def test_contestants_do_the_same_work(
    kind: Kind, postgres: WorkerPostgres, database: Engine, contestant: Contestant, number: int
) -> None:
    """Every route of a contestant answers, and its writes are stored."""
    urls = [postgres.url(kind.driver)] * number
    app = contestant.application(urls, asynchronous=kind.asynchronous)
    async with running(app) as client:
        paths = [each.path for each in WORKLOADS if each.path in app.openapi()["paths"]]
        answers = {path: await client.get(path) for path in paths}
    assert {answer.status_code for answer in answers.values()} == {200}
    wanted = [each for each in WORKLOADS if contestant.serves(each, asynchronous=kind.asynchronous)]
    assert paths == [each.path for each in wanted]
    with database.connect() as connection:
        stored = connection.scalar(select(func.count()).select_from(Entry))
        reads = connection.scalar(select(func.sum(Note.reads)))
    assert stored == len([each for each in wanted if each.writes])
    assert reads == len([path for path in paths if path == "/update"])
    if "/list" in answers:
        assert len(answers["/list"].json()) == NOTES


async def test_the_wire_counts_questions_that_wait_for_an_answer(
    kind: Kind, postgres: WorkerPostgres, database: Engine
) -> None:
    """A transaction with one statement is counted as three round trips, whatever the driver."""
    address = make_url(postgres.dsn)
    wire = Wire(address.host or "", address.port or 5432)
    (by_hand,) = (each for each in CONTESTANTS if each.name == BY_HAND[0])
    async with wire.listening():
        url = make_url(postgres.url(kind.driver)).set(host="127.0.0.1", port=wire.own_port)
        urls = [url.render_as_string(hide_password=False)]
        app = by_hand.application(urls, asynchronous=kind.asynchronous)
        async with running(app) as client:
            for _ in range(3):
                await client.get("/read")
            before = wire.round_trips
            await client.get("/read")
            assert wire.round_trips == before + 3


async def test_an_open_loop_counts_what_was_answered(
    postgres: WorkerPostgres, database: Engine
) -> None:
    """An open loop counts every request that was due as answered or failed."""
    (by_hand,) = (each for each in CONTESTANTS if each.name == BY_HAND[0])
    app = by_hand.application([postgres.url("psycopg")], asynchronous=True)
    with serve(app) as served:
        port = served.client.base_url.port
        assert port is not None
        found = await open_loop(port, "/read", connections=4, rate=200, seconds=0.2)
        missing = await open_loop(port, "/nowhere", connections=4, rate=200, seconds=0.2)
    assert (len(found.latencies), found.failed) == (40, 0)
    assert (len(missing.latencies), missing.failed) == (0, 40)
    assert 0 < found.percentile(50) <= found.percentile(99) <= found.seconds


def test_ratios_are_to_the_best_by_hand() -> None:
    """A figure is divided by the best hand-written figure of its round, and leaders are listed."""
    results = Results("cpu")
    row = Row("cpu", "psycopg", "", "one read")
    results.add(row, OURS, 2.0, 2.0, 2.0, 2.0)
    results.add(row, BY_HAND[0], 4.0, 4.0, 4.0, 4.0)
    results.add(row, BY_HAND[1], 5.0, 5.0, 5.0, 5.0)
    results.add(row, "quicker", 1.0, 1.0, 1.0, 1.0)
    results.add(row, "sometimes", 1.0, 1.0, 1.0, 9.0)
    assert results.reference(row) == BY_HAND[0]
    assert cell(results, row, OURS) == "0.50"
    assert cell(results, row, BY_HAND[1]) == "1.25"
    assert results.ahead(row) == {"quicker": True, "sometimes": False}
    throughput = row._replace(measure="throughput")
    results.figures[throughput] = results.figures[row]
    assert results.reference(throughput) == BY_HAND[1]
    assert set(results.ahead(throughput)) == set(BY_HAND[:2])
    assert title_of(row.table) == "CPU per request: psycopg"


@pytest.mark.parametrize("measure", ["failed", "failed, calm"])
def test_failures_are_numbers(measure: str) -> None:
    """Failed requests are counted, but not compared as ratios, because there may be none."""
    results = Results("load")
    row = Row(measure, "asyncpg", "one read", "64 at 0 ms")
    results.add(row, OURS, 0, 0)
    results.add(row, BY_HAND[0], 0, 2)
    assert [cell(results, row, name) for name in (OURS, BY_HAND[0])] == ["0", "2"]


def test_the_page_says_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has a table and a chart of the saved results, and names the leading contestant."""
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    results = Results("cpu", {"date": "2026-11-26", "cores": "2", "load": "9", "rounds": "2"})
    row = Row("cpu", "psycopg", "", "one read")
    results.add(row, OURS, 2.0, 2.0)
    results.add(row, BY_HAND[0], 4.0, 4.0)
    results.add(row, CONTESTANTS[-1].name, 1.0, 1.0)
    results.save()
    write_page()
    page = Path("docs/performance-compared.md").read_text("utf-8")
    assert f"| {OURS} | 0.50 |" in page
    assert "its load was 9 on 2 cores" in page
    assert f"one read (here: 0.50): {CONTESTANTS[-1].name} 0.25." in page
    chart = ElementTree.parse(Path("docs", "charts", "cpu-psycopg.svg"))
    assert "0.25" in [each.text for each in chart.iter("{http://www.w3.org/2000/svg}text")]
