"""Liveness and readiness: the router, readiness checks and draining."""

from .._lifespan.lifespan import drain_on_sigterm, start_draining
from .._probe import DatabaseState
from ._router import health_router
from ._watch import CheckResult, ReadinessCheck

__all__ = [
    "CheckResult",
    "DatabaseState",
    "ReadinessCheck",
    "drain_on_sigterm",
    "health_router",
    "start_draining",
]
