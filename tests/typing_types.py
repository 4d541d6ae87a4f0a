# pyright: strict
"""The type of each public name, asserted with `assert_type`: type checkers must find no error."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, assert_type

from fastapi import APIRouter, FastAPI, HTTPException
from sqlalchemy import Engine, create_engine, literal, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    DatabaseErrorDescription,
    DatabaseErrorKind,
    PoolStatus,
    describe_database_error,
    error_responses,
    get_database_handle,
    get_db,
    health_router,
    http_errors,
    installed_databases,
    map_database_error,
    reader,
    transactional,
)
from fastapi_sqlnative.checklist import Finding, FindingStatus, check_databases
from fastapi_sqlnative.exceptions import CommitOutcomeUnknownError, PartialCommitError


def dependencies() -> None:
    """Assert that a dependency returns a session of either colour, which an annotation narrows."""
    for dependency in get_db(), transactional("a", read_only=True), reader("a"):
        assert_type(dependency, Callable[..., Awaitable[AsyncSession | Session]])
    handle = get_database_handle("a")
    assert_type(handle, Callable[..., Awaitable[Database | AsyncDatabase]])


def handles(app: FastAPI) -> None:
    """Assert the types of a handle's attributes, and of handles that are looked up by name."""
    either = installed_databases(app)
    assert_type(either, Mapping[str, Database | AsyncDatabase])
    assert_type(installed_databases(app, AsyncDatabase)["a"], AsyncDatabase)
    database = installed_databases(app, Database)["a"]
    assert_type(database, Database)
    assert_type(database.engine, Engine)
    assert_type(database.name, str)
    assert_type(database.pool_status(), PoolStatus)
    assert_type(AsyncDatabase(create_async_engine("sqlite+aiosqlite://")).engine, AsyncEngine)
    assert_type(Database(create_engine("sqlite://")).ping(), None)


def count(session: Session) -> int:
    """Count rows, as the work of a transaction that may run again."""
    assert_type(session, Session)
    return session.scalars(select(literal(1))).one()


async def count_later(session: AsyncSession) -> int:
    """Count rows with an AsyncSession, as work that may run again."""
    return (await session.scalars(select(literal(1)))).one()


async def transactions(sync: Database, database: AsyncDatabase) -> None:
    """Assert that sessions have the handle's colour, and that the work's result is returned."""
    with sync.session() as reading, sync.transaction(isolation_level="SERIALIZABLE") as writing:
        assert_type(reading, Session)
        assert_type(writing, Session)
    async with database.session() as session, database.transaction(read_only=True) as other:
        assert_type(session, AsyncSession)
        assert_type(other, AsyncSession)
    assert_type(sync.run_in_transaction(count, attempts=5), int)
    assert_type(await database.run_in_transaction(count_later), int)


async def failures(session: AsyncSession, sync: Session, error: Exception) -> None:
    """Assert that a failure has a description or None, and assert the type of a mapped error."""
    found = describe_database_error(error)
    assert_type(found, DatabaseErrorDescription | None)
    if found is not None:
        assert_type(found.kind, DatabaseErrorKind)
        assert_type(found.retryable, bool)
    with http_errors():
        sync.execute(text("SELECT 1"))
    async with http_errors(session):
        await session.flush()
    mapped = map_database_error(error)
    if isinstance(mapped, HTTPException):
        assert_type(mapped.status_code, int)
    responses: dict[int | str, dict[str, Any]] = error_responses()
    assert responses
    if isinstance(error, PartialCommitError):
        assert_type(error.committed, tuple[str, ...])
    elif isinstance(error, CommitOutcomeUnknownError | DBAPIError):
        assert error.__cause__


async def operation(app: FastAPI) -> None:
    """Assert the types of what monitors an application in production."""
    assert_type(health_router(databases={"default": "writable"}), APIRouter)
    findings = await check_databases(app, processes=8)
    assert_type(findings, list[Finding])
    assert_type([each.status for each in findings], list[FindingStatus])
