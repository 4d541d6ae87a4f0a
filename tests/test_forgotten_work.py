"""Rule 6: a request with uncommitted work fails, whatever wrote it and however it ends."""

import contextlib
import itertools
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import (
    Connection,
    Engine,
    StaticPool,
    column,
    create_engine,
    event,
    func,
    insert,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Mapped, Session, SessionTransaction, registry

from fastapi_sqlnative import get_db, install_database, reader, transactional
from fastapi_sqlnative.exceptions import ReadOnlySessionError, UncommittedChangesError
from tests.in_process import ask, asking, async_sqlite, running, session_class, sqlite
from tests.serving import SQLITE, Item, Kind, Rows, copy, items, of_the_transaction, route, using

pytestmark = pytest.mark.anyio

Body = Callable[[Session], Any]

STORE = """
CREATE OR REPLACE FUNCTION store(name text) RETURNS int LANGUAGE sql AS
    'INSERT INTO item (name) VALUES (name) RETURNING id';
CREATE OR REPLACE PROCEDURE store_it(name text) LANGUAGE sql AS
    'INSERT INTO item (name) VALUES (name)';
"""


@pytest.fixture
def there(rows: Rows) -> Rows:
    """Store one row, and create a function and a procedure whose calls do not look like writes."""
    rows.connection.execute(STORE)
    rows.add("there")
    return rows


def run(statement: Any) -> Body:
    """Return a body that executes one statement, which may be a string."""

    def body(session: Session) -> None:
        session.execute(text(statement) if isinstance(statement, str) else statement).close()

    return body


def silent(body: Body) -> Body:
    """Return a body without its result, which would otherwise become the response."""

    def run(session: Session) -> None:
        body(session)

    return run


def in_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        session.execute(text("INSERT INTO item (name) VALUES ('lost')"))


def beside_an_undone_savepoint(session: Session) -> None:
    session.execute(text("INSERT INTO item (name) VALUES ('lost')"))
    savepoint = session.begin_nested()
    session.execute(text("INSERT INTO item (name) VALUES ('undone')"))
    savepoint.rollback()


def over_the_transaction(session: Session) -> None:
    session.execute(select(Item)).close()
    current = session.get_transaction()
    assert current is not None
    current.connection(None).execute(insert(items).values(name="lost"))


def over_what_the_transaction_has(session: Session) -> None:
    session.execute(select(Item)).close()
    [connection] = of_the_transaction(session)
    connection.execute(insert(items).values(name="lost"))


def over_the_bound_connection(session: Session) -> None:
    session.execute(select(Item)).close()
    # SQLAlchemy 2.1.7 and later.
    known = hasattr(SessionTransaction, "bound_connection")
    transaction: Any = session.get_transaction()
    connection = transaction.bound_connection() if known else session.connection()
    connection.execute(insert(items).values(name="lost"))


CREATE_FUNCTION = text("CREATE FUNCTION made() RETURNS int LANGUAGE sql AS $$ SELECT 1 $$")


def beside_a_row_lock(session: Session) -> None:
    session.execute(text("SELECT * FROM item FOR UPDATE"))
    session.execute(CREATE_FUNCTION)


def over_the_connection_beside_a_row_lock(sql: str) -> Body:
    def body(session: Session) -> None:
        session.connection().execute(text("TABLE item FOR UPDATE")).close()
        session.connection().execute(text(sql))

    return body


def defined_beside_an_undone_savepoint(session: Session) -> None:
    savepoint = session.begin_nested()
    session.execute(text("INSERT INTO item (name) VALUES ('undone')"))
    savepoint.rollback()
    session.execute(CREATE_FUNCTION)


def delete_an_attribute(session: Session) -> None:
    row = session.scalars(select(Item)).one()
    assert row.position is None
    row.position = 7
    session.commit()
    del row.position  # NULL again


def expression(session: Session) -> None:
    """Set an attribute to an SQL expression, of which the object keeps nothing after the flush."""
    session.scalars(select(Item)).one().position = func.coalesce(items.c.position, 0) + 1
    session.flush()


class Part:
    """A row of a subquery, whose changes SQLAlchemy stores anyway."""

    id: Mapped[int]
    name: Mapped[str]


registry().map_imperatively(Part, select(items.c.id, items.c.name).subquery())


def part(session: Session) -> None:
    session.scalars(select(Part)).one().name = "lost"


WRITES: dict[str, Body] = {
    "text": run("INSERT INTO item (name) VALUES ('lost')"),
    "text after a comment": run("-- audit\n/* ; */ insert into item (name) values ('lost')"),
    "text, columns": run(
        text("INSERT INTO item (name) VALUES ('lost') RETURNING id").columns(column("id"))
    ),
    "text, two rows": lambda session: session.execute(
        text("INSERT INTO item (name) VALUES (:name)"), [{"name": "lost"}, {"name": "lost too"}]
    ).close(),
    "CTE in text": run(
        "WITH new AS (INSERT INTO item (name) VALUES ('lost') RETURNING id) SELECT * FROM new"
    ),
    "CTE of an upsert of no row": run(
        "WITH new AS (INSERT INTO item (name) VALUES ('lost')) INSERT INTO item (name)"
        " SELECT name FROM item WHERE false ON CONFLICT (name) DO UPDATE SET position = 2"
    ),
    "CTE of an update of no row": run(
        update(items)
        .where(items.c.id == 0)
        .values(name="none")
        .add_cte(insert(items).values(name="lost").cte("new"))
    ),
    "DO block": run("DO $$ BEGIN INSERT INTO item (name) VALUES ('lost'); END $$"),
    "merge": run(
        "MERGE INTO item USING (VALUES ('lost')) AS new (name) ON item.name = new.name "
        "WHEN NOT MATCHED THEN INSERT (name) VALUES (new.name)"
    ),
    "procedure": run("CALL store_it('lost')"),
    "function": run(select(func.store("lost"))),
    "function in a table's place": run(
        select(func.store("lost").table_valued("store", name="store"))
    ),
    "function of a schema": run(select(func.public.store("lost"))),
    "function in text": run("SELECT store('lost')"),
    "function in a fragment": run(select(text("store('lost')"))),
    "function in a literal column": run(select(literal_column("store('lost')"))),
    "create table": run("CREATE TABLE made (n int)"),
    "create table of a query": run("SELECT * INTO made FROM item"),
    "create function": run("CREATE FUNCTION made() RETURNS int LANGUAGE sql AS 'SELECT 1'"),
    "alter": run("ALTER TABLE item ADD COLUMN made int"),
    "truncate": run("TRUNCATE item"),
    "copy": lambda session: copy(session, "lost"),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(
        Item.__mapper__, [{"name": "lost"}]
    ),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Item(name="lost")]),
    "orm bulk insert": lambda session: session.execute(
        insert(Item), [{"name": "lost"}, {"name": "lost too"}]
    ).close(),
    "raw cursor": lambda session: (
        session.connection().connection.cursor().execute("INSERT INTO item (name) VALUES ('lost')")
    ),
    "connection of the transaction": over_the_transaction,
    "connections that the transaction has": over_what_the_transaction_has,
    "bound connection of the transaction": over_the_bound_connection,
    "attribute that is deleted": delete_an_attribute,
    "attribute set to an expression": expression,
    "attribute of a subquery": part,
    "in a savepoint": in_a_savepoint,
    "beside an undone savepoint": beside_an_undone_savepoint,
    "create function beside a row lock": beside_a_row_lock,
    "large object": run("SELECT lo_from_bytea(0, 'lost')"),
    "alter beside a row lock": over_the_connection_beside_a_row_lock(
        "ALTER TABLE item ADD COLUMN made int"
    ),
    "create trigger beside a row lock": over_the_connection_beside_a_row_lock(
        "CREATE TRIGGER made BEFORE UPDATE ON item FOR EACH ROW"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    ),
    "create function beside an undone savepoint": defined_beside_an_undone_savepoint,
}


# Writes that bypass the session's methods and use the driver's own cursor or connection.
PAST_THE_SESSION = ["copy", "raw cursor"]
OTHERS = [each for each in WRITES if each not in PAST_THE_SESSION]


@pytest.mark.parametrize(
    "writes",
    [
        pytest.param(PAST_THE_SESSION, id="past the session", marks=pytest.mark.driver_decides),
        pytest.param(OTHERS, id="others"),
    ],
)
async def test_no_forgotten_work_is_a_success(
    kind: Kind, engine: Engine, there: Rows, writes: list[str], subtests: pytest.Subtests
) -> None:
    """With get_db, a request fails if it has not committed what a COMMIT would have stored."""
    async with asking(engine, kind, get_db()) as request:
        for write in writes:
            there.clear("there")
            with subtests.test(write):
                with pytest.raises(UncommittedChangesError):
                    await request(silent(WRITES[write]))
                found = there.connection.execute(
                    "SELECT to_regclass('made'), to_regproc('made'),"
                    " (SELECT count(*) FROM pg_attribute WHERE attname = 'made')"
                ).fetchone()
                assert (there.names, found) == (["there"], (None, None, 0))


async def test_a_forgotten_write_to_a_foreign_table_is_no_success(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """An uncommitted write to a foreign table raises UncommittedChangesError.

    PostgreSQL assigns no transaction id to it, and stores it on the other server.
    """
    rows.connection.execute("""
        CREATE EXTENSION postgres_fdw;
        DO $$BEGIN EXECUTE format(
            'CREATE SERVER other FOREIGN DATA WRAPPER postgres_fdw
             OPTIONS (host ''127.0.0.1'', port %L, dbname %L);
             CREATE USER MAPPING FOR CURRENT_USER SERVER other
             OPTIONS (user %L, password_required ''false'')',
            current_setting('port'), current_database(), current_user
        ); END$$;
        CREATE FOREIGN TABLE away (name text) SERVER other OPTIONS (table_name 'item')
    """)
    try:
        with pytest.raises(UncommittedChangesError):
            await ask(engine, kind, get_db(), run("INSERT INTO away VALUES ('lost')"))
    finally:
        rows.connection.execute("DROP EXTENSION postgres_fdw CASCADE")
    assert rows.names == []


@pytest.mark.parametrize(
    ("dependency", "refused"),
    [(get_db(), UncommittedChangesError), (reader(), ReadOnlySessionError)],
)
@pytest.mark.parametrize("again", [False, True], ids=["connected", "connects"])
async def test_what_a_listener_writes_for_an_unchanged_row_is_no_success(
    kind: Kind, engine: Engine, there: Rows, dependency: Any, refused: type[Exception], again: bool
) -> None:
    """A mapper listener's write fails the request, even in a flush that sends nothing else."""

    def write(_mapper: object, connection: Connection, _row: Item) -> None:
        connection.execute(insert(items).values(name="lost"))

    def body(session: Session) -> None:
        row = session.scalars(select(Item)).one()
        if again:  # so that the flush opens the connection
            session.commit()
        row.name = str(row.name)
        session.flush()

    event.listen(Item, "before_update", write)
    try:
        async with asking(engine, kind, dependency) as request:
            with pytest.raises(refused):
                await request(body)
    finally:
        event.remove(Item, "before_update", write)
    assert there.names == ["there"]


async def test_a_change_by_an_after_commit_listener_is_flushed(
    kind: Kind, engine: Engine, there: Rows, subtests: pytest.Subtests
) -> None:
    """What an `after_commit` listener changes reaches the next query, and needs a commit."""

    class Changing(Session): ...

    @event.listens_for(Changing, "after_commit")
    def change(session: Session) -> None:
        session.info["row"].name = "changed"

    def query(session: Session) -> None:
        assert session.scalar(select(func.count()).where(Item.name == "changed")) == 1

    def flush(session: Session) -> None:
        session.flush()

    options = session_class(kind, Changing)
    async with asking(engine, kind, get_db(), session_options=options) as request:
        for use in query, flush:
            with subtests.test(use.__name__):

                def body(session: Session, use: Body = use) -> None:
                    session.info["row"] = session.scalars(select(Item)).one()
                    session.commit()
                    use(session)

                with pytest.raises(UncommittedChangesError):
                    await request(body)
    assert there.names == ["there"]


async def test_a_refused_flush_of_a_reader_says_nothing_about_the_next(
    kind: Kind, engine: Engine, there: Rows
) -> None:
    """A reader that has refused an object flushes an unchanged one, once the first is gone."""

    def body(session: Session) -> None:
        session.add(refused := Item(name="refused"))
        with pytest.raises(ReadOnlySessionError):
            session.flush()
        session.expunge(refused)
        row = session.scalars(select(Item)).one()
        row.name = str(row.name)
        session.flush()

    assert await ask(engine, kind, reader(), body) == 201


def prepared(session: Session) -> None:
    session.add(Item(name="lost"))
    session.prepare()


def prepared_by_the_transaction(session: Session) -> None:
    transaction = session.begin()
    session.execute(text("INSERT INTO item (name) VALUES ('lost')"))
    transaction.prepare()


def committed(body: Body) -> Body:
    def run(session: Session) -> None:
        body(session)
        session.commit()

    return run


async def test_prepared_work_needs_its_commit(
    kind: Kind, engine: Engine, rows: Rows, subtests: pytest.Subtests
) -> None:
    """A two-phase session that is prepared and not committed raises UncommittedChangesError."""
    async with asking(engine, kind, get_db(), session_options={"twophase": True}) as request:
        for body in (prepared, prepared_by_the_transaction):
            rows.clear()
            with subtests.test(body.__name__):
                with pytest.raises(UncommittedChangesError):
                    await request(body)
                assert rows.names == []
                assert await request(committed(body)) == 201
                assert rows.names == ["lost"]
            assert await request(lambda session: session.prepare()) == 201  # nothing to store


# -- closing a session with uncommitted work ---------------------------------------------------


def with_block(session: Session) -> None:
    with session:
        session.execute(text("SELECT * FROM item")).close()


ENDS: dict[str, Body] = {
    "close": lambda session: session.close(),
    "reset": lambda session: session.reset(),
    "invalidate": lambda session: session.invalidate(),
    "with session": with_block,
}
CLOSED_OVER = ["text", "function in text", "copy", "create table"]


@pytest.mark.parametrize("dependency", [get_db(), transactional()], ids=["get_db", "transactional"])
async def test_closing_over_work_is_no_success(
    kind: Kind, engine: Engine, there: Rows, dependency: Any, subtests: pytest.Subtests
) -> None:
    """close(), reset(), invalidate() and `with session` fail the request if work is uncommitted."""

    def closing(write: str, end: str) -> Body:
        def body(session: Session) -> None:
            WRITES[write](session)
            ENDS[end](session)

        return body

    async with asking(engine, kind, dependency) as request:
        for write, end in itertools.product(CLOSED_OVER, ENDS):
            there.clear("there")
            with subtests.test(f"{end} over {write}"):
                with pytest.raises(UncommittedChangesError):
                    await request(closing(write, end))
                assert there.names == ["there"]


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_a_read_of_another_session_hides_no_closed_one(
    kind: Kind, engine: Engine, there: Rows, end: Body
) -> None:
    """A request that closes one session with uncommitted work and reads through another fails."""

    def closing(session: Session) -> None:
        WRITES["text"](session)
        end(session)

    def read(session: Session) -> None:
        session.execute(text("SELECT 1"))

    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    closed = Depends(using(kind, Depends(get_db()), closing))
    route(app, kind, "/", reader(), read, dependencies=[closed])
    async with running(app) as client:
        with pytest.raises(UncommittedChangesError):
            await client.post("/")


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("decide", ["commit", "rollback"])
async def test_closing_after_a_decision_is_a_success(
    kind: Kind, engine: Engine, there: Rows, end: Body, decide: str
) -> None:
    """After a commit or a rollback, the application may close the session in any way."""

    def body(session: Session) -> None:
        WRITES["text"](session)
        getattr(session, decide)()
        end(session)

    assert await ask(engine, kind, get_db(), body) == 201
    assert ("lost" in there.names) is (decide == "commit")


# -- on SQLite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
@pytest.mark.parametrize("end", [lambda _: None, *ENDS.values()], ids=["left open", *ENDS])
async def test_forgotten_text_on_sqlite_is_no_success(kind: Kind, end: Body) -> None:
    """On SQLite, an uncommitted text statement fails the request only if it has changed a row."""
    engine = async_sqlite() if kind.asynchronous else sqlite()

    def unchanged(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text)"))
        session.commit()
        session.execute(text("DELETE FROM item"))
        session.execute(text("WITH none AS (SELECT 1) DELETE FROM item"))

    def body(session: Session) -> None:
        unchanged(session)
        session.execute(text("WITH one AS (SELECT 'lost') INSERT INTO item SELECT * FROM one"))
        end(session)

    assert await ask(engine, kind, get_db(), unchanged) == 201
    engine = async_sqlite() if kind.asynchronous else sqlite()
    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), body)


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_a_forgotten_trigger_on_sqlite_is_no_success(kind: Kind) -> None:
    """On SQLite, uncommitted DDL fails the request, even if its text contains a semicolon.

    DDL changes no row, but it is a write.
    """
    engine = async_sqlite() if kind.asynchronous else sqlite()

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text)"))
        session.commit()
        begin = "BEGIN"  # which Python's driver doesn't send before DDL
        session.execute(text(begin))
        session.execute(
            text("CREATE TRIGGER made AFTER INSERT ON item BEGIN DELETE FROM item; END")
        )

    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), body)


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
@pytest.mark.parametrize("read", ["all rows", "no row"])
async def test_a_forgotten_update_that_returns_its_rows_is_no_success(
    kind: Kind, read: str
) -> None:
    """On SQLite, an uncommitted UPDATE with RETURNING fails the request.

    SQLite counts its rows only at the end, and not yet when the statement is sent.
    """
    engine = async_sqlite() if kind.asynchronous else sqlite()
    changed = update(items).values(position=7).returning(items.c.position)

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text, position int)"))
        session.execute(text("INSERT INTO item VALUES ('there', 1)"))
        session.commit()
        session.info["result"] = result = session.scalars(changed)
        assert read == "no row" or result.all() == [7]

    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), body)


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
@pytest.mark.parametrize("names", [["lost", "there"], ["there", "lost"]], ids=["kept", "none"])
async def test_rows_before_one_that_failed_are_forgotten(kind: Kind, names: list[str]) -> None:
    """On SQLite, rows that were inserted before a row that failed need a commit.

    SQLite keeps them, so code that handles the error must commit.
    """
    engine = async_sqlite() if kind.asynchronous else sqlite()

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text UNIQUE)"))
        session.execute(text("INSERT INTO item VALUES ('there')"))
        session.commit()
        with pytest.raises(IntegrityError):
            session.execute(
                text("INSERT INTO item VALUES (:name)"), [{"name": name} for name in names]
            )

    if names[0] == "there":
        assert await ask(engine, kind, get_db(), body) == 201
        return
    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), body)


class Uncounted(sqlite3.Connection):
    """The connection of an SQLite driver that does not count changes, such as libsql."""

    @property
    def total_changes(self) -> int:
        raise AttributeError


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_a_driver_for_sqlite_need_not_count(kind: Kind) -> None:
    """If an SQLite driver does not count changes, sessions work and forgotten writes are found."""
    options: dict[str, Any] = {"connect_args": {"factory": Uncounted, "check_same_thread": False}}
    made = create_async_engine if kind.asynchronous else create_engine
    engine: Any = made(f"sqlite+{kind.driver}://", poolclass=StaticPool, **options)

    def create(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text NOT NULL)"))
        nested_first(session)

    def read(session: Session) -> None:
        assert session.scalars(text("SELECT name FROM item")).all() == ["undone"]

    def fail(session: Session) -> None:
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT INTO item (name) VALUES (NULL)"))

    def forget(session: Session) -> None:
        session.execute(text("INSERT INTO item (name) VALUES ('lost')"))

    assert await ask(engine, kind, transactional(), create, shutdown=None) == 201
    assert await ask(engine, kind, get_db(), read, shutdown=None) == 201
    assert await ask(engine, kind, get_db(), fail, shutdown=None) == 201
    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), forget)


def nested_first(session: Session) -> None:
    with session.begin_nested():
        session.execute(text("INSERT INTO item (name) VALUES ('undone')"))


def nested_after_a_read(session: Session) -> None:
    session.execute(text("SELECT * FROM item")).close()
    nested_first(session)


def nested_on_the_connection(session: Session) -> None:
    connection = session.connection()
    with connection.begin_nested():
        connection.execute(text("INSERT INTO item (name) VALUES ('undone')"))


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
@pytest.mark.parametrize("nested", [nested_first, nested_after_a_read, nested_on_the_connection])
async def test_the_end_of_a_savepoint_stores_nothing_on_sqlite(kind: Kind, nested: Body) -> None:
    """On SQLite, a rollback undoes a released savepoint, with Python's driver unmodified."""
    engine = async_sqlite() if kind.asynchronous else sqlite()
    found: list[Any] = []

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text)"))
        session.commit()
        nested(session)
        session.rollback()
        found.extend(session.execute(text("SELECT * FROM item")).all())

    assert await ask(engine, kind, transactional(), body) == 201
    assert found == []


def undo_one_in_another(session: Session) -> None:
    outer = session.begin_nested()
    inner = session.begin_nested()
    session.execute(text("INSERT INTO item (name) VALUES ('undone')"))
    inner.rollback()
    outer.rollback()


def undo_one_twice(session: Session) -> None:
    session.execute(text("SAVEPOINT first"))
    for _ in range(2):
        session.execute(text("INSERT INTO item (name) VALUES ('undone')"))
        session.execute(text("ROLLBACK TO SAVEPOINT first"))


def undo_by_a_flush(session: Session) -> None:
    with contextlib.suppress(IntegrityError), session.begin_nested():
        for _ in range(2):
            session.add(Item(id=7, name="undone"))
            session.flush()
            session.expunge_all()
        pytest.fail("the key was not unique")


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
@pytest.mark.parametrize("undo", [undo_one_in_another, undo_one_twice, undo_by_a_flush])
@pytest.mark.parametrize("forgets", [True, False], ids=["forgotten", "nothing left"])
async def test_undone_savepoints_and_forgotten_work_on_sqlite(
    kind: Kind, undo: Body, forgets: bool
) -> None:
    """On SQLite, writes undone by a savepoint do not count, and writes before it still do."""
    engine = async_sqlite() if kind.asynchronous else sqlite()

    def body(session: Session) -> None:
        session.execute(
            text("CREATE TABLE item (id integer PRIMARY KEY, name text, position integer)")
        )
        session.execute(text("INSERT INTO item (name) VALUES ('stored')"))
        session.commit()
        if forgets:
            session.execute(text("INSERT INTO item (name) VALUES ('lost')"))
        else:
            session.connection()  # anything may be sent over it, so SQLite's count decides
        undo(session)

    refused = pytest.raises(UncommittedChangesError) if forgets else contextlib.nullcontext()
    with refused:
        assert await ask(engine, kind, get_db(), body) == 201


async def test_the_last_batch_does_not_speak_for_the_others(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """An upsert in batches whose last one inserts no row is forgotten work if an earlier one does.

    With RETURNING, SQLAlchemy splits a long list, and the row count is that of the last part.
    """
    rows.add("there")
    inserting = upsert(items).on_conflict_do_nothing(index_elements=["name"]).returning(items.c.id)

    def body(session: Session) -> None:
        one_by_one = {"insertmanyvalues_page_size": 1}
        names = [{"name": "lost"}, {"name": "there"}]
        session.execute(inserting, names, execution_options=one_by_one).all()

    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), body)
