"""The user, the tenant, and the tenant's session."""

import hashlib
from typing import Annotated

from fastapi import Depends, Header, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.ext.asyncio import AsyncSession

from examples.tenants_by_predicate.models import User
from fastapi_sqlnative import get_db, transactional

Db = Annotated[AsyncSession, Depends(get_db())]
Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


async def current_user(session: Db, credentials: Credentials) -> User:
    """Find the user by a token that only they have."""
    user = await session.get(User, digest(credentials.credentials))
    if user is None:
        raise HTTPException(401, "Unknown token.")
    return user


def digest(token: str) -> str:
    """Return the hash that is stored instead of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


CurrentUser = Annotated[User, Depends(current_user)]


async def current_tenant(
    user: CurrentUser, claimed: Annotated[str | None, Header(alias="X-Tenant")] = None
) -> str:
    """Take the tenant from the user. A header may only repeat it."""
    if not user.tenant:
        raise HTTPException(403, "You belong to no tenant.")
    if claimed not in (None, user.tenant):
        raise HTTPException(403, "This is not your tenant.")
    return user.tenant


async def tenant_db(session: Db, tenant: Annotated[str, Depends(current_tenant)]) -> AsyncSession:
    """Set the tenant of the request's session, which `transactional` and others share."""
    session.info["tenant"] = tenant
    return session


TenantDb = Annotated[AsyncSession, Depends(tenant_db)]
Transaction = Annotated[AsyncSession, Depends(transactional())]
