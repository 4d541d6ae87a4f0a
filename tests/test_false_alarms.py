"""Rules 5 and 6 never raise an error for correct code."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import Engine, delete, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import (
    Session,
)

from fastapi_sqlnative import get_db
from fastapi_sqlnative._drivers import transactions
from tests.in_process import ask, asking
from tests.serving import Item, Kind, Rows, items, until

pytestmark = pytest.mark.anyio

Body = Callable[[Session], Any]
again = insert(items).values(name="there")


def run(statement: Any) -> Body:
    """Make a body that executes one statement, as text if it is a string."""

    def body(session: Session) -> None:
        session.execute(text(statement) if isinstance(statement, str) else statement).close()

    return body


# -- work that stores nothing ------------------------------------------------------------------


def refused(statement: Any) -> Body:
    def body(session: Session) -> None:
        with pytest.raises(IntegrityError):
            session.execute(statement)

    return body


def refused_flush(session: Session) -> None:
    session.add(Item(name="there"))
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()


def refused_flush_in_a_savepoint(session: Session) -> None:
    with pytest.raises(IntegrityError), session.begin_nested():
        session.add(Item(name="there"))


def refused_commit(session: Session) -> None:
    session.add(Item(name="there"))
    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()


def refused_at_commit(session: Session) -> None:
    session.execute(insert(items).values(name="twice", position=1))
    with pytest.raises(IntegrityError):
        session.commit()


def temporary(session: Session) -> None:
    session.execute(text("CREATE TEMPORARY TABLE staged (n int) ON COMMIT DROP"))
    session.execute(text("INSERT INTO staged VALUES (1), (2)"))
    session.execute(text("TRUNCATE staged"))


def temporary_and_dropped(session: Session) -> None:
    temporary(session)
    session.execute(text("DROP TABLE staged"))


def temporary_with_an_index(session: Session) -> None:
    temporary(session)
    session.execute(text("CREATE INDEX ON staged (n)"))
    session.execute(text("ALTER TABLE staged ADD COLUMN m int"))


def temporary_of_a_query(session: Session) -> None:
    session.execute(text("CREATE TEMPORARY TABLE copied ON COMMIT DROP AS SELECT * FROM item"))
    session.execute(text("DELETE FROM copied"))


def undone_in_sql(session: Session) -> None:
    session.execute(text("SAVEPOINT mine"))
    session.execute(insert(items).values(name="undone"))
    session.execute(text("ROLLBACK TO SAVEPOINT mine"))


def undone_in_sql_over_text(session: Session) -> None:
    session.execute(text("savepoint a"))
    session.execute(text("INSERT INTO item (name) VALUES ('undone')"))
    session.execute(text("rollback work to a"))
    session.execute(text("RELEASE SAVEPOINT a"))


def undone_savepoint(session: Session) -> None:
    savepoint = session.begin_nested()
    session.add(Item(name="undone"))
    session.flush()
    session.execute(text("INSERT INTO item (name) VALUES ('undone too')"))
    savepoint.rollback()


def undone_before_an_unknown_function(session: Session) -> None:
    savepoint = session.begin_nested()
    session.execute(delete(items))  # an insert would also lock the sequence, which explains the id
    savepoint.rollback()
    session.execute(text("SELECT quote_nullable('x')"))


def undone_after_a_failure(session: Session) -> None:
    with suppress(IntegrityError), session.begin_nested():
        session.execute(insert(items).values(name="undone"))
        session.execute(again)
        pytest.fail("the constraint did not hold")


def undone_over_the_connection(session: Session) -> None:
    savepoint = session.connection().begin_nested()
    session.execute(delete(items))
    savepoint.rollback()


def on_conflict_in_text(session: Session) -> None:
    statement = "INSERT INTO item (name) VALUES ('there') ON CONFLICT (name) DO NOTHING"
    # A sequence takes a transaction id for every 33rd value, which it writes to the log.
    for _ in range(33):
        session.execute(text(statement))


def on_conflict_do_nothing(session: Session) -> None:
    session.execute(
        upsert(items).values(name="there").on_conflict_do_nothing(index_elements=["name"])
    )


def returning_nothing(session: Session) -> None:
    statement = upsert(items).values(name="there").on_conflict_do_nothing(index_elements=["name"])
    assert session.scalars(statement.returning(items.c.id)).all() == []


def newer(table: Any, *returning: Any, **key: int) -> Body:
    """Make a body with an upsert whose condition is not met.

    With the key given, SQLAlchemy adds no RETURNING.
    """
    statement = upsert(table).values(name="there", position=2, **key)
    statement = statement.on_conflict_do_update(
        index_elements=["name"], set_={"position": 2}, where=items.c.position > 7
    )
    return run(statement.returning(*returning) if returning else statement)


def nowait(session: Session) -> None:
    session.execute(text("SET LOCAL lock_timeout = '5s'"))
    session.execute(select(items).with_for_update(nowait=True)).all()


def for_update_and_update_of_no_row(session: Session) -> None:
    session.execute(select(items).with_for_update()).all()
    session.execute(update(items).values(position=2).where(items.c.name == "nobody"))


def over_the_connection(session: Session) -> None:
    session.connection().execute(text("TABLE item FOR UPDATE")).close()


def lock_over_the_connection(session: Session) -> None:
    session.connection().execute(text("LOCK TABLE item"))


def lock_over_the_connection_and_a_row(session: Session) -> None:
    lock_over_the_connection(session)
    over_the_connection(session)


def with_connection(session: Session) -> None:
    with session.connection() as connection:
        connection.execute(select(items)).close()


def commit_with_connection(session: Session) -> None:
    with session.connection() as connection:
        connection.execute(update(items).values(position=1))
        connection.commit()


STORES_NOTHING: dict[str, Body] = {
    # First, because the catalog writes of the temporary tables below would look like DDL here until
    # they are reported to the statistics.
    "undone in a function": run(
        "DO $$ BEGIN DELETE FROM item; RAISE 'undone'; EXCEPTION WHEN raise_exception THEN END $$"
    ),
    "undone over the connection": undone_over_the_connection,
    "lock table over the connection": lock_over_the_connection,
    "lock table and a row lock": lock_over_the_connection_and_a_row,
    "refused insert": refused(again),
    "refused text": refused(text("INSERT INTO item (name) VALUES ('there')")),
    "refused flush": refused_flush,
    "refused flush in a savepoint": refused_flush_in_a_savepoint,
    "refused commit": refused_commit,
    "refused at COMMIT": refused_at_commit,
    "update of no row": run(update(items).values(name="x").where(items.c.name == "nobody")),
    "text update of no row": run("UPDATE item SET name = 'x' WHERE name = 'nobody'"),
    "delete of no row": run(delete(items).where(items.c.name == "nobody")),
    "orm delete of no row": run(delete(Item).where(Item.name == "nobody")),
    "insert from nothing": run("INSERT INTO item (name) SELECT name FROM item WHERE false"),
    "on conflict do nothing": on_conflict_do_nothing,
    "on conflict, returning": returning_nothing,
    "on conflict, text": on_conflict_in_text,
    "upsert of an older row": newer(items),
    "upsert of an older row with its key": newer(items, id=1000),
    "upsert of an older row, text": run(
        "INSERT INTO item (name) VALUES ('there') ON CONFLICT (name) DO UPDATE SET position = 2"
        " WHERE item.position > 7"
    ),
    "upsert of an older row, text without a space": run(
        "INSERT INTO item (name) VALUES ('there') ON CONFLICT(name) DO UPDATE SET position = 2"
        " WHERE item.position > 7"
    ),
    "orm upsert of an older row": newer(Item),
    "orm upsert of an older row with its key": newer(Item, id=1000),
    "orm upsert of an older row, returning": newer(Item, Item),
    "temporary table": temporary,
    "temporary table of a query": temporary_of_a_query,
    "temporary table that is dropped": temporary_and_dropped,
    "for update": run(select(items).with_for_update()),
    "for update, and update of no row": for_update_and_update_of_no_row,
    "for update, text": run("SELECT * FROM item FOR UPDATE"),
    "for update, orm": run(select(Item).with_for_update(skip_locked=True)),
    "nowait": nowait,
    "nextval": run(select(func.nextval("item_id_seq"))),
    "nextval, text": run("SELECT nextval('item_id_seq')"),
    "setval": run(select(func.setval("item_id_seq", 7))),
    "notify": run("NOTIFY news, 'item'"),
    "pg_notify": run(select(func.pg_notify("news", "item"))),
    "advisory lock": run(select(func.pg_advisory_xact_lock(7))),
    "advisory lock, text": run("SELECT pg_advisory_xact_lock(7)"),
    "set local": run("SET LOCAL search_path = public"),
    "set_config": run(select(func.set_config("app.tenant", "1", True))),
    "lock table": run("LOCK TABLE item IN EXCLUSIVE MODE"),
    "unknown function": run("SELECT pg_catalog.quote_nullable('x'), pg_client_encoding()"),
    "undone in SQL": undone_in_sql,
    "undone in SQL over text": undone_in_sql_over_text,
    "undone savepoint": undone_savepoint,
    "undone before an unknown function": undone_before_an_unknown_function,
    "undone after a failure": undone_after_a_failure,
    "connection": lambda session: session.connection().execute(select(items)).close(),
    "connection in a with block": with_connection,
    "connection that commits, in a with block": commit_with_connection,
    "connection, for update": over_the_connection,
    "temporary table with an index": temporary_with_an_index,
}


async def test_what_stores_nothing_is_not_forgotten(
    kind: Kind, engine: Engine, rows: Rows, subtests: pytest.Subtests
) -> None:
    """Through get_db, work that leaves nothing for a COMMIT to store needs no commit."""
    async with asking(engine, kind, get_db()) as request:
        for name, body in STORES_NOTHING.items():
            rows.clear()
            rows.add("there", position=1)
            with subtests.test(name):
                assert await request(body) == 201
                assert rows.names == ["there"]


def test_a_doubtful_read_does_not_list_the_locks_of_the_server(rows: Rows) -> None:
    """The query for unstored changes lists all sessions' locks only after a write."""

    def lists_locks() -> bool:
        plan = rows.connection.execute(f"EXPLAIN ANALYZE {transactions._UNSTORED}")
        scans = [line for (line,) in plan if "Function Scan on pg_lock_status" in line]
        return not scans[0].endswith("(never executed)")

    with rows.connection.transaction():
        assert not lists_locks()
        rows.connection.execute("INSERT INTO item (name) VALUES ('new')")
        assert lists_locks()


@pytest.mark.parametrize(
    "lose",
    [
        update(items).where(items.c.position == 1).values(position=2),
        delete(items).where(items.c.position == 1),
    ],
    ids=["update", "delete"],
)
async def test_a_race_that_is_lost_needs_no_commit(
    kind: Kind, engine: Engine, rows: Rows, lose: Any
) -> None:
    """A statement that waits for a row, which then no longer matches, needs no commit."""
    rows.add("there", position=1)

    def body(session: Session) -> None:
        assert session.execute(lose).rowcount == 0  # type: ignore[attr-defined] # a CursorResult

    with rows.connection.transaction():
        rows.connection.execute("UPDATE item SET position = 3")
        request = asyncio.create_task(ask(engine, kind, get_db(), body))
        await until(rows.waits)
    assert await request == 201
