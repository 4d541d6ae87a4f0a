"""docs/troubleshooting.md: every error has an entry, and every quoted text is really raised."""

import ast
import asyncio
import gc
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict
from sqlalchemy import DateTime, ForeignKey, Integer, bindparam, create_engine, insert, select, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.pool import StaticPool

import fastapi_sqlnative
from conftest import WorkerPostgres
from fastapi_sqlnative import AsyncDatabase, exceptions, get_db

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
PACKAGE = Path(fastapi_sqlnative.__file__).parent
STRINGS = ast.JoinedStr, ast.Constant
ENTRY = re.compile(r"^### (?P<title>.+)$|^> (?P<text>.+)$", re.MULTILINE)


def entries(section: str) -> dict[str, list[str]]:
    """Return the texts that a section quotes, by heading."""
    _, _, rest = PAGE.read_text("utf-8").partition(f"\n## {section}\n")
    found: dict[str, list[str]] = {}
    texts: list[str] = []
    for each in ENTRY.finditer(rest.partition("\n## ")[0]):
        if each["title"]:
            texts = found[each["title"]] = []
        else:
            texts.append(each["text"])
    return found


OURS = entries("Errors of this package")
OTHERS = {
    title: text
    for section in ("FastAPI", "SQLAlchemy", "drivers and servers")
    for title, (text,) in entries(f"Errors of {section}").items()
}


def pattern(quoted: str) -> re.Pattern[str]:
    """Return a pattern for a quoted text, in which three dots match anything."""
    return re.compile(".+?".join(map(re.escape, quoted.split("..."))), re.DOTALL | re.IGNORECASE)


# --- errors of the package ----------------------------------------------------------------------


def plain(node: ast.expr) -> str:
    """Return the text of a string in the source, with three dots for each inserted value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(plain, node.values))
    return "..."


def nodes_of_the_package() -> list[ast.AST]:
    trees = (ast.parse(path.read_text("utf-8")) for path in PACKAGE.glob("**/*.py"))
    return [node for tree in trees for node in ast.walk(tree)]


def texts_of_the_package() -> list[str]:
    return [plain(node) for node in nodes_of_the_package() if isinstance(node, STRINGS)]


def messages_of_the_package() -> list[str]:
    """List the messages of the package's errors, from their calls and from tables by class."""
    given: list[tuple[ast.expr | None, ast.expr]] = []
    for node in nodes_of_the_package():
        if isinstance(node, ast.Call) and node.args:
            given.append((node.func, node.args[0]))
        elif isinstance(node, ast.Dict):
            given += zip(node.keys, node.values, strict=True)
    return [
        plain(text)
        for made, text in given
        if made and isinstance(text, STRINGS)
        if ast.unparse(made).split(".")[-1] in exceptions.__all__
    ]


def test_every_error_of_ours_has_an_entry() -> None:
    """Every exception of the package, and TimeoutError, has an entry under its name."""
    assert set(OURS) == {*exceptions.__all__, "TimeoutError"}


def test_every_message_of_ours_is_quoted() -> None:
    """Every error message of the package is quoted on the page."""
    quoted = [pattern(text) for texts in OURS.values() for text in texts]
    messages = messages_of_the_package()
    assert len(messages) > 30
    assert [each for each in messages if not any(text.search(each) for text in quoted)] == []


def test_our_texts_are_quoted_as_they_are() -> None:
    """Every text that the page quotes from the package occurs in its source."""
    package = [text.lower() for text in texts_of_the_package()]

    def occurs(quoted: str) -> bool:
        part = max(quoted.lower().split("..."), key=len)  # found much faster than a pattern
        return any(pattern(quoted).search(each) for each in package if part in each)

    assert [text for texts in OURS.values() for text in texts if not occurs(text)] == []


# --- errors of FastAPI, SQLAlchemy, drivers and servers -----------------------------------------


class Base(DeclarativeBase): ...


class Shelf(Base):
    __tablename__ = "shelf"

    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list["Volume"]] = relationship()


class Volume(Base):
    __tablename__ = "volume"

    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(ForeignKey(Shelf.id))


class Shown(BaseModel):
    """A response model that reads a relationship."""

    model_config = ConfigDict(from_attributes=True)
    books: list[int]


Raise = Callable[[str, str], Any]
RAISING: dict[str, Raise] = {}


def raising(title: str) -> Callable[[Raise], Raise]:
    """Register a function that raises an entry's error, given URLs of PostgreSQL and of SQLite."""

    def note(function: Raise) -> Raise:
        RAISING[title] = function
        return function

    return note


def on_async(url: str, work: Callable[[AsyncEngine], Awaitable[Any]]) -> None:
    async def run() -> None:
        engine = create_async_engine(url)
        try:
            await work(engine)
        finally:
            await engine.dispose()

    asyncio.run(run())


def on_shelf(sqlite: str, work: Callable[[AsyncSession, Shelf], Awaitable[Any]]) -> None:
    """Run work with an object whose relationship is not loaded."""

    async def run(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            session.add(Shelf(id=1))
            await session.commit()
        async with AsyncSession(engine) as session:
            await work(session, await session.get_one(Shelf, 1))

    on_async(sqlite, run)


@raising("Invalid args for response field")
def _(postgres: str, sqlite: str) -> None:
    @FastAPI().get("/")
    async def endpoint(session: AsyncSession) -> None: ...


@raising("A dependency used as a session")
def _(postgres: str, sqlite: str) -> None:
    session: Any = get_db()
    session.scalar(select(Shelf))


@raising("ResponseValidationError with MissingGreenlet")
def _(postgres: str, sqlite: str) -> None:
    async def work(session: AsyncSession, shelf: Shelf) -> None:
        app = FastAPI()

        @app.get("/", response_model=Shown)
        async def endpoint() -> Shelf:
            return shelf

        await asyncio.to_thread(TestClient(app).get, "/")

    on_shelf(sqlite, work)


@raising("DependencyScopeError")
def _(postgres: str, sqlite: str) -> None:
    async def inner() -> AsyncGenerator[None]:
        yield

    async def outer(_: Annotated[None, Depends(inner, scope="function")]) -> AsyncGenerator[None]:
        yield

    @FastAPI().get("/")
    async def endpoint(_: Annotated[None, Depends(outer)]) -> None: ...


@raising("MissingGreenlet")
def _(postgres: str, sqlite: str) -> None:
    async def work(session: AsyncSession, shelf: Shelf) -> None:
        print(shelf.books)

    on_shelf(sqlite, work)


@raising("DetachedInstanceError")
def _(postgres: str, sqlite: str) -> None:
    async def work(session: AsyncSession, shelf: Shelf) -> None:
        await session.close()
        print(shelf.books)

    on_shelf(sqlite, work)


@raising("QueuePool limit")
def _(postgres: str, sqlite: str) -> None:
    engine = create_engine(postgres, pool_size=1, max_overflow=0, pool_timeout=0.01)
    try:
        with engine.connect(), engine.connect():
            pass
    finally:
        engine.dispose()


def with_a_session(url: str, work: Callable[[Session], Any]) -> None:
    engine = create_engine(url, poolclass=StaticPool)
    Base.metadata.create_all(engine)
    try:
        with Session(engine) as session:
            work(session)
    finally:
        engine.dispose()


@raising("A result read too late")
def _(postgres: str, sqlite: str) -> None:
    def work(session: Session) -> None:
        session.add(Shelf())
        session.commit()
        session.expunge_all()
        found = session.scalars(select(Shelf))
        session.close()
        found.all()

    with_a_session("sqlite://", work)


@raising("PendingRollbackError")
def _(postgres: str, sqlite: str) -> None:
    def work(session: Session) -> None:
        with suppress(IntegrityError):
            session.add_all([Shelf(id=1), Volume(id=1)])
            session.flush()
        session.scalars(select(Shelf)).all()

    with_a_session("sqlite://", work)


@raising("Concurrent operations")
def _(postgres: str, sqlite: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            found = await asyncio.gather(
                *(session.execute(text("SELECT 1")) for _ in range(2)), return_exceptions=True
            )
        raise next(each for each in found if isinstance(each, SQLAlchemyError))

    on_async(postgres, work)


@raising("The loaded driver is not async")
def _(postgres: str, sqlite: str) -> None:
    create_async_engine("postgresql+psycopg2://")


@raising("A coroutine that was not awaited")
def _(postgres: str, sqlite: str) -> None:
    async def work(session: AsyncSession, shelf: Shelf) -> None:
        sending: Any = session.execute(select(Shelf))
        try:
            sending.scalars()
        finally:
            sending.close()

    on_shelf(sqlite, work)


@raising("`with` and `async with`")
def _(postgres: str, sqlite: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        opening: Any = AsyncDatabase(engine).session()
        with opening:
            pass

    on_async(sqlite, work)


@raising("Textual SQL")
def _(postgres: str, sqlite: str) -> None:
    statement: Any = "SELECT 1"
    with_a_session("sqlite://", lambda session: session.execute(statement))


@raising("Already attached")
def _(postgres: str, sqlite: str) -> None:
    def work(session: Session) -> None:
        session.add(shelf := Shelf(id=1))
        Session(session.get_bind()).add(shelf)

    with_a_session("sqlite://", work)


@raising("A transaction is already begun")
def _(postgres: str, sqlite: str) -> None:
    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))
        session.begin()

    with_a_session("sqlite://", work)


@raising("Closed transaction inside context manager")
def _(postgres: str, sqlite: str) -> None:
    def work(session: Session) -> None:
        with session.begin_nested():
            session.rollback()
            session.execute(text("SELECT 1"))

    with_a_session("sqlite://", work)


@raising("Not persisted")
def _(postgres: str, sqlite: str) -> None:
    def work(session: Session) -> None:
        session.add(shelf := Shelf(id=1))
        session.delete(shelf)

    with_a_session("sqlite://", work)


@raising("Unconsumed column names")
def _(postgres: str, sqlite: str) -> None:
    with_a_session("sqlite://", lambda session: session.execute(insert(Shelf).values(titel=1)))


@raising("Attached to a different loop")
def _(postgres: str, sqlite: str) -> None:
    engine = create_async_engine(postgres.replace("psycopg", "asyncpg"), pool_pre_ping=True)
    opening = asyncio.new_event_loop()

    async def ask() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    opening.run_until_complete(ask())
    try:
        asyncio.run(ask())
    finally:
        opening.run_until_complete(engine.dispose())
        opening.close()


@raising("Another operation is in progress")
def _(postgres: str, sqlite: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await asyncio.gather(*(driver.fetch("SELECT 1") for _ in range(2)))

    on_async(postgres.replace("psycopg", "asyncpg"), work)


def on_postgres(url: str, *statements: str) -> None:
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            for statement in statements[:-1]:
                with suppress(SQLAlchemyError):
                    connection.execute(text(statement))
            connection.execute(text(statements[-1]))
    finally:
        engine.dispose()


@raising("Current transaction is aborted")
def _(postgres: str, sqlite: str) -> None:
    on_postgres(postgres, "SELECT nothing", "SELECT 1")


@raising("No such table on SQLite in memory")
def _(postgres: str, sqlite: str) -> None:
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    raised: list[Exception] = []

    def ask() -> None:
        try:
            with engine.connect() as connection:
                connection.execute(select(Shelf))
        except SQLAlchemyError as error:
            raised.append(error)
        finally:
            engine.dispose()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    engine.dispose()
    raise raised[0]


@raising("Database is locked")
def _(postgres: str, sqlite: str) -> None:
    url = sqlite.replace("+aiosqlite", "")
    engine = create_engine(url, connect_args={"timeout": 0})
    try:
        with engine.connect() as first, engine.connect() as second:
            first.execute(text("BEGIN IMMEDIATE"))
            second.execute(text("BEGIN IMMEDIATE"))
    finally:
        engine.dispose()


@raising("Duplicate key")
def _(postgres: str, sqlite: str) -> None:
    on_postgres(
        postgres,
        "CREATE TEMP TABLE taken (id int PRIMARY KEY)",
        "INSERT INTO taken VALUES (1), (1)",
    )


@raising("Invalid input for query argument")
def _(postgres: str, sqlite: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(select(bindparam("id", "seven", Integer)))

    on_async(postgres.replace("psycopg", "asyncpg"), work)


@raising("Naive and aware datetimes")
def _(postgres: str, sqlite: str) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(select(bindparam("at", datetime.now(UTC), DateTime())))

    on_async(postgres.replace("psycopg", "asyncpg"), work)


@raising("Connection refused")
def _(postgres: str, sqlite: str) -> None:
    on_postgres("postgresql+psycopg://127.0.0.1:1/none", "SELECT 1")


@raising("Statement timeout")
def _(postgres: str, sqlite: str) -> None:
    on_postgres(postgres, "SET LOCAL statement_timeout = 1", "SELECT pg_sleep(5)")


@raising("Terminated connection")
def _(postgres: str, sqlite: str) -> None:
    on_postgres(postgres, "SELECT pg_terminate_backend(pg_backend_pid())")


# A coroutine that SQLAlchemy starts without a greenlet is never awaited, which causes a warning
# when it is collected.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collecting")
@pytest.mark.parametrize("title", OTHERS)
def test_texts_of_others_are_quoted_as_they_are(
    title: str, postgres: WorkerPostgres, tmp_path: Path
) -> None:
    """Every other library's error on the page is raised by its cause, with the quoted text."""
    sqlite = f"sqlite+aiosqlite:///{tmp_path}/shelf.db"
    with pytest.raises(Exception, match=pattern(OTHERS[title])):  # of any class
        RAISING[title](postgres.url("psycopg"), sqlite)
    gc.collect()
