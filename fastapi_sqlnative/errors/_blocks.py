"""Where a failure crosses into the application's meaning: `http_errors`, `map_database_error`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Unpack, cast, overload

from fastapi import HTTPException
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ._rules import ErrorMapping, ErrorT, MappingOptions


def map_database_error(error: ErrorT, **options: Unpack[MappingOptions]) -> ErrorT | HTTPException:
    """Return the `HTTPException` that answers a database failure, or the very same error.

    What comes back is there to be raised. The error given becomes its `__cause__`, and is logged
    here, once. An `HTTPException` stays as it is; another error is answered by what caused it.

    Args:
        error: any exception.
        **options: `constraints` by name and kinds, each with a message or an `ErrorRule`, and the
            `metadata` for `describe_database_error`. A wrong one is a `TypeError`.

    Example:
        except IntegrityError as error:
            raise map_database_error(error, unique="E-mail already registered.")
    """
    return ErrorMapping(options).map(error)


@overload
def http_errors(
    session: Session | None = None, /, **options: Unpack[MappingOptions]
) -> AbstractContextManager[None, None]: ...
@overload
def http_errors(
    session: AsyncSession, /, **options: Unpack[MappingOptions]
) -> AbstractAsyncContextManager[None, None]: ...
def http_errors(
    session: Session | AsyncSession | None = None, /, **options: Unpack[MappingOptions]
) -> AbstractContextManager[None, None] | AbstractAsyncContextManager[None, None]:
    """Map the database failures of a block, as `map_database_error` does.

    An error that the application has raised `from` one is its own, and left alone. With a session
    the block is a savepoint, flushed at its end: an `add()` fails there and not at COMMIT, and
    afterwards the transaction goes on without what the block did. A deferred constraint still
    waits for COMMIT. Write `with` for a `Session` and `async with` for an `AsyncSession`; without
    a session it is `with`, in `async` code too. A wrong argument is a `TypeError` at once.

    Example:
        async with http_errors(session, unique="E-mail already registered."):
            session.add(User(email=email))
    """
    mapping = ErrorMapping(options)
    if session is None:
        return mapping
    # The second None says that no error ends here, so that a block may end with a `return`.
    if isinstance(session, AsyncSession):
        block = _async_savepoint(session, mapping)
        return cast("AbstractAsyncContextManager[None, None]", block)
    if isinstance(cast("object", session), Session):
        return cast("AbstractContextManager[None, None]", _savepoint(session, mapping))
    raise TypeError(f"http_errors takes a Session or an AsyncSession, not {session!r}.")


@contextmanager
def _savepoint(session: Session, mapping: ErrorMapping) -> Generator[None]:
    with ErrorMapping({}):
        session.flush()  # what waits from before is no failure of this block
    with mapping, session.begin_nested():
        yield


@asynccontextmanager
async def _async_savepoint(session: AsyncSession, mapping: ErrorMapping) -> AsyncGenerator[None]:
    with ErrorMapping({}):
        await session.flush()
    with mapping:
        async with session.begin_nested():
            yield
