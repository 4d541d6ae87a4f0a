"""Who holds the connections of a database: for which route, since when, and until when at most."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from time import monotonic
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .._drivers import transactions
from .._drivers.pools import ConnectionHolder, ask_pool
from .._routes import name_of_route
from .shared import SharedState

_NOBODYS: Final[Mapping[str, Any]] = MappingProxyType({})

logger = logging.getLogger("fastapi_sqlnative")


class Holder:
    """What one session holds of the pool. Ends with the session."""

    __slots__ = ("_since", "connections", "ends_at", "executing", "on_idle", "request", "state")

    def __init__(self, state: SharedState) -> None:
        self.state = state
        self.connections: dict[Connection, int] = {}  # in use, with the changes made before
        self.request: Mapping[str, Any] = _NOBODYS  # the scope of the one that opened the session
        self.executing = False  # a statement of the session's is on its way
        self.ends_at = math.inf  # by monotonic(): the server is to end what is asked for by then
        self.on_idle: Any = None  # called when the connections are given back
        self._since = 0.0

    def take(self, connection: Connection) -> None:
        """Note a connection that the session holds from now on."""
        if not self.connections:
            self._since = monotonic()
        self.connections[connection] = transactions.changes(connection)
        self.state.at_work[connection] = self

    def give_back(self) -> None:
        """Note that the session holds none any more."""
        if not self.connections:
            return
        for connection in self.connections:
            self.state.at_work.pop(connection, None)
        self.connections.clear()
        limit = self.state.warn_held_after
        if limit is not None and (held := self.seconds) > limit:
            route = name_of_route(self.request) or "A session of the handle's"
            logger.warning(
                "%s held a connection of database %r for %.1f s.", route, self.state.name, held
            )
        if self.on_idle is not None:
            self.on_idle()

    def discard_connections(self) -> None:
        """Close what a session holds and could not close: SQLAlchemy has forgotten it."""
        for connection in tuple(self.connections):
            if not connection.closed:
                connection.invalidate()
                connection.close()

    @property
    def seconds(self) -> float:
        """How long the session has held its connections."""
        return monotonic() - self._since

    def is_idle_on(self, connection: Connection) -> bool:
        """Tell whether a transaction is open, and nothing is asked of the server."""
        idle = transactions.is_idle_in_transaction(connection)
        return not self.executing if idle is None else idle


def holders_of(state: SharedState) -> tuple[ConnectionHolder, ...]:
    """List the holders of the database's connections, the one with the oldest first."""
    held: dict[str | None, list[tuple[Holder, Connection]]] = {}
    for connection, holder in state.at_work.copy().items():  # threads may change it meanwhile
        held.setdefault(name_of_route(holder.request), []).append((holder, connection))
    found = (
        ConnectionHolder(
            route=route,
            connections=len(uses),
            seconds=max(holder.seconds for holder, _ in uses),
            idle_in_transaction=sum(holder.is_idle_on(each) for holder, each in uses),
        )
        for route, uses in held.items()
    )
    return tuple(sorted(found, key=lambda each: each.seconds, reverse=True))


def tell_holders(state: SharedState, error: PoolTimeoutError) -> None:
    """Note on an error who had the connections that it was raised for want of, and log it.

    Once in a second: where hundreds wait in vain, the others get what the first has found.
    """
    told = state.told_holders
    if told is None or monotonic() - told[0] > 1:
        told = state.told_holders = monotonic(), "; ".join(_described(state))
        logger.warning("No connection of database %r came back in time: %s.", state.name, told[1])
    error.add_note(f"The connections of database {state.name!r} are held by {told[1]}.")


def _described(state: SharedState) -> Iterator[str]:
    ours = 0
    for each in holders_of(state):
        ours += each.connections
        idle = f", {each.idle_in_transaction} idle in transaction" * bool(each.idle_in_transaction)
        route = each.route or "sessions of the handle"
        yield f"{route}: {each.connections}, up to {each.seconds:.1f} s{idle}"
    others = (ask_pool(state.root.pool, "checkedout") or 0) - ours
    if others > 0:
        yield f"others than sessions of fastapi-sqlnative: {others}"
    elif not ours:
        yield "nobody any more"
