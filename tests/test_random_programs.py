"""Rules 4 to 6 and 9: random programs end as with plain SQLAlchemy, and do so in `isolated` too."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, create_engine, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from conftest import WorkerPostgres
from fastapi_sqlnative import get_db, transactional
from fastapi_sqlnative.exceptions import TransactionAbortedError, UncommittedChangesError
from fastapi_sqlnative.testing import isolated
from tests.in_process import application, asking
from tests.serving import Item, Kind, Rows, items

pytestmark = [
    pytest.mark.anyio,
    # psycopg warns if PostgreSQL has closed the cursor of a result that was only half read.
    pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning"),
]

# The shortest programs that have found a wrong outcome had three steps.
LONGEST = 8

# Called with a name that is unique in the program.
Step = Callable[[Session, str], Any]


def add(session: Session, name: str) -> None:
    session.add(Item(name=name))


def add_and_flush(session: Session, name: str) -> None:
    add(session, name)
    session.flush()


def add_in_a_savepoint(session: Session, name: str) -> None:
    with session.begin_nested():
        add(session, name)


def add_in_a_block(session: Session, name: str) -> None:
    with session.begin():
        add(session, name)


def add_twice(session: Session, _: str) -> None:
    add_and_flush(session, "there")


def add_twice_in_a_savepoint(session: Session, name: str) -> None:
    with session.begin_nested():
        add_and_flush(session, name)
        add_and_flush(session, "there")


def add_in_bulk(session: Session, name: str) -> None:
    session.bulk_insert_mappings(Item, [{"name": name}])


def insert_one(session: Session, name: str) -> None:
    session.execute(insert(items).values(name=name))


def insert_as_text(session: Session, name: str) -> None:
    session.execute(text("INSERT INTO item (name) VALUES (:name)"), {"name": name})


def insert_what_is_there(session: Session, _: str) -> None:
    statement = upsert(Item).values(name="there")
    session.execute(statement.on_conflict_do_nothing(index_elements=["name"]))


def update_one(session: Session, _: str) -> None:
    session.execute(update(Item).values(position=Item.position + 1).where(Item.name == "there"))


def update_none(session: Session, _: str) -> None:
    session.execute(update(Item).values(position=1).where(Item.name == "nobody"))


def change(session: Session, _: str) -> None:
    item = session.scalars(select(Item).where(Item.name == "there")).one()
    item.position = (item.position or 0) + 1


def read(session: Session, _: str) -> None:
    session.scalars(select(Item)).all()


def read_half(session: Session, _: str) -> None:
    query = text("SELECT * FROM generate_series(1, 200)")
    session.execute(query, execution_options={"yield_per": 1}).fetchone()


def undo_while_reading(session: Session, name: str) -> None:
    savepoint = session.begin_nested()
    read_half(session, name)
    savepoint.rollback()


def fail(session: Session, _: str) -> None:
    session.execute(text("SELECT 1 / 0"))


def begin_savepoint(session: Session, _: str) -> None:
    session.begin_nested()


def end_savepoint(session: Session, _: str) -> None:
    if (savepoint := session.get_nested_transaction()) is not None:
        savepoint.commit()


def undo_savepoint(session: Session, _: str) -> None:
    if (savepoint := session.get_nested_transaction()) is not None:
        savepoint.rollback()


def commit(session: Session, _: str) -> None:
    try:
        session.commit()
    except TransactionAbortedError:
        session.rollback()  # as PostgreSQL does by itself


def roll_back(session: Session, _: str) -> None:
    session.rollback()


STEPS: Sequence[Step] = (
    *(add, add_and_flush, add_in_a_savepoint, add_in_a_block, add_twice, add_twice_in_a_savepoint),
    *(add_in_bulk, insert_one, insert_as_text, insert_what_is_there, update_one, update_none),
    *(change, read, read_half, undo_while_reading, fail, commit, roll_back),
    *(begin_savepoint, end_savepoint, undo_savepoint) * 2,
)


def perform(session: Session, program: Sequence[Step]) -> None:
    """Run all steps, and ignore SQLAlchemy's errors."""
    for number, step in enumerate(program):
        with suppress(SQLAlchemyError):
            step(session, str(number))


class Outcome(NamedTuple):
    """The outcome of a program that ends with a commit.

    `stored` has the rows before the commit, and `committed` those after it. `aborted` is true if
    the database had aborted the transaction, and `refused` if the commit failed.
    """

    stored: dict[str, int | None]
    committed: dict[str, int | None]
    aborted: bool
    refused: bool


def outcome(engine: Engine, rows: Rows, program: Sequence[Step]) -> Outcome:
    """Run a program with plain SQLAlchemy, and return its outcome."""
    begin_anew(rows)
    with engine.connect() as connection:
        session = Session(connection, expire_on_commit=False)
        driver: Any = connection.connection.driver_connection
        perform(session, program)
        stored, refused = rows.positions, False
        aborted = driver.info.transaction_status == TransactionStatus.INERROR
        try:
            session.commit()
        except SQLAlchemyError:
            refused = True
        with suppress(PendingRollbackError):  # if a savepoint's release has failed
            session.close()
    return Outcome(stored, rows.positions, aborted, refused)


def begin_anew(rows: Rows) -> None:
    rows.clear()
    rows.add("there", position=1)


def loses(engine: Engine, rows: Rows, program: Sequence[Step]) -> bool:
    """Return whether something was written before the step that aborted the transaction."""
    before = (outcome(engine, rows, program[:end]) for end in range(len(program), -1, -1))
    last = next(each for each in before if not each.aborted)
    return last.stored != last.committed or last.refused


def programs(number: int) -> Iterator[list[Step]]:
    """Yield random programs, the same ones for every driver."""
    chance = random.Random(11)
    for _ in range(number):
        yield chance.choices(STEPS, k=chance.randint(1, LONGEST))


def title(program: Sequence[Step]) -> str:
    return ", ".join(each.__name__ for each in program)


@pytest.fixture(scope="module")
def trials(
    postgres: WorkerPostgres, _connections: tuple[psycopg.Connection, ...], thorough: bool
) -> list[tuple[Sequence[Step], Outcome, bool]]:
    """Return each program, its outcome with plain SQLAlchemy, and whether an abort loses work."""
    rows, engine = Rows(_connections[0]), create_engine(postgres.url("psycopg"))
    found: list[tuple[Sequence[Step], Outcome, bool]] = []
    for program in programs(100 if thorough else 50):
        expected = outcome(engine, rows, program)
        lost = expected.aborted and loses(engine, rows, program)
        found.append((program, expected, lost))
    engine.dispose()
    return found


async def test_a_commit_at_the_end_is_sqlalchemys(
    kind: Kind, engine: Engine, rows: Rows, trials: Any, subtests: pytest.Subtests
) -> None:
    """With transactional, a program stores all its work, and fails only if that is impossible."""
    async with asking(engine, kind, transactional()) as request:
        for program, expected, lost in trials:
            begin_anew(rows)
            body = functools.partial(perform, program=program)
            with subtests.test(title(program)):
                if lost or expected.refused:
                    with pytest.raises((TransactionAbortedError, SQLAlchemyError)):
                        await request(body)
                    assert rows.positions == expected.stored
                else:
                    assert await request(body) == 201
                    assert rows.positions == expected.committed


async def test_what_a_commit_would_have_stored_is_forgotten(
    kind: Kind, engine: Engine, rows: Rows, trials: Any, subtests: pytest.Subtests
) -> None:
    """With get_db, a program fails if it leaves something uncommitted, and only then."""
    async with asking(engine, kind, get_db()) as request:
        for program, expected, _ in trials:
            if expected.refused:
                continue  # its flush has failed, or would fail
            begin_anew(rows)
            body = functools.partial(perform, program=program)
            with subtests.test(title(program)):
                if expected.stored == expected.committed:
                    assert await request(body) == 201
                else:
                    with pytest.raises(UncommittedChangesError):
                        await request(body)
                assert rows.positions == expected.stored


@pytest.mark.parametrize("dependency", [get_db(), transactional()], ids=["get_db", "transactional"])
def test_what_is_isolated_ends_as_in_production(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    dependency: Any,
    subtests: pytest.Subtests,
    thorough: bool,
) -> None:
    """In `isolated`, a program ends with the same response or error and rows as in production."""
    running: list[Sequence[Step]] = []
    app = application(engine, kind, dependency, lambda session: perform(session, running[-1]))

    def answer() -> object:
        try:
            return client.post("/").status_code
        except Exception as error:  # noqa: BLE001 - compared below
            return type(error)

    with TestClient(app) as client:
        for program in programs(40 if thorough else 20):
            running.append(program)
            begin_anew(rows)
            expected = answer(), rows.positions
            begin_anew(rows)
            with (
                subtests.test(title(program)),
                isolated(app) as session,
            ):
                found = answer()
                stored = session.execute(select(items.c.name, items.c.position)).all()
                assert (found, {name: at for name, at in stored}) == expected  # noqa: C416 - typed
