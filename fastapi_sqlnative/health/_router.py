"""The liveness and readiness routes."""

import asyncio
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeAlias, get_args

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from sqlalchemy import Engine

from .._functions import check_seconds
from .._lifespan.running import Running, running_for, trimmed
from .._probe import DatabaseState, ask_database, is_wedged
from .._sessions.engines import run_on_engine, sync_engine
from ..databases import AnyDatabase, AsyncDatabase, sessions_of
from ..dependencies import DatabaseDependency
from ._watch import Check, CheckResult, ReadinessCheck, Watch, arguments_for

DatabasePolicy: TypeAlias = Literal["required", "writable", "degraded", "ignored"]
Watched: TypeAlias = tuple[Sequence[AnyDatabase], Sequence[Watch]]
Status: TypeAlias = Literal["ready", "degraded", "not_ready", "not_started", "draining"]


@dataclass(frozen=True)
class Liveness:
    """The answer of liveness: whether the process should keep running."""

    status: Literal["alive", "wedged"]


@dataclass(frozen=True)
class ReadinessReport:
    """The answer of readiness: whether to send requests, and the state of each dependency."""

    status: Status
    databases: dict[str, DatabaseState]
    checks: dict[str, str]


def health_router(
    *,
    prefix: str = "/health",
    databases: Mapping[str, DatabasePolicy] | None = None,
    checks: Mapping[str, Check | ReadinessCheck] | None = None,
    timeout: float = 0.8,
    max_age: float = 1.0,
    down_after: float = 5.0,
    wedged_after: float = 10.0,
    restart_after: float | None = None,
    saturated_is_ready: bool = True,
    include_in_schema: bool = True,
) -> APIRouter:
    """Make a router with `GET` and `HEAD` routes for `{prefix}/live` and `{prefix}/ready`.

    Live answers 200 as long as the process can answer at all, and never queries a database. Ready
    answers 200 or 503, for the databases of the application, of those it is mounted in and of
    those mounted in it. Concurrent probes share one query. An application is not ready if it has
    not started, is draining or has no database. The log shows the cause when a state changes.

    Args:
        prefix: the prefix of both paths.
        databases: policies by name: `required` (the default), `writable` to also require that it
            accepts writes, `degraded` to only report it, or `ignored`.
        checks: further checks by name: functions, sync or async, that take the application or
            nothing and return `True`, `False` or a `CheckResult`.
        timeout: seconds within which ready answers, whatever hangs.
        max_age: seconds for which a result is reused.
        down_after: seconds that a database may take to answer; until then its last result holds.
        wedged_after: seconds, or the pool's own timeout if that is longer, for which all
            connections may be in use without one coming back. After that it is not ready.
        restart_after: seconds, likewise, after which live fails too; `None` for never.
        saturated_is_ready: whether it is ready while all connections of a pool are in use.
        include_in_schema: whether the OpenAPI document includes these routes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a time is not above zero, or a policy is unknown.
    """
    times = {"timeout": timeout, "max_age": max_age, "down_after": down_after}
    times["wedged_after"] = wedged_after
    if restart_after is not None:
        times["restart_after"] = restart_after
    for what, seconds in times.items():
        check_seconds(what, seconds)
    named = {name: _checked(name, each, timeout) for name, each in (checks or {}).items()}
    policies: dict[str, DatabasePolicy] = {}
    for name, policy in (databases or {}).items():
        if policy not in get_args(DatabasePolicy):
            known = ", ".join(map(repr, get_args(DatabasePolicy)))
            raise ValueError(f"{policy!r} of database {name!r} is no policy: use one of {known}.")
        policies[trimmed(name)] = policy
    health = _Health(policies, named, times, saturated_is_ready)
    router = APIRouter(prefix=prefix, tags=["health"])
    for method, shown in ("GET", include_in_schema), ("HEAD", False):
        for endpoint, model in (health.ready, ReadinessReport), (health.live, Liveness):
            router.add_api_route(
                f"/{endpoint.__name__}",
                endpoint,
                methods=[method],
                include_in_schema=shown,
                response_model=model,
                response_class=JSONResponse,  # even if the application's default is another
                responses={503: {"model": model}},
                dependencies=[Depends(DatabaseDependency(name)) for name in policies],
            )
    return router


def _checked(name: str, given: Check | ReadinessCheck, timeout: float) -> ReadinessCheck:
    check = given if isinstance(given, ReadinessCheck) else ReadinessCheck(given)
    arguments_for(name, check.check, None)
    if check.timeout is not None:
        check_seconds(f"timeout of check {name!r}", check.timeout)
    return replace(check, timeout=min(check.timeout or timeout, timeout))


@dataclass(frozen=True, eq=False)
class _Health:
    """The endpoints of one router, for all applications that include it."""

    policies: Mapping[str, DatabasePolicy]
    checks: Mapping[str, ReadinessCheck]
    times: Mapping[str, float]
    saturated_is_ready: bool

    async def live(self, request: Request) -> JSONResponse:
        """Report whether the process should keep running."""
        limit = self.times.get("restart_after", math.inf)
        databases = running_for(request).databases()
        wedged = any(is_wedged(sync_engine(each.engine), limit) for each in databases)
        return _answer(Liveness(status="wedged" if wedged else "alive"), 503 if wedged else 200)

    async def ready(self, request: Request) -> JSONResponse:
        """Report whether the application is ready, with the state of each database and check."""
        running = running_for(request)
        databases = running.databases()
        asks = bool(databases) and not running.is_draining()
        watches = self._watches(running, databases) if asks else ()
        times = self.times["timeout"], self.times["max_age"]
        await asyncio.gather(*(each.refresh(*times) for each in watches))
        if running.is_draining():  # it may have started draining meanwhile
            return _report("draining", ())
        failing = [each.check.required for each in watches if not each.result.ready]
        status: Status = "not_ready" if any(failing) else "degraded" if failing else "ready"
        return _report(status if databases else "not_started", watches)

    def _watches(self, running: Running, databases: Sequence[AnyDatabase]) -> Sequence[Watch]:
        """Return the watches of this run of the application, making them at the first probe."""
        known: Watched = running.watched.get(self, ((), ()))
        if known[0] != databases:
            app = running.app
            checks = [Watch("Check", name, each, app) for name, each in self.checks.items()]
            counted = [each for each in databases if self.policies.get(each.name) != "ignored"]
            asking = [Watch("Database", each.name, self._check_of(each), app) for each in counted]
            known = running.watched[self] = databases, [*asking, *checks]
        return known[1]

    def _check_of(self, database: AnyDatabase) -> ReadinessCheck:
        """Make the check for a database, sync or async like the database."""
        policy = self.policies.get(database.name, "required")
        enough = (DatabaseState.UP, DatabaseState.SATURATED)[: 1 + self.saturated_is_ready]

        def ask(engine: Engine) -> CheckResult:
            in_use = len(sessions_of(database).state.holders)
            state = ask_database(engine, in_use=in_use, writable=policy == "writable")
            if is_wedged(engine, self.times["wedged_after"]):
                state = DatabaseState.WEDGED
            return CheckResult(state in enough, state.value)

        check: Check = functools.partial(ask, sync_engine(database.engine))
        if isinstance(database, AsyncDatabase):  # it can be cancelled
            check = functools.partial(run_on_engine, database.engine, ask)
        return ReadinessCheck(check, self.times["down_after"], required=policy != "degraded")


def _report(status: Status, watches: Sequence[Watch]) -> JSONResponse:
    # Databases of mounted applications may share a name: the worst state, which is last, wins.
    databases = {
        each.name: state
        for state in DatabaseState
        for each in watches
        if each.kind == "Database" and each.result.state == state
    }
    checks = {each.name: each.result.state for each in watches if each.kind == "Check"}
    report = ReadinessReport(status=status, databases=databases, checks=checks)
    return _answer(report, 200 if status in ("ready", "degraded") else 503)


def _answer(report: Liveness | ReadinessReport, code: int) -> JSONResponse:
    return JSONResponse(asdict(report), code, {"Cache-Control": "no-store"})
