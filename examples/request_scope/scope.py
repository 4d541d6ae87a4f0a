"""What a request is about: its trace, its user, its tenant. Plain dependencies, one for each."""

import logging
import re
import secrets
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, HTTPException, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

# It stands for your identity provider, which says who has a token and where they belong.
USERS = {"ada": "acme", "grace": "globex"}
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
Credentials = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


@dataclass(frozen=True)
class User:
    """Know somebody, and the tenant that they belong to."""

    name: str
    tenant: str


def trace_id(response: Response, traceparent: Annotated[str, Header()] = "") -> str:
    """Go on with the client's trace, where it is one, or begin a trace."""
    found = TRACEPARENT.fullmatch(traceparent)
    trace = found[1] if found else secrets.token_hex(16)
    response.headers["X-Trace"] = trace
    return trace


def current_user(credentials: Credentials) -> User:
    """Know the user by a token."""
    name = credentials.credentials
    if name not in USERS:
        raise HTTPException(401, "Unknown token.")
    return User(name, USERS[name])


@dataclass(frozen=True)
class RequestScope:
    """Hold what a request is about, for whoever outlives it too: it is a plain value."""

    trace: Annotated[str, Depends(trace_id)]
    user: Annotated[User, Depends(current_user)]


Scope = Annotated[RequestScope, Depends()]


def request_log(scope: Scope) -> logging.LoggerAdapter[logging.Logger]:
    """Log with the trace in every line."""
    log = logging.getLogger("examples.request_scope")
    extra = {"trace": scope.trace, "user": scope.user.name, "tenant": scope.user.tenant}
    return logging.LoggerAdapter(log, extra)
