"""The routes of liveness and readiness, and what they answer."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias, get_args

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.applications import Starlette

from .._lifespan.running import running_for, trimmed
from .._probe import DatabaseState, ask_database, is_wedged
from .._seconds import check_seconds
from .._sessions.engines import run_in_greenlet, sync_engine
from ..databases import AnyDatabase, AsyncDatabase, sessions_of
from ..dependencies import InstalledDependency
from ._watch import Check, CheckResult, ReadinessCheck, Watch, arguments_for

DatabasePolicy: TypeAlias = Literal["required", "writable", "degraded", "ignored"]
Status: TypeAlias = Literal["ready", "degraded", "not_ready", "not_started", "draining"]
# Under which an application keeps its watches: a router may outlive it, and serve several.
_STATE: Final = "fastapi_sqlnative_health"


class Liveness(BaseModel):
    """Whether the process is to go on."""

    status: Literal["alive", "wedged"]


class ReadinessReport(BaseModel):
    """Whether requests should come, and which database or check says no."""

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
    """Make a router with `GET` and `HEAD` of `{prefix}/live` and `{prefix}/ready`.

    Live answers 200 while the process can answer at all, and asks no database. Ready answers 200 or
    503, for the databases of the application, of those it is mounted in and of those mounted in
    it. Any number of probes wait for the same question. An application that has not started, that
    drains or has no database is not ready. The log has the cause of a state, when it changes.

    Args:
        prefix: of the paths.
        databases: by name, `required` as all are by default, `writable` to be required to take
            writes as well, `degraded` to be reported only, or `ignored`.
        checks: by name, what else the application depends on: functions, sync or async, of the
            application or of nothing, that return `True`, `False` or a `CheckResult`.
        timeout: seconds in which ready answers, whatever hangs.
        max_age: seconds for which an answer stands.
        down_after: seconds that a database may take to answer; until then its last answer stands.
        wedged_after: seconds, or those of the pool's own timeout if they are more, for which
            every connection may be in use and none come back. Then it is not ready.
        restart_after: seconds, likewise, after which live fails too; `None` for never.
        saturated_is_ready: whether it is ready while every connection of a pool is in use.
        include_in_schema: whether the OpenAPI document has these routes.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a time that is not above zero, or an unknown policy.
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
            raise ValueError(f"{policy!r} of database {name!r} is no policy: write one of {known}.")
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
                response_class=JSONResponse,  # whatever the application's own is
                responses={503: {"model": model}},
                dependencies=[Depends(InstalledDependency(name)) for name in policies],
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
    """What one router answers, for all applications that include it."""

    policies: Mapping[str, DatabasePolicy]
    checks: Mapping[str, ReadinessCheck]
    times: Mapping[str, float]
    saturated_is_ready: bool

    async def live(self, request: Request) -> JSONResponse:
        """Return whether the process is to go on."""
        limit = self.times.get("restart_after", math.inf)
        databases = running_for(request).all_databases()
        wedged = any(is_wedged(sync_engine(each.engine), limit) for each in databases)
        return _answer(Liveness(status="wedged" if wedged else "alive"), 503 if wedged else 200)

    async def ready(self, request: Request) -> JSONResponse:
        """Return whether the application can do its work, database by database, check by check."""
        running = running_for(request)
        databases = running.all_databases()
        asks = bool(databases) and not running.is_draining()
        watches = self._watches(request.app, databases) if asks else ()
        times = self.times["timeout"], self.times["max_age"]
        await asyncio.gather(*(each.look(*times) for each in watches))
        if running.is_draining():  # also since the question was put
            return _report("draining", ())
        failing = [each.check.required for each in watches if not each.result.ready]
        status: Status = "not_ready" if any(failing) else "degraded" if failing else "ready"
        return _report(status if databases else "not_started", watches)

    def _watches(self, app: Starlette, databases: Sequence[AnyDatabase]) -> Sequence[Watch]:
        """Return the watches of this run of the application, made at the first question."""
        runs: dict[_Health, tuple[Sequence[AnyDatabase], Sequence[Watch]]]
        setattr(app.state, _STATE, runs := getattr(app.state, _STATE, {}))
        if self not in runs or runs[self][0] != databases:
            checks = [Watch("Check", name, each, app) for name, each in self.checks.items()]
            counted = [each for each in databases if self.policies.get(each.name) != "ignored"]
            asking = [Watch("Database", each.name, self._check_of(each), app) for each in counted]
            runs[self] = databases, [*asking, *checks]
        return runs[self][1]

    def _check_of(self, database: AnyDatabase) -> ReadinessCheck:
        """Make a check of a database: sync or async, as it is."""
        policy = self.policies.get(database.name, "required")
        enough = (DatabaseState.UP, DatabaseState.SATURATED)[: 1 + self.saturated_is_ready]
        engine = sync_engine(database.engine)

        def ask() -> CheckResult:
            in_use = len(sessions_of(database).state.holders)
            state = ask_database(engine, in_use=in_use, writable=policy == "writable")
            if is_wedged(engine, self.times["wedged_after"]):
                state = DatabaseState.WEDGED
            return CheckResult(state in enough, state.value)

        is_async = isinstance(database, AsyncDatabase)
        check = functools.partial(run_in_greenlet, ask) if is_async else ask
        return ReadinessCheck(check, self.times["down_after"], required=policy != "degraded")


def _report(status: Status, watches: Sequence[Watch]) -> JSONResponse:
    # Of databases with one name, in an application and in one mounted in it, the worst.
    databases = {
        each.name: state
        for state in DatabaseState
        for each in watches
        if each.kind == "Database" and each.result.state == state
    }
    checks = {each.name: each.result.state for each in watches if each.kind == "Check"}
    report = ReadinessReport(status=status, databases=databases, checks=checks)
    return _answer(report, 200 if status in ("ready", "degraded") else 503)


def _answer(model: BaseModel, code: int) -> JSONResponse:
    return JSONResponse(model.model_dump(mode="json"), code, {"Cache-Control": "no-store"})
