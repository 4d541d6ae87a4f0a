"""Liveness and readiness: the router, what readiness asks, draining.

Live is the process: it never touches a database, which would restart the fleet when one is away.
Ready is what the process depends on, and fails closed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Depends, Request, Response
from fastapi.params import Depends as DependsParameter
from pydantic import BaseModel, Field
from starlette.applications import Starlette

from ._drivers.pools import PoolStatus
from ._lifespan.running import Installations, installations_of, running_for, trimmed
from ._probes import DatabaseState
from ._readiness import (
    Check,
    CheckQuestion,
    CheckResult,
    DatabaseQuestion,
    Finding,
    Subject,
    Watch,
    arguments_of,
)
from .databases import AnyDatabase
from .dependencies import InstalledDependency

__all__ = [
    "CheckResult",
    "DatabaseState",
    "ReadinessCheck",
    "health_router",
    "start_draining",
]

logger = logging.getLogger("fastapi_sqlnative")

# -- what an application says ----------------------------------------------------------------

DatabasePolicy: TypeAlias = Literal["required", "degraded", "ignored"]


@dataclass(frozen=True, slots=True)
class ReadinessCheck:
    """Give a check a time of its own, or report it only.

    Attributes:
        check: a function, sync or async, of the application or of nothing, which returns `True`,
            `False` or a `CheckResult`. A sync one runs in a thread.
        timeout: seconds, within those of the router; `None` for all of them.
        required: with `False` its failure is reported, and the application still ready.
    """

    check: Check
    timeout: float | None = None
    required: bool = True


def health_router(
    *,
    prefix: str = "/health",
    databases: Mapping[str, DatabasePolicy] | None = None,
    checks: Mapping[str, Check | ReadinessCheck] | None = None,
    timeout: float = 0.8,
    max_age: float = 1.0,
    saturated_is_ready: bool = True,
    details: Callable[..., Any] | DependsParameter | None = None,
    include_in_schema: bool = True,
) -> APIRouter:
    """Make a router with `GET` and `HEAD` of `{prefix}/live` and `{prefix}/ready`.

    Live answers 200 for as long as the process answers. Ready answers 200 or 503, for every
    database that is installed on the application, on those it is mounted in and on those mounted
    in it. It asks all of them at once, and only one question is ever on its way: any number of
    probes wait for the same one. Before the application has started, while it drains and where no
    database is installed it is not ready. The bodies hold names and states; the cause of a state
    goes to the log, when it changes.

    Args:
        prefix: of the paths.
        databases: by name, `required` as all are by default, `degraded` to be reported only, or
            `ignored`. A name that is not installed fails the start.
        checks: by name, what else the application depends on: a function, sync or async, of the
            application or of nothing, that returns `True`, `False` or a `CheckResult`. Whatever
            else it returns or raises counts as down.
        timeout: seconds in which ready answers, whatever hangs.
        max_age: seconds for which an answer stands.
        saturated_is_ready: whether a database that answers is enough, while every connection of
            its pool is in use.
        details: a dependency that lets in whoever may read durations and pools; with it there is
            `GET {prefix}/details`.
        include_in_schema: whether the OpenAPI document has these routes.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a time that is not above zero, or an unknown policy.

    Example:
        app.include_router(health_router(databases={"analytics": "degraded"}))
    """
    policies = _checked_policies(databases or {})
    named = {name: _checked_check(name, each) for name, each in (checks or {}).items()}
    _check_seconds(timeout=timeout, max_age=max_age)
    readiness = _Readiness(policies, named, timeout, max_age, saturated_is_ready)
    router = APIRouter(prefix=prefix, tags=["health"])

    def add(path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        for method, shown in ("GET", include_in_schema), ("HEAD", False):
            router.add_api_route(
                path, endpoint, name=path[1:], methods=[method], include_in_schema=shown, **options
            )

    installed = [Depends(InstalledDependency(name)) for name in policies]
    add("/live", _live)
    add("/ready", readiness.report, responses=_not_ready(), dependencies=installed)
    if details is not None:
        guard = details if isinstance(details, DependsParameter) else Depends(details)
        add("/details", readiness.details, dependencies=[guard])
    return router


def start_draining(app: Starlette) -> None:
    """Answer that the application is not ready, from now on; everything else is still served.

    Call it when the process is told to end, and let it serve until whoever sends it requests has
    noticed. Applications mounted in this one drain with it. It can be called from a signal
    handler, and more than once; the next start of the application is a new beginning.
    """
    registry = installations_of(app)
    if not registry.draining:
        registry.draining = True
        logger.info("The application drains: it is not ready any more, and still serves.")


def _checked_policies(databases: Mapping[str, DatabasePolicy]) -> dict[str, DatabasePolicy]:
    policies: dict[str, DatabasePolicy] = {
        trimmed(name): policy for name, policy in databases.items()
    }
    for name, policy in policies.items():
        if policy not in ("required", "degraded", "ignored"):
            raise ValueError(
                f"{policy!r} of database {name!r} is no policy: write 'required', 'degraded' or "
                "'ignored'."
            )
    return policies


def _checked_check(name: str, given: Check | ReadinessCheck) -> ReadinessCheck:
    check = given if isinstance(given, ReadinessCheck) else ReadinessCheck(given)
    arguments_of(name, check.check)
    if check.timeout is not None:
        _check_seconds(timeout=check.timeout)
    return check


def _check_seconds(**seconds: float) -> None:
    for name, value in seconds.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0 seconds, and finite.")


# -- what is answered ------------------------------------------------------------------------


class Liveness(BaseModel):
    """Say that the process answers."""

    status: Literal["alive"] = "alive"


ReadinessStatus: TypeAlias = Literal["ready", "degraded", "not_ready", "not_started", "draining"]


class ReadinessReport(BaseModel):
    """Say whether requests should come, and which database or check says no."""

    status: ReadinessStatus
    databases: dict[str, DatabaseState] = Field(default_factory=dict)
    checks: dict[str, str] = Field(default_factory=dict)


class CheckDetails(BaseModel):
    """Say how a check found things, and how long it took, in seconds."""

    state: str
    seconds: float


class DatabaseDetails(BaseModel):
    """Say how a database is, how long that took to say, in seconds, and what its pool holds."""

    state: DatabaseState
    seconds: float
    pool: PoolStatus


class ReadinessDetails(BaseModel):
    """Say what the report says, with durations and pools."""

    status: ReadinessStatus
    databases: dict[str, DatabaseDetails] = Field(default_factory=dict)
    checks: dict[str, CheckDetails] = Field(default_factory=dict)


_NO_STORE: Final = {"Cache-Control": "no-store"}


def _not_ready() -> dict[int | str, dict[str, Any]]:
    return {503: {"model": ReadinessReport, "description": "Send no requests here."}}


async def _live(response: Response) -> Liveness:
    """Answer for as long as the process does."""
    response.headers.update(_NO_STORE)
    return Liveness()


class _Readiness:
    """Answer for the applications that include one router."""

    def __init__(
        self,
        policies: Mapping[str, DatabasePolicy],
        checks: Mapping[str, ReadinessCheck],
        timeout: float,
        max_age: float,
        saturated_is_ready: bool,
    ) -> None:
        self._policies = policies
        self._checks = checks
        self._timeout = timeout
        self._max_age = max_age
        self._saturated_is_ready = saturated_is_ready
        self._watches: WeakKeyDictionary[Installations, Watch] = WeakKeyDictionary()

    async def report(self, request: Request, response: Response) -> ReadinessReport:
        """Tell whether the application can do its work, database by database and check by check."""
        status, findings = await self._look(request)
        response.headers.update(_NO_STORE)
        response.status_code = 200 if status in ("ready", "degraded") else 503
        return ReadinessReport(
            status=status,
            databases={name: state for name, state, _, _ in _databases(findings)},
            checks={each.name: each.result.state for each in findings if each.database is None},
        )

    async def details(self, request: Request, response: Response) -> ReadinessDetails:
        """Tell the same with durations, in seconds, and pools."""
        status, findings = await self._look(request)
        response.headers.update(_NO_STORE)
        return ReadinessDetails(
            status=status,
            databases={
                name: DatabaseDetails(state=state, seconds=seconds, pool=database.pool_status())
                for name, state, seconds, database in _databases(findings)
            },
            checks={
                each.name: CheckDetails(state=each.result.state, seconds=each.seconds)
                for each in findings
                if each.database is None
            },
        )

    async def _look(self, request: Request) -> tuple[ReadinessStatus, Sequence[Finding]]:
        running = running_for(request)
        registry = running.installed
        if running.is_draining():
            return "draining", ()
        databases = running.all_databases()
        if not databases:
            return "not_started", ()
        watch = self._watches.get(registry)
        if watch is None or watch.databases != databases:
            # Another run of the application, or another database in the place of one.
            watch = self._watches[registry] = self._watch(request.app, databases)
        findings = await watch.look()
        if running.is_draining():
            return "draining", ()  # since the question was put
        return self._status(findings), findings

    def _watch(self, app: Starlette, databases: Sequence[AnyDatabase]) -> Watch:
        policies = [self._policies.get(each.name, "required") for each in databases]
        asked = [
            Subject(
                each.name,
                DatabaseQuestion(each),
                required=policy == "required",
                database=each,
            )
            for each, policy in zip(databases, policies, strict=True)
            if policy != "ignored"
        ]
        called = [
            Subject(
                name,
                CheckQuestion(name, each.check, app),
                required=each.required,
                timeout=each.timeout,
            )
            for name, each in self._checks.items()
        ]
        return Watch(databases, [*asked, *called], self._timeout, self._max_age)

    def _status(self, findings: Sequence[Finding]) -> ReadinessStatus:
        failing = [each for each in findings if not self._is_ready(each)]
        if any(each.required for each in failing):
            return "not_ready"
        return "degraded" if failing else "ready"

    def _is_ready(self, finding: Finding) -> bool:
        if finding.database is not None and finding.result.state == DatabaseState.SATURATED:
            return self._saturated_is_ready
        return finding.result.ready


def _databases(
    findings: Sequence[Finding],
) -> Iterator[tuple[str, DatabaseState, float, AnyDatabase]]:
    """Yield name, state, seconds and handle of each database, the worst last.

    A mounted application may have a database under a name that is taken above it.
    """
    for state in DatabaseState:
        for each in findings:
            if each.database is not None and each.result.state == state:
                yield each.name, state, each.seconds, each.database
