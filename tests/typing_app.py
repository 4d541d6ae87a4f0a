# pyright: strict
"""A user's application in which type checkers must find no error."""

from collections.abc import AsyncGenerator, Generator
from typing import Annotated, assert_type

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    PoolStatus,
    get_database_handle,
    get_db,
    install_database,
    installed_databases,
    reader,
    transactional,
)
from fastapi_sqlnative.exceptions import PartialCommitError, UncommittedChangesError

Db = Annotated[AsyncSession, Depends(get_db("analytics"))]
Transaction = Annotated[AsyncSession, Depends(transactional("analytics"))]
Strict = Depends(transactional("analytics", isolation_level="SERIALIZABLE", read_only=True))
Reads = Annotated[AsyncSession, Depends(reader("analytics"))]
Handle = Annotated[AsyncDatabase, Depends(get_database_handle("analytics"))]
SyncDb = Annotated[Session, Depends(get_db())]
SyncTransaction = Annotated[Session, Depends(transactional())]
SyncHandle = Annotated[Database, Depends(get_database_handle())]


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Accounts:
    def __init__(self, session: Db) -> None:
        self.session = session

    async def add(self, name: str) -> Account:
        account = Account(name=name)
        self.session.add(account)
        await self.session.flush()
        return account


async def make_engine() -> AsyncEngine:
    return create_async_engine("postgresql+psycopg://")


def create_app() -> FastAPI:
    app = FastAPI(dependencies=[Strict])
    engine = create_async_engine("postgresql+psycopg://", isolation_level="REPEATABLE READ")
    install_database(app, name="analytics", engine=engine, shutdown=engine.dispose)
    sync_engine = create_engine("postgresql+psycopg://")
    install_database(
        app,
        engine=sync_engine,
        shutdown=sync_engine.dispose,
        session_options={"class_": Session, "autoflush": False},
        startup_wait=30,
        shutdown_timeout=5,
    )
    install_database(app, name="made", engine=make_engine)
    install_database(app, name="made here", engine=lambda: create_engine("sqlite://"))

    @app.post("/accounts")
    async def create(accounts: Annotated[Accounts, Depends()], session: Transaction) -> int:
        account = await accounts.add("Ada")
        await session.refresh(account)
        return account.id

    @app.get("/accounts")
    async def names(session: Reads) -> list[str]:
        return list(await session.scalars(select(Account.name)))

    @app.get("/export")
    async def export(database: Handle) -> StreamingResponse:
        return StreamingResponse(rows(database))

    @app.post("/sync")
    def sync(session: SyncTransaction, other: SyncDb, database: SyncHandle) -> int:
        session.add(Account(name="Ada"))
        return len(other.scalars(select(Account)).all()) + len(list(sync_rows(database)))

    app.dependency_overrides[get_db("analytics")] = lambda: None
    return app


async def rows(database: AsyncDatabase) -> AsyncGenerator[str]:
    async with database.session() as session:
        assert_type(session, AsyncSession)
        async for name in await session.stream_scalars(select(Account.name)):
            yield name


def sync_rows(database: Database) -> Generator[str]:
    with database.session() as session:
        assert_type(session, Session)
        yield from session.scalars(select(Account.name))


async def work(app: FastAPI) -> None:
    database = installed_databases(app)["analytics"]
    if isinstance(database, AsyncDatabase):
        async with database.transaction(isolation_level="SERIALIZABLE") as session:
            assert_type(session, AsyncSession)
            session.add(Account(name="Ada"))
        await database.ping(timeout=1)
        assert_type(database.engine, AsyncEngine)
    else:
        assert_type(database.engine, Engine)
        database.ping()


def script() -> None:
    database = Database(create_engine("sqlite://"), name="script", session_options={"info": {}})
    assert_type(database.name, str)
    try:
        with database.transaction(read_only=True) as session:
            assert_type(session, Session)
            session.execute(select(Account))
    except PartialCommitError as error:
        assert_type(error.committed, tuple[str, ...])
    except UncommittedChangesError:
        pass
    status = database.pool_status()
    assert_type(status, PoolStatus)
    assert_type(status.checked_out, int | None)
