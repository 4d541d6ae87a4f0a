"""Whether a pool moves: what readiness knows of it without asking for a connection."""

from __future__ import annotations

from time import monotonic
from typing import Final

from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry

from ._pools import ask_pool, pool_capacity

# In the `info` of a connection that no pool of the application's has ever held.
OUTSIDE: Final = "fastapi_sqlnative_outside"
# The execution option under which an engine keeps when its pool last moved.
_MOVEMENT: Final = "fastapi_sqlnative_movement"


class _Movement:
    """When a pool last handed out a connection or got one back; lives with the engine."""

    def __init__(self) -> None:
        self.last = monotonic()

    def note(self, _connection: object, record: ConnectionPoolEntry, *_proxy: object) -> None:
        if OUTSIDE not in record.info:
            self.last = monotonic()


def seconds_held(engine: Engine) -> float:
    """Return for how long every connection has been in use, and none has come back.

    The first call begins to listen to the pool.
    """
    movement = engine.get_execution_options().get(_MOVEMENT)
    if movement is None:
        movement = _Movement()
        event.listen(engine, "checkout", movement.note)
        event.listen(engine, "checkin", movement.note)
        engine.update_execution_options(**{_MOVEMENT: movement})
    return monotonic() - movement.last if is_full(engine) else 0.0


def is_full(engine: Engine) -> bool:
    """Tell whether every connection that the pool hands out is in use."""
    capacity, in_use = pool_capacity(engine.pool), ask_pool(engine.pool, "checkedout")
    return capacity is not None and in_use is not None and in_use >= capacity
