"""The class of a session: the application's own, between what stands in front and behind."""

from __future__ import annotations

import math
import time
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction

from .._drivers.transactions import limit_statements
from .options import AUTOCOMMIT, NO_OPTIONS, begin_with
from .pending import would_be_flushed
from .record import Record
from .session import TAKES_OPTIONS, NativeSession
from .transaction import depth_of


class Outermost(Session):
    """What stands in front of the application's class, so that its listeners hear first."""

    sqlnative: Record

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep the application's own from hearing of a subclass that is none of its."""

    def get_bind(self, *args: Any, **arguments: Any) -> Engine | Connection:
        """Let the application choose the engine, and give it as one that sets the options.

        In front, because routing classes seldom call SQLAlchemy's own.
        """
        bind = super().get_bind(*args, **arguments)
        record = self.sqlnative
        record.asked = True
        if record.options is NO_OPTIONS or not isinstance(bind, Engine):
            return bind
        if record.options is AUTOCOMMIT and TAKES_OPTIONS:
            return bind
        return record.engine_for(bind)


def native_class(base: type[Session]) -> type[Session]:
    """Put ours behind an application's session class, under the same name."""
    bases = (Outermost, NativeSession) if base is Session else (Outermost, base, NativeSession)
    return type(base.__name__, bases, {"__module__": base.__module__})


# -- the few events, where no method is passed ---------------------------------------------------


# Before the application's own listeners: one that fails must hide neither the connection nor that
# the COMMIT got through.
@event.listens_for(Outermost, "after_begin")
def _after_begin(
    session: Outermost, _transaction: SessionTransaction, connection: Connection
) -> None:
    record = session.sqlnative
    if connection in record.connections:
        return  # a savepoint on a connection that is known
    record.begun_on(connection)
    if record.finished:
        # A task or thread that the request left behind has waited for the pool all the while.
        record.discard_connections()
        record.check_unfinished()
    if record.options is not NO_OPTIONS:
        begin_with(connection, record.options)
    if record.ends_at != math.inf:
        limit_statements(connection, record.ends_at - time.monotonic())


@event.listens_for(Outermost, "after_flush")
def _after_flush(session: Outermost, _context: object) -> None:
    record = session.sqlnative
    record.work.wrote = record.work.wrote or would_be_flushed(session)


@event.listens_for(Outermost, "after_commit")
def _after_commit(session: Outermost) -> None:
    record = session.sqlnative
    if record.committing:  # else it was a savepoint
        record.committed = True
        record.stored = record.stored or record.may_have_written


@event.listens_for(Outermost, "after_soft_rollback")
def _after_soft_rollback(session: Outermost, previous: SessionTransaction) -> None:
    if previous.nested:
        record = session.sqlnative
        record.work.savepoint_undone(depth_of(previous), record.connections)


@event.listens_for(Outermost, "after_transaction_end")
def _after_transaction_end(session: Outermost, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.sqlnative.forget()
