"""A request's trace, user and tenant, as plain dependencies."""

import logging
import re
import secrets
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, HTTPException, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

# This stands in for your identity provider, which maps tokens to users and their tenants.
USERS = {"ada": "acme", "grace": "globex"}
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


@dataclass(frozen=True)
class User:
    """A user, and the tenant that they belong to."""

    name: str
    tenant: str


def trace_id(response: Response, traceparent: Annotated[str, Header()] = "") -> str:
    """Continue the client's trace if it is valid, or start one."""
    found = TRACEPARENT.fullmatch(traceparent)
    trace = found[1] if found else secrets.token_hex(16)
    response.headers["X-Trace"] = trace
    return trace


def current_user(credentials: Credentials) -> User:
    """Find the user by a token."""
    name = credentials.credentials
    if name not in USERS:
        raise HTTPException(401, "Unknown token.")
    return User(name, USERS[name])


@dataclass(frozen=True)
class RequestScope:
    """A request's scope: a plain value, which can outlive the request."""

    trace: Annotated[str, Depends(trace_id)]
    user: Annotated[User, Depends(current_user)]


Scope = Annotated[RequestScope, Depends()]


def request_log(scope: Scope) -> logging.LoggerAdapter[logging.Logger]:
    """A log adapter that adds the trace to every line."""
    log = logging.getLogger("examples.request_scope")
    extra = {"trace": scope.trace, "user": scope.user.name, "tenant": scope.user.tenant}
    return logging.LoggerAdapter(log, extra)
