"""Functions that provoke every kind of database failure on every driver, against real databases.

Everything that must not leak is called `canary`: tables, constraints, values, roles and passwords.
"""

import contextlib
import datetime
import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Engine,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    cast,
    create_engine,
    delete,
    event,
    insert,
    literal,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fastapi_sqlnative._sessions.engines import sync_engine
from tests.serving import wait_until

PASSWORD = "canary-password"


@dataclass(frozen=True)
class Driver:
    """A driver and its colour."""

    id: str
    dialect: str
    name: str
    asynchronous: bool


PSYCOPG_ASYNC = Driver("psycopg-async", "postgresql", "psycopg", True)
PSYCOPG = Driver("psycopg-sync", "postgresql", "psycopg", False)
PSYCOPG2 = Driver("psycopg2", "postgresql", "psycopg2", False)
ASYNCPG = Driver("asyncpg", "postgresql", "asyncpg", True)
SQLITE3 = Driver("sqlite3", "sqlite", "pysqlite", False)
AIOSQLITE = Driver("aiosqlite", "sqlite", "aiosqlite", True)
PYMYSQL = Driver("pymysql", "mysql", "pymysql", False)
ASYNCMY = Driver("asyncmy", "mysql", "asyncmy", True)
# One driver of each family runs every provocation. The others run only those whose outcome depends
# on the driver.
LEADERS = (PSYCOPG, ASYNCPG, SQLITE3, PYMYSQL)
FOLLOWERS = (PSYCOPG2, AIOSQLITE, ASYNCMY)
DRIVERS = (PSYCOPG_ASYNC, *LEADERS, *FOLLOWERS)


class Base(DeclarativeBase):
    metadata = MetaData()


class Versioned(Base):
    """A table whose rows SQLAlchemy versions."""

    __tablename__ = "canary_versioned"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - SQLAlchemy's API


versioned: Table = Base.metadata.tables["canary_versioned"]
parents = Table(
    "canary_parent", Base.metadata, Column("id", Integer, primary_key=True, autoincrement=False)
)
children = Table(
    "canary_child",
    Base.metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("parent_id", Integer),
    Column("name", String(20), nullable=False),
    Column("amount", Integer),
    UniqueConstraint("parent_id", "name", name="uq_canary_name"),
    ForeignKeyConstraint(["parent_id"], ["canary_parent.id"], name="fk_canary_parent"),
    CheckConstraint("amount >= 0", name="ck_canary_amount"),
)
late_children = Table(
    "canary_late_child",
    Base.metadata,
    Column("parent_id", Integer),
    ForeignKeyConstraint(
        ["parent_id"],
        ["canary_parent.id"],
        name="fk_canary_late",
        deferrable=True,
        initially="DEFERRED",
    ),
)
locked = Table("canary_locked", Base.metadata, Column("id", Integer, primary_key=True))
TABLES = (children, late_children, parents, versioned, locked)

POSTGRES_ONLY = """
CREATE TABLE canary_booking (
    span int4range, CONSTRAINT ex_canary_span EXCLUDE USING gist (span WITH &&)
);
CREATE TABLE canary_note (id int, text text UNIQUE);
ALTER TABLE canary_note ENABLE ROW LEVEL SECURITY;
CREATE POLICY canary_small ON canary_note USING (true) WITH CHECK (id < 10);
CREATE FUNCTION canary_adopt() RETURNS void LANGUAGE sql AS
    'INSERT INTO canary_child (id, parent_id, name) VALUES (2, 99, ''canary'')';
CREATE VIEW canary_adult AS SELECT * FROM canary_parent WHERE id > 10 WITH CHECK OPTION
"""


@dataclass(frozen=True)
class Server:
    """A database, with an engine that no test's application shares.

    Args:
        url: URL without a driver, with the role of an application.
        limited: the same, with a role that may not connect or a SQLite path that cannot be opened.
        outside: an administrator's engine.
    """

    dialect: str
    url: str
    limited: str
    outside: Engine

    def reset(self) -> None:
        """Replace all rows with the few that each test starts with."""
        with self.outside.begin() as connection:
            for table in self.tables:
                connection.execute(delete(table))
            connection.execute(insert(parents), [{"id": 1}, {"id": 2}])
            connection.execute(insert(children).values(CHILD))
            connection.execute(insert(versioned).values(id=1, name="canary", version=1))

    def create(self) -> None:
        """Drop the tables that an interrupted run left behind, and create all tables."""
        Base.metadata.drop_all(self.outside)
        Base.metadata.create_all(self.outside, self.tables)

    @property
    def tables(self) -> list[Table]:
        """List the tables that this database supports, children first."""
        cannot_defer = self.dialect == "mysql"
        return [table for table in TABLES if not (cannot_defer and table is late_children)]


CHILD = {"id": 1, "parent_id": 1, "name": "canary-value", "amount": 1}


def engine_for(driver: Driver, url: str, **options: Any) -> Engine | AsyncEngine:
    """Build an engine from a URL that names no driver."""
    full = make_url(url).set(drivername=f"{driver.dialect}+{driver.name}")
    engine = (create_async_engine if driver.asynchronous else create_engine)(full, **options)
    if driver.dialect == "sqlite":
        inner = sync_engine(engine)
        event.listen(inner, "connect", _enforce_foreign_keys)
    return engine


def _enforce_foreign_keys(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


# --- servers ------------------------------------------------------------------------------------


@contextlib.contextmanager
def canary_on_postgres(dsn: str) -> Generator[Server]:
    """Create the tables and roles in a PostgreSQL database, and remove the roles at the end."""
    url = make_url(dsn)
    role, limited = f"canary_{url.database}", f"canary_limited_{url.database}"
    outside = create_engine(
        url.set(drivername="postgresql+psycopg"),
        # A transaction that a test leaves open must not block the other tests.
        connect_args={"options": "-c lock_timeout=10s"},
    )
    with disposing(outside):
        server = Server("postgresql", _as(dsn, role), _as(dsn, limited), outside)
        with outside.begin() as connection:
            _drop_roles(connection, role, limited)
            connection.execute(text("DROP TABLE IF EXISTS canary_booking, canary_note CASCADE"))
            connection.execute(text("DROP FUNCTION IF EXISTS canary_adopt"))
            connection.execute(text("DROP VIEW IF EXISTS canary_adult"))
        server.create()
        with outside.begin() as connection:
            for statement in (
                POSTGRES_ONLY,
                f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'",
                f"CREATE ROLE {limited} LOGIN PASSWORD '{PASSWORD}' CONNECTION LIMIT 0",
                # The test's own transaction must be the one that detects a deadlock, and quickly.
                f"ALTER ROLE {role} SET deadlock_timeout = '20ms'",
                f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
                f"REVOKE ALL ON canary_locked FROM {role}",
            ):
                connection.execute(text(statement))
        yield server
        with outside.begin() as connection:
            _drop_roles(connection, role, limited)


def _drop_roles(connection: Connection, *roles: str) -> None:
    for role in roles:
        if connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}):
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))


@contextlib.contextmanager
def canary_on_mariadb(url: str, name: str) -> Generator[Server]:
    """Create a database, its tables and roles on a MariaDB server."""
    admin = make_url(url).set(drivername="mysql+pymysql")
    with disposing(create_engine(admin)) as engine, engine.begin() as connection:
        connection.execute(text(f"CREATE OR REPLACE DATABASE {name}"))
    outside = create_engine(admin.set(database=name))
    full = admin.set(database=name).render_as_string(hide_password=False)
    role, limited = name[:24], f"{name[:24]}_lim"
    with disposing(outside):
        server = Server("mysql", _as(full, role), _as(full, limited), outside)
        server.create()
        with outside.begin() as connection:
            for user, limit in (role, 0), (limited, 1):
                for statement in (
                    f"CREATE OR REPLACE USER {user}@'%' IDENTIFIED BY '{PASSWORD}'"
                    f" WITH MAX_CONNECTIONS_PER_HOUR {limit}",
                    f"GRANT SELECT ON {name}.* TO {user}@'%'",
                    *(
                        f"GRANT ALL ON {table.name} TO {user}@'%'"
                        for table in (parents, children, versioned)
                    ),
                ):
                    connection.execute(text(statement))
        spent = create_engine(make_url(server.limited).set(drivername="mysql+pymysql"))
        with disposing(spent), contextlib.suppress(SQLAlchemyError):
            spent.connect().close()  # the only connection that this role has per hour
        yield server


@contextlib.contextmanager
def canary_on_sqlite(path: str) -> Generator[Server]:
    """Create a SQLite file with the tables."""
    outside = create_engine(f"sqlite:///{path}")
    with disposing(outside):
        server = Server("sqlite", f"sqlite:///{path}", f"sqlite:///{path}-canary/none", outside)
        with outside.begin() as connection:
            connection.execute(text("PRAGMA journal_mode = WAL"))
        server.create()
        yield server


@contextlib.contextmanager
def disposing(engine: Engine) -> Generator[Engine]:
    """Close an engine's connections at the end of a block."""
    try:
        yield engine
    finally:
        engine.dispose()


def _as(url: str, user: str) -> str:
    named = make_url(url).set(username=user, password=PASSWORD)
    return named.render_as_string(hide_password=False)


# --- constraints --------------------------------------------------------------------------------

Provocation = Callable[[Session, Server], None]


def unique(session: Session, _server: Server) -> None:
    session.execute(insert(children).values(CHILD | {"id": 2}))


def primary_key(session: Session, _server: Server) -> None:
    session.execute(insert(children).values(CHILD | {"parent_id": 2}))


def exclusion(session: Session, _server: Server) -> None:
    for _ in range(2):
        session.execute(text("INSERT INTO canary_booking VALUES ('[1,5)')"))


def missing_parent(session: Session, _server: Server) -> None:
    session.execute(insert(children).values(CHILD | {"id": 2, "parent_id": 99}))


def missing_parent_by_update(session: Session, _server: Server) -> None:
    session.execute(update(children).values(parent_id=99))


def still_referenced(session: Session, _server: Server) -> None:
    session.execute(delete(parents))


def still_referenced_by_update(session: Session, _server: Server) -> None:
    session.execute(update(parents).where(parents.c.id == 1).values(id=3))


def missing_parent_behind_a_cte(session: Session, _server: Server) -> None:
    """Violate a foreign key in an INSERT that follows a comment and a CTE."""
    session.execute(
        text(
            "/* DELETE */ WITH canary AS (DELETE FROM canary_late_child RETURNING parent_id)"
            " INSERT INTO canary_child (id, parent_id, name) VALUES (2, 99, 'canary')"
        )
    )


def missing_parent_behind_a_comment(session: Session, _server: Server) -> None:
    session.execute(
        text(
            "/* DELETE */ WITH canary AS (SELECT 99 AS id) -- DELETE\n"
            "INSERT INTO canary_child (id, parent_id, name) SELECT 2, id, 'canary' FROM canary"
        )
    )


def missing_parent_in_a_function(session: Session, _server: Server) -> None:
    session.execute(text("SELECT canary_adopt()"))


def still_referenced_by_a_merge(session: Session, _server: Server) -> None:
    session.execute(
        text(
            "MERGE INTO canary_parent USING (SELECT 1 AS id) AS gone"
            " ON gone.id = canary_parent.id WHEN MATCHED THEN DELETE"
        )
    )


def late_foreign_key(session: Session, _server: Server) -> None:
    session.execute(insert(late_children).values(parent_id=99))
    session.commit()


def not_null(session: Session, _server: Server) -> None:
    session.execute(insert(children).values(CHILD | {"id": 2, "name": None}))


def no_default(session: Session, _server: Server) -> None:
    session.execute(text("INSERT INTO canary_child (id) VALUES (2)"))


def check(session: Session, _server: Server) -> None:
    session.execute(insert(children).values(CHILD | {"id": 2, "name": "canary-2", "amount": -1}))


def stale(session: Session, server: Server) -> None:
    if server.dialect == "mysql":  # else MariaDB 11.8 refuses the update, as in `serialization`
        session.execute(text("SET innodb_snapshot_isolation = OFF"))
    row = session.get_one(Versioned, 1)
    with server.outside.begin() as connection:
        connection.execute(update(versioned).values(version=7))
    row.name = "canary-2"
    session.flush()


# --- values -------------------------------------------------------------------------------------


def too_long(session: Session, _server: Server) -> None:
    session.execute(insert(children).values(CHILD | {"id": 2, "name": "canary" * 10}))


def out_of_range(session: Session, _server: Server) -> None:
    session.execute(insert(children).values(CHILD | {"id": 2, "amount": 2**31}))


def malformed(session: Session, _server: Server) -> None:
    statements = {
        "postgresql": "SELECT CAST(CAST(:value AS text) AS integer)",
        "mysql": "INSERT INTO canary_parent VALUES (:value)",
        "sqlite": "INSERT INTO canary_parent VALUES (:value)",
    }
    session.execute(text(statements[session.get_bind().dialect.name]), {"value": "canary"})


def malformed_in_the_statement(session: Session, _server: Server) -> None:
    session.execute(text("SELECT CAST(CAST('canary' AS text) AS integer)"))


def no_such_date(session: Session, _server: Server) -> None:
    query = text("SELECT CAST(CAST(:value AS text) AS date)")
    session.execute(query, {"value": "2024-13-45"})


def nul_character(session: Session, _server: Server) -> None:
    session.execute(insert(children).values(CHILD | {"id": 2, "name": "canary\0"}))


def bad_pattern(session: Session, _server: Server) -> None:
    operator = "~" if session.get_bind().dialect.name == "postgresql" else "REGEXP"
    session.execute(text(f"SELECT 'canary' {operator} :pattern"), {"pattern": "["}).all()


def bad_escape(session: Session, _server: Server) -> None:
    session.execute(
        text("SELECT 'canary' LIKE CAST(:pattern AS text)"), {"pattern": "canar\\"}
    ).all()


def negative_limit(session: Session, _server: Server) -> None:
    session.execute(select(parents).limit(-1)).all()


def no_such_zone(session: Session, _server: Server) -> None:
    session.execute(text("SELECT now() AT TIME ZONE CAST(:zone AS text)"), {"zone": "canary"}).all()


def lost_beyond(session: Session, _server: Server) -> None:
    """Fail like a foreign table whose own server is unavailable."""
    session.execute(text("DO $$BEGIN RAISE EXCEPTION 'canary' USING ERRCODE = '08006'; END$$"))


def bad_setting(session: Session, _server: Server) -> None:
    session.execute(text("SET LOCAL statement_timeout = 'canary'"))


def too_long_for_an_index(session: Session, server: Server) -> None:
    noise = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=9000))
    session.execute(text("INSERT INTO canary_note VALUES (1, :noise)"), {"noise": noise})


def refused_by_a_view(session: Session, _server: Server) -> None:
    session.execute(text("INSERT INTO canary_adult VALUES (5)"))


def infinity(session: Session, _server: Server) -> None:
    value = {"value": float("inf")}
    session.execute(text("SELECT CAST(:value AS DECIMAL)"), value).all()


def wrong_type(session: Session, _server: Server) -> None:
    """Bind a value of a wrong type, a bug in the service that only asyncpg rejects itself."""
    moment = datetime.datetime.now(datetime.UTC)
    session.execute(select(cast(literal(moment, DateTime()), DateTime()))).all()


def str_for_int(session: Session, _server: Server) -> None:
    session.execute(select(literal("117", Integer()) + 1)).all()


def too_many_parameters(session: Session, _server: Server) -> None:
    session.execute(select(parents).where(parents.c.id.in_(range(70_000)))).all()


def lone_surrogate(session: Session, _server: Server) -> None:
    session.execute(select(literal("canary\ud800"))).all()


def beyond_64_bits(session: Session, _server: Server) -> None:
    session.execute(text("SELECT :number + 1"), {"number": 2**70}).all()


def beyond_python(session: Session, _server: Server) -> None:
    session.execute(text("SELECT CAST('infinity' AS date)")).all()


def not_strictly_typed(session: Session, _server: Server) -> None:
    session.execute(text("CREATE TEMP TABLE canary_strict (id INTEGER, n INT) STRICT"))
    session.execute(text("INSERT INTO canary_strict VALUES (1, :n)"), {"n": "canary"})


# --- other transactions -------------------------------------------------------------------------


def change(connection: Connection, name: str = "canary-2") -> None:
    connection.execute(update(children).where(children.c.id == 1).values(name=name))


def serialization(session: Session, server: Server) -> None:
    dialect = server.dialect
    if dialect == "mysql":
        session.execute(text("SET innodb_snapshot_isolation = ON"))
    begin = {
        "postgresql": "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "mysql": "START TRANSACTION WITH CONSISTENT SNAPSHOT",
        "sqlite": "BEGIN",
    }
    session.execute(text(begin[dialect]))
    session.execute(select(children)).all()
    with server.outside.begin() as connection:
        change(connection)
    session.execute(update(children).values(amount=5))


@contextlib.contextmanager
def in_a_thread(run: Callable[[], object]) -> Generator[None]:
    """Run a function in a thread during the block, and wait for it at the end.

    SQLAlchemy's errors in the thread are ignored, because the block provokes the one that counts.
    """

    def attempt() -> None:
        with contextlib.suppress(SQLAlchemyError):
            run()

    thread = threading.Thread(target=attempt)
    thread.start()
    try:
        yield
    finally:
        thread.join(40)
        assert not thread.is_alive()


WAITING = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = :pid",
    "mysql": "SELECT count(*) FROM information_schema.innodb_trx"
    " WHERE trx_state = 'LOCK WAIT' AND trx_mysql_thread_id = :pid",
}
PROCESS = {"postgresql": "SELECT pg_backend_pid()", "mysql": "SELECT connection_id()"}


def deadlock(session: Session, server: Server) -> None:
    """Provoke a deadlock whose victim is this session: it waits last and has changed the least."""
    with server.outside.connect() as other, server.outside.connect() as watching:
        pid = other.scalar(text(PROCESS[server.dialect]))
        if server.dialect == "postgresql":
            other.execute(text("SET LOCAL deadlock_timeout = '20s'"))
        else:
            other.execute(insert(locked), [{"id": number} for number in range(1, 100)])
        change(other)
        session.execute(update(parents).where(parents.c.id == 2).values(id=20))
        with in_a_thread(lambda: other.execute(delete(parents).where(parents.c.id == 2))):

            def waits() -> bool:
                # InnoDB shows the same snapshot throughout a transaction, and for 0.1 s after
                # any connection has read it. Other tests may read it, too.
                watching.rollback()
                time.sleep(random.uniform(0.11, 0.5) * (server.dialect == "mysql"))
                return bool(watching.scalar(text(WAITING[server.dialect]), {"pid": pid}))

            wait_until(waits)
            session.execute(update(children).where(children.c.id == 1).values(amount=5))


def lock_not_available(session: Session, server: Server) -> None:
    with server.outside.connect() as other:
        if server.dialect == "sqlite":
            session.execute(text("PRAGMA busy_timeout = 0"))
            other.exec_driver_sql("BEGIN IMMEDIATE")
            change_here = update(children).values(amount=5)
            session.execute(change_here)
        change(other)
        session.execute(select(children).with_for_update(nowait=True))


# --- the server and the connection to it --------------------------------------------------------


def on_driver(session: Session, run: Callable[[Any], object]) -> None:
    """Call `run` with the driver's own connection, whose methods are coroutines on aiosqlite."""
    connection: Any = session.connection().connection.dbapi_connection
    if hasattr(connection, "run_async"):
        connection.run_async(run)
    else:
        run(connection)


def statement_timeout(session: Session, server: Server) -> None:
    if server.dialect == "sqlite":
        on_driver(session, lambda connection: connection.set_progress_handler(lambda: 1, 1))
        session.execute(select(children)).all()
    elif server.dialect == "mysql":
        session.execute(text("SET STATEMENT max_statement_time = 0.01 FOR SELECT SLEEP(5)"))
    else:
        session.execute(text("SET LOCAL statement_timeout = 10"))
        session.execute(text("SELECT pg_sleep(5)"))


def cancelled(session: Session, server: Server) -> None:
    pid = session.scalar(text(PROCESS[server.dialect]))
    kill, sleep = {
        "postgresql": (f"SELECT pg_cancel_backend({pid})", "SELECT pg_sleep(5)"),
        "mysql": (f"KILL QUERY {pid}", "SELECT SLEEP(5) FROM canary_parent"),
    }[server.dialect]

    over = threading.Event()

    def kill_until_over() -> None:
        while not over.wait(0.02):
            with server.outside.connect() as connection:
                connection.execute(text(kill))

    with in_a_thread(kill_until_over):
        try:
            session.execute(text(sleep)).all()
        finally:
            over.set()


def lost(session: Session, server: Server) -> None:
    pid = session.scalar(text(PROCESS[server.dialect]))
    kill = {"postgresql": f"SELECT pg_terminate_backend({pid}, 5000)", "mysql": f"KILL {pid}"}
    with server.outside.connect() as connection:
        connection.execute(text(kill[server.dialect]))
    session.execute(select(parents)).all()


def pool_timeout(session: Session, _server: Server) -> None:
    session.execute(select(parents)).all()
    engine = session.get_bind()
    assert isinstance(engine, Engine)
    engine.connect()  # the pool has only one connection


def connect(session: Session, _server: Server) -> None:
    session.execute(select(parents)).all()


def read_only(session: Session, server: Server) -> None:
    begin = {
        "postgresql": "SET TRANSACTION READ ONLY",
        "mysql": "START TRANSACTION READ ONLY",
        "sqlite": "PRAGMA query_only = ON",
    }
    session.execute(text(begin[server.dialect]))
    unique(session, server)


def row_security(session: Session, _server: Server) -> None:
    session.execute(text("INSERT INTO canary_note VALUES (11, 'canary')"))


def permission_denied(session: Session, server: Server) -> None:
    if server.dialect == "sqlite":
        on_driver(session, lambda connection: connection.set_authorizer(lambda *_: 1))
    session.execute(insert(locked).values(id=1))


# --- sessions and bugs --------------------------------------------------------------------------


def aborted_on_the_server(session: Session, server: Server) -> None:
    with contextlib.suppress(SQLAlchemyError):
        unique(session, server)
    session.execute(select(parents)).all()


def aborted_in_the_session(session: Session, _server: Server) -> None:
    for _ in range(2):
        with contextlib.suppress(SQLAlchemyError):
            session.add(Versioned(id=1, name="canary"))
            session.flush()
    session.execute(select(parents)).all()


def no_such_table(session: Session, _server: Server) -> None:
    session.execute(text("SELECT canary FROM canary_nowhere"))


def division_by_zero(session: Session, server: Server) -> None:
    divide = {"postgresql": "SELECT 1/0", "mysql": "INSERT INTO canary_parent VALUES (1/0)"}
    session.execute(text(divide[server.dialect]))


# --- drivers that are not installed here --------------------------------------------------------


def of_driver(module: str, *args: object, name: str = "Error", **stated: object) -> Exception:
    """Make an error like the driver's, with these `args` and the other values as attributes."""
    base = type("Error", (Exception,), {"__module__": module})
    error: Exception = type(name, (base,), {"__module__": module})(*args)
    error.__dict__.update(stated)
    return error
