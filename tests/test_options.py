"""Rules 3 and 10: isolation level, read-only and reader, as the server itself reports them."""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import (
    DDL,
    ClauseElement,
    Column,
    Engine,
    Executable,
    Integer,
    MetaData,
    Sequence,
    Table,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    lambda_stmt,
    literal,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql.compiler import SQLCompiler

from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    get_db,
    install_database,
    install_error_handlers,
    reader,
    transactional,
)
from fastapi_sqlnative._sessions.engines import sync_engine
from fastapi_sqlnative.exceptions import ReadOnlySessionError, TransactionOptionsError
from tests.conftest import MakeEngine
from tests.in_process import ask
from tests.serving import KINDS, Item, Kind, Rows, items, of_the_transaction, route, serve, using

LEVELS: tuple[Any, ...] = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


def make_app(engine: Any, **options: Any) -> FastAPI:
    """Build an application that answers the package's errors with their class and message."""
    app = FastAPI(**options)
    install_database(app, engine=engine, shutdown=engine.dispose)

    def answer(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": type(error).__name__, "message": str(error)}, 409)

    for error in ReadOnlySessionError, TransactionOptionsError:
        app.add_exception_handler(error, answer)
    return app


SETTINGS = text(
    "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
    " pg_backend_pid()"
)


def settings(session: Session) -> list[Any]:
    """Return the transaction's isolation level and read-only setting, and the server process."""
    return list(session.execute(SETTINGS).one())


def raw_settings(engine: Any) -> Callable[[Any], Any]:
    """Return an endpoint that asks for the same through the application's own engine."""
    if isinstance(engine, AsyncEngine):

        async def asynchronous() -> list[Any]:
            async with engine.connect() as connection:
                return list((await connection.execute(SETTINGS)).one())

        return asynchronous  # type: ignore[return-value] # FastAPI accepts both

    def synchronous() -> list[Any]:
        with engine.connect() as connection:
            return list(connection.execute(SETTINGS).one())

    return synchronous  # type: ignore[return-value]


# -- transactions ----------------------------------------------------------------------------


@pytest.mark.driver_decides
# One level together with read_only shows that neither undoes the other.
@pytest.mark.parametrize(
    ("level", "read_only"),
    [*((level, False) for level in (None, *LEVELS)), (None, True), ("SERIALIZABLE", True)],
)
def test_options_hold_for_one_transaction(
    kind: Kind, engine: Engine, rows: Rows, level: Any, read_only: bool
) -> None:
    """Options apply during the request, and the same connection has none of them afterwards."""
    app = make_app(engine)
    route(app, kind, "/", transactional(isolation_level=level, read_only=read_only), settings)
    route(app, kind, "/plain", transactional(), settings)
    app.post("/raw")(raw_settings(engine))
    with serve(app) as served:
        level_seen, read_only_seen, backend = served.post("/").json()
        assert level_seen == (level or "READ COMMITTED").lower()
        assert read_only_seen == ("on" if read_only else "off")
        for path in "/plain", "/raw":
            assert served.post(path).json() == ["read committed", "off", backend]


needs_options_of_sessions = pytest.mark.skipif(
    "execution_options" not in inspect.signature(Session).parameters,
    reason="SQLAlchemy 2.1 and later",
)


@needs_options_of_sessions  # older versions of SQLAlchemy warn about such a listener
@pytest.mark.parametrize(
    ("dependency", "expected"),
    [
        (transactional(isolation_level="SERIALIZABLE", read_only=True), ["serializable", "on"]),
        (reader(), ["read committed", "off"]),
    ],
)
@pytest.mark.anyio
async def test_options_hold_where_a_listener_asks_the_server_first(
    kind: Kind, engine: Engine, rows: Rows, dependency: Callable[..., Any], expected: list[str]
) -> None:
    """Options apply even if a listener begins the transaction before the session can.

    SQLAlchemy's recipe for a ping is such a listener.
    """
    found: list[list[Any]] = []
    event.listen(sync_engine(engine), "engine_connect", lambda each: each.scalar(select(1)))
    await ask(engine, kind, dependency, lambda session: found.append(settings(session)[:2]))
    assert found == [expected]


@pytest.mark.anyio
async def test_options_hold_where_a_savepoint_comes_first(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """The options apply to the transaction around a savepoint, and to the savepoint."""
    found: list[list[Any]] = []

    def body(session: Session) -> None:
        with session.begin_nested():
            found.append(settings(session)[:2])
        found.append(settings(session)[:2])

    dependency = transactional(isolation_level="SERIALIZABLE", read_only=True)
    await ask(engine, kind, dependency, body)
    assert found == [["serializable", "on"]] * 2


@needs_options_of_sessions
@pytest.mark.parametrize("of", ["session", "engine"])
@pytest.mark.anyio
async def test_options_replace_those_that_the_application_gives(
    kind: Kind, engine: Engine, rows: Rows, of: str
) -> None:
    """A transaction's own options replace those that `session_options` or the engine set.

    A session of get_db keeps the application's options.
    """
    found: list[list[Any]] = []
    given: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": False}
    options: dict[str, Any] = {"session_options": {"execution_options": given}}
    if of == "engine":
        engine, options = engine.execution_options(**given), {}
    for dependency in transactional(isolation_level="SERIALIZABLE", read_only=True), get_db():
        await ask(
            engine, kind, dependency, lambda session: found.append(settings(session)), **options
        )
    assert [each[:2] for each in found] == [["serializable", "on"], ["repeatable read", "off"]]
    await ask(engine, kind, reader(), lambda session: found.append(settings(session)), **options)
    assert found[-1][0] == "read committed"  # a reader is in AUTOCOMMIT


@pytest.mark.driver_decides
def test_options_are_gone_after_a_failure(kind: Kind, engine: Engine, rows: Rows) -> None:
    """After a transaction with options was rolled back, its connection has none of them."""
    app = make_app(engine)
    backends: list[int] = []

    def body(session: Session) -> None:
        backends.append(settings(session)[2])
        session.execute(text("SELECT 1 / 0"))

    route(app, kind, "/", transactional(isolation_level="SERIALIZABLE", read_only=True), body)
    route(app, kind, "/plain", transactional(), settings)
    with serve(app) as served:
        assert served.post("/").status_code == 500
        assert served.post("/plain").json() == ["read committed", "off", *backends]


def test_options_hold_after_an_explicit_commit(kind: Kind, engine: Engine, rows: Rows) -> None:
    """The transaction after a commit or a rollback inside the request has the same options."""
    app = make_app(engine)

    def body(session: Session) -> list[Any]:
        found = [settings(session)[:2]]
        session.commit()
        found.append(settings(session)[:2])
        session.rollback()
        found.append(settings(session)[:2])
        return found

    route(app, kind, "/", transactional(isolation_level="REPEATABLE READ", read_only=True), body)
    with serve(app) as served:
        assert served.post("/").json() == [["repeatable read", "on"]] * 3


@pytest.mark.driver_decides
def test_options_of_the_engine_come_back(kind: Kind, make_engine: MakeEngine) -> None:
    """After a transaction with options or a reader, the engine's own level applies again."""
    engine = make_engine(pool_size=1, max_overflow=0, isolation_level="REPEATABLE READ")
    app = make_app(engine)
    route(app, kind, "/", transactional(isolation_level="SERIALIZABLE"), settings)
    route(app, kind, "/plain", transactional(), settings)
    route(app, kind, "/reader", reader(), settings)
    app.post("/raw")(raw_settings(engine))
    with serve(app) as served:
        assert served.post("/").json()[0] == "serializable"
        served.post("/reader")
        for path in "/plain", "/raw":
            assert served.post(path).json()[0] == "repeatable read"


@pytest.mark.driver_decides
def test_the_server_refuses_a_write_in_read_only(kind: Kind, engine: Engine, rows: Rows) -> None:
    """The server refuses a write in a read-only transaction with 25006, even a textual one."""
    app = make_app(engine)

    def state(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, DBAPIError)
        return JSONResponse(getattr(error.orig, "sqlstate", ""), 500)

    app.add_exception_handler(DBAPIError, state)
    read_only, written = transactional(read_only=True), "INSERT INTO item (name) VALUES ('never')"
    route(app, kind, "/text", read_only, lambda session: session.execute(text(written)).close())
    route(app, kind, "/orm", read_only, lambda session: session.add(Item(name="never")))
    with serve(app) as served:
        for path in "/text", "/orm":
            response = served.post(path)
            assert (response.status_code, response.json()) == (500, "25006")
    assert rows.names == []


@pytest.mark.driver_decides
def test_serializable_is_the_servers(kind: Kind, make_engine: MakeEngine, rows: Rows) -> None:
    """A conflict between serializable transactions fails the request that commits second."""
    rows.add("a", position=1)
    engine = make_engine(pool_size=2)
    app = make_app(engine)

    def read_and_write(session: Session) -> None:
        count = len(session.scalars(select(Item)).all())
        rows.connection.execute("BEGIN ISOLATION LEVEL SERIALIZABLE")
        rows.connection.execute("SELECT * FROM item")
        rows.connection.execute("INSERT INTO item (name) VALUES ('theirs')")
        session.add(Item(name=f"ours after {count}"))
        session.flush()
        rows.connection.execute("COMMIT")

    route(app, kind, "/", transactional(isolation_level="SERIALIZABLE"), read_and_write)
    with serve(app) as served:
        assert served.post("/").status_code == 500
    assert rows.names == ["a", "theirs"]


READ_ONLY = transactional(read_only=True)
STRICT = transactional(isolation_level="SERIALIZABLE")


def test_options_after_the_first_statement_are_refused(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """Options after the first statement raise an error that says where to declare them."""
    app = make_app(engine)
    user = Depends(using(kind, Depends(get_db()), settings))
    reached: list[object] = []
    route(app, kind, "/late", STRICT, reached.append, dependencies=[user])
    # The router's dependencies come first, and the route's follow in their order.
    route(app, kind, "/first", get_db(), settings, dependencies=[Depends(STRICT), user])
    with serve(app) as served:
        late = served.post("/late").json()
        assert late["error"] == "TransactionOptionsError"
        assert "dependencies=[Depends(transactional('default', ...))]" in late["message"]
        assert reached == []
        assert served.post("/first").json()[0] == "serializable"
        assert rows.backends("idle in transaction%") == 0


def test_options_declared_by_the_application_come_first(
    kind: Kind, engine: Engine, rows: Rows
) -> None:
    """Options that the application declares apply in its routes, whatever reads there first."""
    app = make_app(engine, dependencies=[Depends(READ_ONLY)])
    user = Depends(using(kind, Depends(get_db()), settings))
    route(app, kind, "/", transactional(), settings, dependencies=[user])
    with serve(app) as served:
        assert served.post("/").json()[1] == "on"


def test_options_after_a_commit_are_in_time(kind: Kind, engine: Engine, rows: Rows) -> None:
    """Options apply after a dependency that has read and ended its transaction."""
    app = make_app(engine)

    def read(session: Session) -> None:
        settings(session)
        session.rollback()

    user = Depends(using(kind, Depends(get_db()), read))
    route(app, kind, "/", STRICT, settings, dependencies=[user])
    with serve(app) as served:
        assert served.post("/").json()[0] == "serializable"


@pytest.mark.parametrize(
    ("first", "second", "joins"),
    [
        (STRICT, transactional(), True),
        (transactional(), STRICT, True),
        (STRICT, STRICT, True),
        (STRICT, READ_ONLY, False),
        (STRICT, transactional(isolation_level="READ COMMITTED"), False),
        (READ_ONLY, transactional(isolation_level="SERIALIZABLE", read_only=True), False),
    ],
)
def test_a_request_has_one_set_of_options(
    kind: Kind,
    engine: Engine,
    rows: Rows,
    first: Callable[..., Any],
    second: Callable[..., Any],
    joins: bool,
) -> None:
    """A plain transactional joins one with options, and so does one with the same options.

    Different options raise an error that names the dependency.
    """
    app = make_app(engine)
    route(app, kind, "/", second, settings, dependencies=[Depends(first)])
    with serve(app) as served:
        answer = served.post("/").json()
    if joins:
        assert answer[0] == "serializable"
    else:
        assert answer["error"] == "TransactionOptionsError"
        assert "transactional('default') was asked for twice" in answer["message"]


@pytest.mark.parametrize("level", ["serializable", "SNAPSHOT", "", 3])
def test_a_wrong_isolation_level_fails_where_it_is_written(level: Any) -> None:
    """A wrong isolation level raises a ValueError at its declaration, which lists valid ones."""
    with pytest.raises(ValueError, match=r"READ COMMITTED, REPEATABLE READ, SERIALIZABLE"):
        transactional(isolation_level=level)


def test_autocommit_is_no_isolation_level_of_a_transaction() -> None:
    """AUTOCOMMIT as an isolation level raises a ValueError that names reader.

    It would be a transaction that commits nothing.
    """
    autocommit: Any = "AUTOCOMMIT"
    with pytest.raises(ValueError, match=r"depend on reader\(name\)"):
        transactional(isolation_level=autocommit)


# -- reader ----------------------------------------------------------------------------------


def state_of(rows: Rows, pid: int) -> str:
    found = rows.connection.execute("SELECT state FROM pg_stat_activity WHERE pid = %s", (pid,))
    row = found.fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.driver_decides
def test_a_reader_is_in_no_transaction(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A reader's connection is idle between queries, and each query reads newly committed rows."""
    app = make_app(engine)
    states: list[str] = []
    counts: list[int] = []

    def body(session: Session) -> Any:
        for name in "a", "b":
            pid = settings(session)[2]
            rows.add(name)
            counts.append(len(session.scalars(select(Item)).all()))
            states.append(state_of(rows, pid))
        return pid

    def plain(session: Session) -> Any:
        pid = settings(session)[2]
        states.append(state_of(rows, pid))
        return pid

    route(app, kind, "/", reader(), body)
    route(app, kind, "/plain", transactional(), plain)
    with serve(app) as served:
        assert served.post("/").json() == served.post("/plain").json()
    assert states == ["idle", "idle", "idle in transaction"]
    assert counts == [1, 2]


def test_a_reader_is_beside_the_transaction(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """A reader has its own session and connection, and does not read uncommitted rows."""
    app = make_app(make_engine(pool_size=2, max_overflow=0))
    seen: list[Any] = []

    def look(session: Session) -> None:
        seen.append((session, settings(session)[2], session.scalars(select(Item.name)).all()))

    def write(session: Session) -> None:
        session.add(Item(name="pending"))
        session.flush()
        look(session)

    writing = Depends(using(kind, Depends(transactional()), write))
    reading = [Depends(using(kind, Depends(reader()), look)) for _ in range(2)]
    route(app, kind, "/", reader(), look, dependencies=[writing, *reading])
    with serve(app) as served:
        assert served.post("/").status_code == 201
    (session, backend, found), *others = seen
    assert found == ["pending"]
    assert len({id(other) for other, _, _ in others}) == 1
    assert all(
        (other is not session, pid != backend, names) == (True, True, [])
        for other, pid, names in others
    )
    assert rows.names == ["pending"]


async def by_hand(request: Request) -> Any:
    return await get_db()(request)


def test_dependencies_that_are_called_by_hand(kind: Kind, engine: Engine, rows: Rows) -> None:
    """Called with the request alone, transactional() commits its session and reader() reads."""
    app = make_app(engine)
    called: Any = transactional(), reader()

    async def writing(request: Request) -> Any:
        return await called[0](request)

    async def reading(request: Request) -> Any:
        return await called[1](request)

    def write(session: Session) -> None:
        session.add(Item(name="a"))

    route(app, kind, "/", writing, write)
    route(app, kind, "/read", reading, read)
    with serve(app) as served:
        assert served.post("/").status_code == 201
        assert served.post("/read").json() == ["a"]
    assert rows.names == ["a"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_request_has_one_reader(kind: Kind, make_engine: MakeEngine, first: bool) -> None:
    """A reader that is called by hand is the one that the route declares, in either order."""
    app = make_app(make_engine(pool_size=1, max_overflow=0, pool_timeout=0.5))

    async def reading(request: Request) -> Any:
        called: Any = reader()
        return await called(request)

    by_hand, declared = (Depends(using(kind, Depends(each), read)) for each in (reading, reader()))
    dependencies = [by_hand, declared] if first else [declared, by_hand]
    route(app, kind, "/", reader(), read, dependencies=dependencies)
    with serve(app) as served:
        assert served.post("/").status_code == 201


def read(session: Session) -> list[str]:
    return list(session.scalars(select(Item.name)))


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("unseen", [by_hand, functools.partial(get_db())], ids=["hand", "partial"])
def test_a_reader_leaves_get_db_to_what_start_up_cannot_see(
    kind: Kind, make_engine: MakeEngine, rows: Rows, unseen: Any, first: bool
) -> None:
    """A get_db session, opened by hand or through a partial, can write beside a reader."""
    app = make_app(make_engine(pool_size=2, max_overflow=0))

    def write(session: Session) -> None:
        session.add(Item(name=str(len(read(session)))))
        session.commit()

    writing, reading = Depends(using(kind, Depends(unseen), write)), Depends(reader())
    first_one = writing if first else reading
    route(app, kind, "/", reader(), read, dependencies=[first_one, writing])
    opened = Depends(unseen)
    route(app, kind, "/late", unseen, write, dependencies=[opened if first else reading, reading])
    with serve(app) as served:
        answer = served.post("/")
        assert (answer.status_code, answer.json(), rows.names) == (201, ["0"], ["0"])
        assert served.post("/late").status_code == 201
    assert rows.names == ["0", "1"]


def flush(session: Session) -> None:
    session.add(Item(name="never"))
    session.flush()


def autoflush(session: Session) -> None:
    session.add(Item(name="never"))
    settings(session)


def commit(session: Session) -> None:
    session.add(Item(name="never"))
    session.commit()


def save_in_bulk(session: Session) -> None:
    session.bulk_save_objects([Item(name="never")])


def change(session: Session) -> None:
    session.scalars(select(Item)).one().name = "never"


WRITES: dict[str, Callable[[Session], Any]] = {
    "add": lambda session: session.add(Item(name="never")),
    "change": change,
    "delete": lambda session: session.delete(session.scalars(select(Item)).one()),
    "flush": flush,
    "autoflush": autoflush,
    "commit": commit,
    "bulk-save": save_in_bulk,
    "connection": lambda session: session.connection().execute(delete(items)).rowcount,
}
STATEMENTS: dict[str, Any] = {
    "orm-insert": insert(Item).values([{"name": "x"}, {"name": "y"}]),
    "orm-update": update(Item).values(name="never"),
    "orm-delete": delete(Item),
    "core-insert": insert(items).values(name="never"),
    "core-update": update(items).values(name="never"),
    "core-delete": delete(items),
    "returning": insert(items).values(name="never").returning(items.c.id),
    "from-statement": select(Item).from_statement(
        insert(Item).values(name="never").returning(Item)
    ),
    "cte": select(insert(items).values(name="never").returning(items.c.id).cte("new")),
    "cte-inside": select(literal(1)).where(
        exists(select(delete(items).returning(items.c.id).cte("gone").c.id))
    ),
}


TEXT = text("INSERT INTO item (name) VALUES ('never') RETURNING id, name")


class InsertFromSelect(Executable, ClauseElement):
    """The custom construct of SQLAlchemy's documentation."""

    inherit_cache = False


@compiles(InsertFromSelect, "postgresql")
def _compile(_element: InsertFromSelect, _compiler: SQLCompiler, **_: Any) -> str:
    return "INSERT INTO item (name) SELECT 'never'"


STATEMENTS |= {
    "text-from-statement": select(Item).from_statement(TEXT),
    "text-columns": select(Item).from_statement(TEXT.columns(items.c.id, items.c.name)),
    "text-cte": select(TEXT.columns(items.c.id, items.c.name).cte("new")),
    "text-lambda": lambda_stmt(lambda: TEXT),
    "construct": InsertFromSelect(),
}


def executing(statement: Any) -> Callable[[Session], None]:
    def body(session: Session) -> None:
        session.execute(statement)

    return body


def over_the_transaction(session: Session) -> None:
    session.execute(select(1)).close()
    current = session.get_transaction()
    assert current is not None
    current.connection(None).execute(insert(Item).values(name="never"))


def over_what_the_transaction_has(session: Session) -> None:
    session.execute(select(1)).close()
    [connection] = of_the_transaction(session)
    connection.execute(insert(Item).values(name="never"))


WRITES |= {name: executing(statement) for name, statement in STATEMENTS.items()}
WRITES |= {
    "drop": executing(text("DROP TABLE item")),
    "explain": executing(text("EXPLAIN ANALYZE DELETE FROM item")),
    "script": executing(text("SELECT 1; DELETE FROM item")),
    "escape": executing(text(r"SELECT E'it\'s'; DELETE FROM item")),
    "block": executing(text("DO LANGUAGE plpgsql $a$BEGIN PERFORM 1; DELETE FROM item; END$a$")),
    "connection of the transaction": over_the_transaction,
    "connections that the transaction has": over_what_the_transaction_has,
    "create from a temporary table": executing(text("CREATE TABLE x AS SELECT * FROM pg_temp.y")),
    "alter": executing(text("ALTER TABLE item ADD x int")),
    "create": executing(CreateTable(Table("made", MetaData(), Column("id", Integer)))),
    "define": executing(
        DDL("DO $$BEGIN CREATE TABLE made (id int); END$$")  # type: ignore[no-untyped-call]
    ),
}


def test_a_reader_refuses_to_write(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A recognisable write in a reader raises an error that names transactional, and is undone."""
    rows.add("there")
    app = make_app(engine)
    for name, body in WRITES.items():
        route(app, kind, f"/{name}", reader(), body)
    route(app, kind, "/next", transactional(), settings)
    with serve(app) as served:
        for name in WRITES:
            answer = served.post(f"/{name}")
            assert (name, answer.status_code) == (name, 409)
            assert answer.json()["error"] == "ReadOnlySessionError"
            assert "transactional('default')" in answer.json()["message"]
            assert rows.names == ["there"]
        assert served.post("/next").json()[:2] == ["read committed", "off"]


@pytest.mark.parametrize(
    "sql",
    [
        'SELECT may.update, may.delete FROM (SELECT 1 AS "update", 2 AS "delete") AS may',
        "SELECT 1 AS update, (SELECT 2) delete, 3 AS call",
        "SELECT * FROM item FOR  UPDATE",
        "EXPLAIN SELECT * FROM item FOR UPDATE NOWAIT",
        "EXPLAIN SELECT * FROM item FOR NO KEY UPDATE SKIP LOCKED",
        'SELECT \'drop\', "create" FROM (VALUES (1)) AS made("create")',
        "SELECT $$; delete$$, $a$; drop $$ ; drop$a$",
    ],
    ids=["columns", "names", "lock", "explain", "explain no key", "literals", "dollars"],
)
def test_a_reader_reads_what_looks_like_a_write(
    kind: Kind, engine: Engine, rows: Rows, sql: str
) -> None:
    """A reader accepts SQL words for writes that name columns, lock rows or are data."""
    app = make_app(engine)
    route(app, kind, "/", reader(), lambda session: len(session.execute(text(sql)).all()))
    with serve(app) as served:
        assert served.post("/").status_code == 201


def test_a_reader_executes_what_is_no_statement(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A reader executes a function whose name is a keyword, and a sequence."""
    app = make_app(engine)

    def body(session: Session) -> Any:
        next_id: Any = Sequence("item_id_seq")
        with pytest.deprecated_call():
            assert session.execute(next_id) is not None
        return session.scalar(func.replace("a", "a", "b"))

    route(app, kind, "/", reader(), body)
    with serve(app) as served:
        answer = served.post("/")
        assert (answer.status_code, answer.json()) == (201, "b")


def test_an_error_in_a_reader_ends_nothing(kind: Kind, engine: Engine, rows: Rows) -> None:
    """A failed query in a reader aborts nothing: the next query works, and the request succeeds."""
    rows.add("there")
    app = make_app(engine)

    def body(session: Session) -> Any:
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1 / 0"))
        return list(session.scalars(select(Item.name)))

    route(app, kind, "/", reader(), body)
    with serve(app) as served:
        answer = served.post("/")
        assert (answer.status_code, answer.json()) == (201, ["there"])


# -- SQLite ----------------------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    """Yield an engine with a pool of one, for a SQLite file with a table."""
    engine = create_engine(f"sqlite:///{tmp_path}/file.db", pool_size=1, max_overflow=0)
    Item.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
async def async_sqlite(sqlite: Engine) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(
        sqlite.url.set(drivername="sqlite+aiosqlite"), pool_size=1, max_overflow=0
    )
    yield engine
    await engine.dispose()


def add(session: Session) -> None:
    session.add(Item(name="a"))
    session.flush()


def swallow(session: Session) -> None:
    with pytest.raises(OperationalError, match="readonly"):
        add(session)
    session.rollback()


def fail(session: Session) -> None:
    session.scalars(select(Item)).all()
    raise ZeroDivisionError


def look(session: Session) -> None:
    session.scalars(select(Item)).all()


def roll_back(session: Session) -> None:
    look(session)
    session.rollback()
    look(session)
    session.commit()
    look(session)


ENDS: dict[str, tuple[Callable[[Session], None], type[Exception] | None]] = {
    "commit": (look, None),
    "explicit": (roll_back, None),
    "refused": (add, OperationalError),
    "swallowed": (swallow, None),
    "error": (fail, ZeroDivisionError),
}


@pytest.mark.parametrize(("body", "error"), ENDS.values(), ids=ENDS)
def test_sqlite_is_read_only_for_one_transaction(
    sqlite: Engine, body: Callable[[Session], None], error: type[Exception] | None
) -> None:
    """On SQLite, `query_only` rejects writes in one transaction and is reset however it ends."""
    database = Database(sqlite)

    def run() -> None:
        with database.transaction(read_only=True) as session:
            body(session)

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    with database.transaction() as session:
        assert session.scalar(text("PRAGMA query_only")) == 0
        add(session)


@pytest.mark.anyio
@pytest.mark.parametrize(("body", "error"), ENDS.values(), ids=ENDS)
async def test_async_sqlite_is_read_only_for_one_transaction(
    async_sqlite: AsyncEngine, body: Callable[[Session], None], error: type[Exception] | None
) -> None:
    """On aiosqlite, `query_only` rejects writes in one transaction and is reset however it ends."""
    database = AsyncDatabase(async_sqlite)

    async def run() -> None:
        async with database.transaction(read_only=True) as session:
            await session.run_sync(body)

    if error is None:
        await run()
    else:
        with pytest.raises(error):
            await run()
    async with database.transaction() as session:
        assert await session.scalar(text("PRAGMA query_only")) == 0
        await session.run_sync(add)


def test_a_reader_on_sqlite_refuses_to_write(sqlite: Engine) -> None:
    """On SQLite, too, a write in a reader raises ReadOnlySessionError and stores nothing."""
    app = make_app(sqlite)

    @app.get("/")
    def endpoint(session: Any = Depends(reader())) -> Any:
        session.add(Item(name="never"))

    @app.get("/names")
    def names(session: Any = Depends(reader())) -> Any:
        return list(session.scalars(select(Item.name)))

    with serve(app) as served:
        assert served.client.get("/").json()["error"] == "ReadOnlySessionError"
        assert served.client.get("/names").json() == []


def test_a_level_that_the_database_lacks_is_told(sqlite: Engine) -> None:
    """On SQLite, REPEATABLE READ raises an error that lists the levels, and takes no connection."""
    taken: list[object] = []
    event.listen(sqlite, "checkout", lambda *_: taken.append(1))
    with (
        pytest.raises(
            TransactionOptionsError,
            match=r"'default' \(sqlite\+pysqlite\) has no isolation level 'REPEATABLE READ': "
            "choose one of READ UNCOMMITTED, SERIALIZABLE",
        ),
        Database(sqlite).transaction(isolation_level="REPEATABLE READ"),
    ):
        pytest.fail("the block was entered")
    assert taken == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.driver == "asyncpg"])
def test_a_level_that_the_driver_lacks_is_told(kind: Kind, engine: Engine, rows: Rows) -> None:
    """On asyncpg, READ UNCOMMITTED fails the request with an error that lists the levels.

    The connection is not lost.
    """
    app = make_app(engine)
    route(app, kind, "/", transactional(isolation_level="READ UNCOMMITTED"), settings)
    route(app, kind, "/next", transactional(), settings)
    with serve(app) as served:
        answer = served.post("/").json()
        assert answer["error"] == "TransactionOptionsError"
        assert "choose one of READ COMMITTED, REPEATABLE READ, SERIALIZABLE" in answer["message"]
        assert served.post("/next").status_code == 201


def test_a_failing_pragma_leaks_nothing(sqlite: Engine) -> None:
    """If a transaction cannot be made read-only, its connection still returns to the pool."""

    def refuse(_connection: Any, _cursor: Any, statement: str, *_: object) -> None:
        if "query_only = ON" in statement:
            raise ZeroDivisionError

    event.listen(sqlite, "before_cursor_execute", refuse)
    with (
        pytest.raises(ZeroDivisionError),
        Database(sqlite).transaction(read_only=True) as session,
    ):
        look(session)
    assert sqlite.pool.checkedout() == 0  # type: ignore[attr-defined] # a QueuePool has it


def test_a_connection_without_its_options_is_not_used_again(sqlite: Engine) -> None:
    """A connection whose options could not be set is closed, because its state is unknown."""
    closed: list[object] = []

    def refuse(_connection: object, _options: object) -> None:
        raise ZeroDivisionError

    event.listen(sqlite, "set_connection_execution_options", refuse)
    event.listen(sqlite, "close", lambda connection, _record: closed.append(connection))
    with (
        pytest.raises(ZeroDivisionError),
        Database(sqlite).transaction(isolation_level="SERIALIZABLE") as session,
    ):
        look(session)
    assert len(closed) == 1
    assert sqlite.pool.checkedout() == 0  # type: ignore[attr-defined] # a QueuePool has it


# -- MariaDB, where the isolation level is sent before the first statement ---------------------


@pytest.mark.mariadb
@pytest.mark.parametrize("driver", ["pymysql", "asyncmy"])
@pytest.mark.parametrize(
    "dependency",
    [transactional(isolation_level="SERIALIZABLE"), reader()],
    ids=["serializable", "reader"],
)
def test_a_connection_that_died_in_mariadbs_pool_is_sqlalchemys_error(
    mariadb: str, dependency: Any, driver: str
) -> None:
    """A dead connection in the pool results in a 503, even if the level is sent to it first.

    It does not keep its place in the pool.
    """
    kind, app = Kind(driver, driver, driver == "asyncmy"), FastAPI()
    url = make_url(mariadb).set(drivername=f"mysql+{driver}")
    create: Any = create_async_engine if kind.asynchronous else create_engine
    engine = create(url, pool_size=1, max_overflow=0)
    install_database(app, engine=engine, shutdown=engine.dispose)
    install_error_handlers(app)
    route(app, kind, "/plain", get_db(), lambda s: s.scalar(text("SELECT connection_id()")))
    route(app, kind, "/", dependency, lambda s: s.execute(text("SELECT 1")).close())
    admin = create_engine(url.set(drivername="mysql+pymysql"))
    with serve(app) as served, admin.connect() as connection:
        connection.execute(text(f"KILL {served.post('/plain').json()}"))
        assert served.post("/").status_code == 503
        assert engine.pool.checkedout() == 0
        assert served.post("/").status_code == 201
    admin.dispose()
