"""Rule 5: a request fails if the database has rolled back its transaction by itself."""

import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import pytest
from sqlalchemy import Engine, StaticPool, column, create_engine, insert, make_url, table, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fastapi_sqlnative import get_db, transactional
from fastapi_sqlnative._drivers.transactions import has_rolled_back
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.exceptions import TransactionAbortedError, UncommittedChangesError
from tests.failing import of_driver
from tests.in_process import ask
from tests.serving import SQLITE, Item, Kind, Rows

pytestmark = pytest.mark.anyio

MARIADB = Kind("pymysql", "pymysql", False), Kind("asyncmy", "asyncmy", True)


def engine_at(kind: Kind, url: Any) -> Engine | AsyncEngine:
    options: dict[str, Any] = {"poolclass": StaticPool} if kind in SQLITE else {}
    if kind.asynchronous:
        return create_async_engine(url, **options)
    if kind in SQLITE:
        options["connect_args"] = {"check_same_thread": False}
    return create_engine(url, **options)


async def stored(engine: Engine | AsyncEngine, kind: Kind) -> list[str]:
    """Return the names that a later request finds, and dispose of the engine."""
    found: list[str] = []

    def look(session: Session) -> None:
        found.extend(session.scalars(text("SELECT name FROM item")))

    assert await ask(engine, kind, transactional(), look) == 201
    return found


# -- SQLite's ON CONFLICT ROLLBACK -------------------------------------------------------------

ROLLING_BACK = {
    "in the table": ("UNIQUE ON CONFLICT ROLLBACK", "INSERT INTO item VALUES ('taken')"),
    "in the statement": ("UNIQUE", "INSERT OR ROLLBACK INTO item VALUES ('taken')"),
}


@pytest.mark.parametrize("again", [False, True], ids=["then nothing", "then another write"])
@pytest.mark.parametrize(("unique", "insert"), ROLLING_BACK.values(), ids=ROLLING_BACK)
@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_a_conflict_that_rolls_back_is_no_success(
    kind: Kind, unique: str, insert: str, again: bool
) -> None:
    """After SQLite's ON CONFLICT ROLLBACK, the request fails and its transaction is not stored."""
    engine = engine_at(kind, f"sqlite+{kind.driver}://")

    def body(session: Session) -> None:
        session.execute(text(f"CREATE TABLE item (name text {unique})"))
        session.execute(text("INSERT INTO item VALUES ('taken')"))
        session.commit()
        session.execute(text("INSERT INTO item VALUES ('lost')"))
        with pytest.raises(DBAPIError, match="UNIQUE"):
            session.execute(text(insert))
        if again:
            session.execute(text("INSERT INTO item VALUES ('lost too')"))

    with pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), body, shutdown=None)
    assert await stored(engine, kind) == ["taken"]


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_a_conflict_that_keeps_the_transaction_is_a_success(kind: Kind) -> None:
    """On SQLite, a handled constraint error keeps the transaction, and the request commits."""
    engine = engine_at(kind, f"sqlite+{kind.driver}://")

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text UNIQUE)"))
        session.execute(text("INSERT INTO item VALUES ('kept')"))
        with pytest.raises(DBAPIError, match="UNIQUE"):
            session.execute(text("INSERT INTO item VALUES ('kept')"))

    assert await ask(engine, kind, transactional(), body, shutdown=None) == 201
    assert await stored(engine, kind) == ["kept"]


BEFORE_ANY_WRITE = "PRAGMA cache_size", "SELECT unknown_to_us(1)", "SELECT 1", "CREATE TABLE b (id)"


@pytest.mark.parametrize("first", BEFORE_ANY_WRITE)
@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_an_error_before_any_write_is_no_rollback(kind: Kind, first: str) -> None:
    """On SQLite, an error before the first write does not fail the request.

    Python's driver begins no transaction before a write, nor for DDL, so the error loses nothing.
    """
    engine = engine_at(kind, f"sqlite+{kind.driver}://")

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text)"))
        session.commit()
        with suppress(DBAPIError):
            session.execute(text(first)).close()
        with pytest.raises(DBAPIError, match="no such table"):
            session.execute(text("SELECT * FROM nowhere"))
        session.execute(text("INSERT INTO item VALUES ('kept')"))

    assert await ask(engine, kind, transactional(), body, shutdown=None) == 201
    assert await stored(engine, kind) == ["kept"]


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_rows_that_nobody_reads_stop_no_commit(kind: Kind) -> None:
    """On SQLite, a write is stored even if nothing reads the rows of its RETURNING."""
    engine = engine_at(kind, f"sqlite+{kind.driver}://")

    def body(session: Session) -> None:
        session.execute(text("CREATE TABLE item (name text)"))
        session.execute(text("INSERT INTO item VALUES ('kept') RETURNING name"))

    assert await ask(engine, kind, transactional(), body, shutdown=None) == 201
    assert await stored(engine, kind) == ["kept"]


@pytest.mark.parametrize("kind", SQLITE, ids=lambda kind: kind.id)
async def test_a_commit_that_is_never_sent_costs_no_connection(kind: Kind) -> None:
    """A commit that SQLAlchemy refuses after a failed flush does not lose a database in memory."""
    engine = engine_at(kind, f"sqlite+{kind.driver}://")

    def create(session: Session) -> None:
        Item.metadata.create_all(session.connection())
        session.add(Item(id=1, name="kept"))

    def swallow(session: Session) -> None:
        session.add(Item(id=1, name="refused"))
        with pytest.raises(IntegrityError):
            session.flush()

    assert await ask(engine, kind, transactional(), create, shutdown=None) == 201
    with pytest.raises(PendingRollbackError):
        await ask(engine, kind, transactional(), swallow, shutdown=None)
    assert await stored(engine, kind) == ["kept"]


# -- another database with PostgreSQL's protocol -----------------------------------------------


@pytest.mark.driver_decides
async def test_a_database_with_a_dialect_of_its_own_aborts_too(
    kind: Kind, engine: Engine | AsyncEngine, rows: Rows
) -> None:
    """With CockroachDB's dialect, a request that swallows an error also fails, on any driver."""
    sync_engine(engine).dialect.name = "cockroachdb"

    def body(session: Session) -> None:
        session.add(Item(name="lost"))
        session.flush()
        with suppress(DBAPIError):
            session.execute(text("SELECT 1 / 0"))

    with pytest.raises(TransactionAbortedError):
        await ask(engine, kind, transactional(), body)
    assert rows.names == []


@pytest.mark.parametrize("aborts", [True, False])
async def test_a_database_that_nobody_here_knows_is_asked(
    monkeypatch: pytest.MonkeyPatch, aborts: bool
) -> None:
    """On an unknown dialect such as DuckDB, a swallowed error fails the request if a ping fails."""
    engine = engine_at(SQLITE[0], "sqlite+pysqlite://")
    assert isinstance(engine, Engine)
    Item.metadata.create_all(engine)

    def ping(_connection: object) -> bool:
        if aborts:
            raise engine.dialect.loaded_dbapi.Error("aborted")
        return True

    monkeypatch.setattr(engine.dialect, "name", "duckdb")
    monkeypatch.setattr(engine.dialect, "do_ping", ping)

    def body(session: Session) -> None:
        session.execute(text("INSERT INTO item (id, name) VALUES (1, 'lost')"))
        with suppress(DBAPIError):
            session.execute(text("SELECT * FROM nowhere"))

    with pytest.raises(TransactionAbortedError) if aborts else nullcontext():
        await ask(engine, SQLITE[0], transactional(), body)


# -- MariaDB's deadlock ------------------------------------------------------------------------


@pytest.fixture
def server(mariadb: str) -> Iterator[Engine]:
    """Yield an engine for a new MariaDB database with two rows to lock."""
    admin = make_url(mariadb).set(drivername="mysql+pymysql")
    first = create_engine(admin)
    with first.begin() as connection:
        connection.execute(text("CREATE OR REPLACE DATABASE sqlnative_silent"))
    first.dispose()
    engine = create_engine(admin.set(database="sqlnative_silent"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE item (name varchar(20) PRIMARY KEY, n int)"))
        connection.execute(text("INSERT INTO item VALUES ('first', 0), ('second', 0)"))
        connection.execute(text("CREATE PROCEDURE look() SELECT * FROM item"))
        connection.execute(text("CREATE PROCEDURE store() INSERT INTO item VALUES ('lost', 0)"))
        connection.execute(text("CREATE PROCEDURE keep() BEGIN UPDATE item SET n = 1; COMMIT; END"))
    yield engine
    engine.dispose()


def change(name: str) -> Any:
    return text("UPDATE item SET n = n + 1 WHERE name = :name").bindparams(name=name)


@asynccontextmanager
async def crossing(server: Engine) -> AsyncGenerator[Callable[[], threading.Thread]]:
    """Lock the second row in a transaction that is too large to be the deadlock's victim.

    Yield a function that starts a thread in which this transaction waits for the first row.
    """
    with server.begin() as heavier:
        for number in range(20):
            heavier.execute(text(f"INSERT INTO item VALUES ('heavy {number}', 0)"))
        heavier.execute(change("second"))
        thread = threading.Thread(target=heavier.execute, args=(change("first"),))

        def start() -> threading.Thread:
            thread.start()
            return thread

        yield start
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.mariadb
@pytest.mark.parametrize("kind", MARIADB, ids=lambda kind: kind.id)
async def test_a_swallowed_deadlock_is_no_success(kind: Kind, server: Engine) -> None:
    """A swallowed MariaDB deadlock undoes the transaction and raises TransactionAbortedError."""
    engine = engine_at(kind, server.url.set(drivername=f"mysql+{kind.driver}"))

    async with crossing(server) as cross:

        def body(session: Session) -> None:
            session.execute(text("INSERT INTO item VALUES ('lost', 0)"))
            session.execute(change("first"))
            cross()
            with pytest.raises(DBAPIError, match="1213"):
                session.execute(change("second"))

        with pytest.raises(TransactionAbortedError):
            await ask(engine, kind, transactional(), body)
    with server.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM item WHERE name = 'lost'")) == 0


async def test_a_deadlock_is_known_by_its_number_wherever_it_is() -> None:
    """A deadlock is also recognised with MariaDB's own driver, whose `args` contain only text."""
    engine = create_engine("sqlite://")
    engine.dialect.name = "mysql"
    with engine.connect() as connection:
        found = [
            has_rolled_back(
                connection,
                of_driver("mariadb", "", errno=number),
                count_before=None,
                before_commit=False,
            )
            for number in (1213, 1205)
        ]
    assert found == [True, False]


async def without_commit(kind: Kind, server: Engine, *statements: Any) -> int:
    engine = engine_at(kind, server.url.set(drivername=f"mysql+{kind.driver}"))

    def body(session: Session) -> None:
        for each in statements:
            session.execute(each)

    return await ask(engine, kind, get_db(), body)


@pytest.mark.mariadb
@pytest.mark.parametrize("kind", MARIADB, ids=lambda kind: kind.id)
@pytest.mark.parametrize(
    "statement",
    [
        text("INSERT IGNORE INTO item VALUES ('first', 0)"),
        insert(table("item", column("name"))).prefix_with("IGNORE").values(name="first"),
        text("INSERT INTO item SELECT name, n FROM item WHERE n > 7"),
        text("\n  UPDATE `item` SET n = 1 WHERE n > 7"),
        text("\n  /* a report */ CALL look()"),
        text("TRUNCATE item"),
        text("CREATE TABLE `made` (n int)"),
        text("CALL keep()"),
    ],
    ids=[
        "ignored, text",
        "ignored",
        "from no row",
        "update of no row",
        "procedure that reads",
        "truncate, which commits",
        "DDL, which commits",
        "procedure that commits",
    ],
)
async def test_what_needs_no_commit_on_mariadb_is_not_forgotten(
    kind: Kind, server: Engine, statement: Any
) -> None:
    """On MariaDB, statements that write nothing or commit themselves need no commit.

    MariaDB cannot report what a COMMIT would store.
    """
    assert await without_commit(kind, server, statement) == 201


@pytest.mark.mariadb
@pytest.mark.parametrize("kind", MARIADB, ids=lambda kind: kind.id)
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_a_transaction_ended_in_sql_on_mariadb_needs_no_commit(
    kind: Kind, server: Engine, end: str
) -> None:
    """On MariaDB, changes that a textual COMMIT or ROLLBACK has ended need no commit."""
    assert await without_commit(kind, server, change("first"), text(end)) == 201


@pytest.mark.mariadb
@pytest.mark.parametrize("kind", MARIADB, ids=lambda kind: kind.id)
@pytest.mark.parametrize("flushes", [True, False], ids=["flush", "the end's flush"])
async def test_a_refused_flush_in_a_savepoint_on_mariadb_needs_no_commit(
    kind: Kind, server: Engine, flushes: bool
) -> None:
    """On MariaDB, a flush that a savepoint has undone needs no commit, whatever triggered it."""
    engine = engine_at(kind, server.url.set(drivername=f"mysql+{kind.driver}"))

    class Base(DeclarativeBase): ...

    class Row(Base):
        __tablename__ = "item"
        name: Mapped[str] = mapped_column(primary_key=True)

    def body(session: Session) -> None:
        with suppress(IntegrityError), session.begin_nested():
            session.add(Row(name="first"))
            if flushes:
                session.flush()
                pytest.fail("the key was not unique")

    assert await ask(engine, kind, get_db(), body) == 201


@pytest.mark.mariadb
@pytest.mark.parametrize("kind", MARIADB, ids=lambda kind: kind.id)
async def test_an_empty_list_in_bulk_on_mariadb_needs_no_commit(kind: Kind, server: Engine) -> None:
    """On MariaDB, a bulk method with an empty list writes nothing and needs no commit."""
    engine = engine_at(kind, server.url.set(drivername=f"mysql+{kind.driver}"))

    def body(session: Session) -> None:
        session.bulk_insert_mappings(Item, [])
        session.bulk_save_objects([])

    assert await ask(engine, kind, get_db(), body) == 201


@pytest.mark.mariadb
@pytest.mark.parametrize("kind", MARIADB, ids=lambda kind: kind.id)
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO `item` VALUES ('lost', 0)",
        "UPDATE `item` SET name = concat(name, '#')",
        "DELETE FROM `item`",
        "/* a report */ INSERT INTO item VALUES ('lost', 0)",
        "INSERT /* a report */ INTO item VALUES ('lost', 0) # SELECT 1",
        "-- SELECT 1\nINSERT INTO item VALUES ('lost', 0)",
        "INSERT INTO item VALUES ('it\\'s', 0)",
        "CALL `store`()",
        "CALL keep(); INSERT INTO item VALUES ('lost', 0)",
        "INSERT INTO item VALUES ('lost', 0) RETURNING name",
        "INSERT INTO item VALUES ('lost', 0); CREATE OR REPLACE TEMPORARY TABLE `made` (n int)",
    ],
)
async def test_forgotten_text_on_mariadb_is_no_success(
    kind: Kind, server: Engine, statement: str
) -> None:
    """On MariaDB, text whose first word writes is not forgotten, however quoted or commented."""
    with pytest.raises(UncommittedChangesError):
        await without_commit(kind, server, *map(text, statement.split("; ")))


@pytest.mark.mariadb
@pytest.mark.parametrize("kind", MARIADB, ids=lambda kind: kind.id)
async def test_a_forgotten_write_on_a_lost_connection_to_mariadb_is_no_success(
    kind: Kind, server: Engine
) -> None:
    """A forgotten write fails the request even if MariaDB has closed the connection since."""
    engine = engine_at(kind, server.url.set(drivername=f"mysql+{kind.driver}"))

    def body(session: Session) -> None:
        session.execute(text("INSERT INTO item VALUES ('lost', 0)"))
        number = session.scalar(text("SELECT connection_id()"))
        with server.connect() as other:
            other.execute(text(f"KILL {number}"))
            open_ones = text("SELECT id FROM information_schema.processlist")
            while number in other.scalars(open_ones).all():
                pass

    with pytest.raises(UncommittedChangesError):
        await ask(engine, kind, get_db(), body)
