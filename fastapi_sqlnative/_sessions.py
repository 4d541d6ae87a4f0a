"""The session classes: the application's own, with a guard that is asked before it works."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction

from ._guards import SessionGuard
from ._options import NO_OPTIONS, begin_with
from ._statements import mark


class GuardedSession(Session):
    """Be a `Session` that asks its guard before it works.

    Mixed in front of the application's own session class, so its `get_bind` still routes.
    """

    def __init__(self, *args: Any, guard: SessionGuard, **options: Any) -> None:
        self.sqlnative = guard
        super().__init__(*args, **options)

    def get_bind(self, *args: Any, **arguments: Any) -> Engine | Connection:
        """Choose the engine: SQLAlchemy asks before every statement, flush and connection."""
        guard = self.sqlnative
        guard.check_usable()
        guard.asked = True
        bind = super().get_bind(*args, **arguments)
        return guard.engines.engine(bind, guard) if isinstance(bind, Engine) else bind

    # What a background task calls first, without asking for an engine: SQLAlchemy would refuse a
    # closed session too, but its message knows no remedy.

    def add(self, instance: object, **options: Any) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().add(instance, **options)

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        return super().begin(nested)

    def commit(self) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().commit()

    def delete(self, instance: object) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().delete(instance)

    def refresh(self, instance: object, *args: Any, **options: Any) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().refresh(instance, *args, **options)

    def merge(self, instance: Any, **options: Any) -> Any:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        return super().merge(instance, **options)

    def rollback(self) -> None:
        """Refuse to wait for a ROLLBACK on the event loop's thread."""
        self.sqlnative.prepare_end()
        super().rollback()

    # They roll back too, and nobody who writes `with session:` means that.

    def close(self) -> None:
        """Note what is thrown away; refuse to wait on the event loop's thread."""
        self._note_discarded()
        self.sqlnative.prepare_end()
        super().close()

    def reset(self) -> None:
        """Note what is thrown away; refuse to wait on the event loop's thread."""
        self._note_discarded()
        self.sqlnative.prepare_end()
        super().reset()

    def _note_discarded(self) -> None:
        guard = self.sqlnative
        if not guard.finished and (guard.has_written or has_pending_changes(self)):
            guard.discarded = True


def guard_of(session: Session) -> SessionGuard:
    """Return the guard of a session that `guarded_class` made."""
    return cast("GuardedSession", session).sqlnative


def guarded_class(base: type[Session]) -> type[Session]:
    """Put the guard in front of an application's session class, under the same name."""
    return type(base.__name__, (GuardedSession, base), {"__module__": base.__module__})


def has_pending_changes(session: Session) -> bool:
    """Tell whether objects of the session wait for a flush."""
    # Whatever is added or changed begins a transaction: asking for one first is cheap.
    return session.in_transaction() and bool(
        session.new or session.deleted or any(session.is_modified(row) for row in session.dirty)
    )


# Before the application's own listeners: one that fails must not hide the connection from us.
@event.listens_for(GuardedSession, "after_begin", insert=True)
def _remember_connection(
    session: GuardedSession, _transaction: SessionTransaction, connection: Connection
) -> None:
    guard = session.sqlnative
    if connection in guard.transactions:
        return  # a savepoint on a connection that is known
    guard.engines.busy.add(guard)
    mark(connection, guard)
    if guard.finished:
        # A task or thread that the request left behind has waited for the pool all the while.
        guard.discard_connections()
        guard.check_unfinished()
    if guard.options is not NO_OPTIONS:
        begin_with(connection, guard.options)


@event.listens_for(GuardedSession, "before_commit")
def _before_commit(session: GuardedSession) -> None:
    # RELEASE SAVEPOINT of an aborted transaction fails by itself, COMMIT does not.
    if not session.in_nested_transaction():
        # First what commit() would flush after this, with listeners that may swallow an error.
        session.flush()
        session.sqlnative.check_committable()
        session.sqlnative.prepare_end()
        session.sqlnative.committing = True


@event.listens_for(GuardedSession, "after_transaction_end")
def _forget_connections(session: GuardedSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.sqlnative.forget()
