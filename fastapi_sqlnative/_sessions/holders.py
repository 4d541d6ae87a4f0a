"""Who holds the connections of a database: which route, since when and until when."""

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.engine import CursorResult, ExecutionContext
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .._drivers import results, transactions
from .._drivers.pools import ConnectionHolder, ask_pool
from .._routes import name_of_route
from .options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions
from .shared import SharedState

# The key in a request's scope under which it keeps its unit of work.
UNIT: Final = "fastapi_sqlnative_unit_of_work"

logger = logging.getLogger("fastapi_sqlnative")


def empty() -> dict[Any, Any]:
    """Make a dictionary, in a fifth of the time that a generic alias takes."""
    return {}


@dataclass(eq=False, repr=False, slots=True)
class Holder:
    """The connections that one session holds. Lives as long as the session."""

    state: SharedState
    # With SQLite's count of changes at checkout.
    connections: dict[Connection, float] = field(default_factory=empty)
    # The scope of the session's request.
    request: Mapping[str, Any] = field(default_factory=empty)
    executing: bool = False  # a statement is running
    options: TransactionOptions = NO_OPTIONS  # of the session's transactions
    autocommits: bool = False  # each statement commits at once
    on_idle: Any = None  # called when the connections are released
    on_wanted: Any = None  # then called with this before the next checkout
    # Results that may not be exhausted: streams, whose cursor on the server has to be closed,
    # and others by their context. Weak, because SQLite cannot commit while one is unread.
    _streams: tuple[Any, ...] = ()
    _unread: weakref.WeakSet[ExecutionContext] | None = None
    held_since: float = 0.0

    def release(self) -> None:
        """Record that the session has released all its connections."""
        if not self.connections:
            return
        for connection in self.connections:
            self.state.holders.pop(connection, None)
        self.connections.clear()
        limit = self.state.warn_held_after
        if limit is not None and (held := self.seconds) > limit:
            route = name_of_route(self.request) or "A session from the handle"
            logger.warning(
                "%s held a connection of database %r for %.1f s.", route, self.state.name, held
            )
        if self.on_idle is not None:
            self.on_idle()

    def note_open_result(self, result: CursorResult[Any]) -> None:
        """Record a result that may be read later, over its connection."""
        if results.ends_with_transaction(result.context):
            still_open = (each for each in self._streams if each.cursor is not None)
            self._streams = (*still_open, result)
        else:
            self._unread = self._unread or weakref.WeakSet()
            self._unread.add(result.context)

    def end_results(self, *, streams_only: bool = False) -> None:
        """Close open results: streams at COMMIT or ROLLBACK, everything when the session ends.

        The connection then goes back to the pool, and a stream may have unread rows on the server.
        """
        streams = [each.context for each in self._streams if each.cursor is not None]
        self._streams = ()
        others = () if streams_only else self._unread or ()
        for context in [*streams, *others]:
            self.state.readers[context.root_connection] = self
            # Closing fails on a lost connection; an exhausted result has no cursor to close.
            with contextlib.suppress(context.dialect.loaded_dbapi.Error, OSError):
                results.close_cursor(context)

    @property
    def seconds(self) -> float:
        """The seconds for which the session has held its connections."""
        return monotonic() - self.held_since


def holders_of(state: SharedState) -> tuple[ConnectionHolder, ...]:
    """List the holders of the database's connections, the longest first."""
    held: dict[str | None, list[tuple[Holder, Connection]]] = {}
    for connection, holder in state.holders.copy().items():  # other threads may change it
        held.setdefault(name_of_route(holder.request), []).append((holder, connection))
    found = (
        ConnectionHolder(
            route=route,
            connections=len(uses),
            seconds=max(holder.seconds for holder, _ in uses),
            idle_in_transaction=sum(
                not (holder.autocommits or holder.options is AUTOCOMMIT)
                and transactions.is_idle_in_transaction(each, executing=holder.executing)
                for holder, each in uses
            ),
        )
        for route, uses in held.items()
    )
    return tuple(sorted(found, key=lambda each: each.seconds, reverse=True))


def report_holders(state: SharedState, error: PoolTimeoutError) -> None:
    """Add a note to a pool timeout that says who holds the connections, and log it.

    At most once a second: if hundreds of requests time out, the others get the first one's text.
    """
    with state.reporting:  # sessions of several threads may time out at the same moment
        report = state.holders_reported
        if report is None or monotonic() - report[0] > 1:
            report = state.holders_reported = monotonic(), "; ".join(_described(state))
            logger.warning(
                "No connection of database %r came back in time: %s.", state.name, report[1]
            )
    error.add_note(f"The connections of database {state.name!r} are held by {report[1]}.")


def _described(state: SharedState) -> Iterator[str]:
    ours = 0
    for each in holders_of(state):
        ours += each.connections
        idle = f", {each.idle_in_transaction} idle in transaction" * bool(each.idle_in_transaction)
        route = each.route or "sessions of the handle"
        yield f"{route}: {each.connections}, up to {each.seconds:.1f} s{idle}"
    others = (ask_pool(state.root.pool, "checkedout") or 0) - ours
    if others > 0:
        yield f"sessions that are connecting, or code outside fastapi-sqlnative: {others}"
    elif not ours:
        yield "no one anymore"
