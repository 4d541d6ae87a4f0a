"""The request's sessions under this application's names, and the current user."""

from typing import Annotated

from fastapi import Depends, Header, HTTPException
from sqlalchemy.ext.asyncio import AsyncSession

from examples.showcase.models import User
from fastapi_sqlnative import get_db, reader, transactional

Db = Annotated[AsyncSession, Depends(get_db())]
Transaction = Annotated[AsyncSession, Depends(transactional())]
Reader = Annotated[AsyncSession, Depends(reader())]

AnalyticsDb = Annotated[AsyncSession, Depends(get_db("analytics"))]
AnalyticsTransaction = Annotated[AsyncSession, Depends(transactional("analytics"))]
AnalyticsReader = Annotated[AsyncSession, Depends(reader("analytics"))]

# Trusting a header is for the demo only.
UserName = Annotated[str, Header(alias="X-User")]


async def current_user(session: Db, name: UserName = "") -> User:
    """Load the user, in the same session as the endpoint's transaction."""
    return await _find_user(session, name)


async def reading_user(session: Reader, name: UserName = "") -> User:
    """Load the user for an endpoint that only reads.

    It uses the endpoint's session: `get_db` beside `reader` would hold two of the
    pool's connections for one request.
    """
    return await _find_user(session, name)


async def _find_user(session: AsyncSession, name: str) -> User:
    user = await session.get(User, name)
    if user is None:
        raise HTTPException(401, "Say who you are: X-User: ada, or grace.")
    return user


CurrentUser = Annotated[User, Depends(current_user)]
ReadingUser = Annotated[User, Depends(reading_user)]
