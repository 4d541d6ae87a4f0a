"""The session class: every use of the database goes through one of its methods."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

from sqlalchemy import Connection, Sequence, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from .._drivers.transactions import begin, begin_before_savepoint
from ..exceptions import ReadOnlySessionError
from .completion import to_completion
from .engines import run_in_greenlet
from .options import AUTOCOMMIT
from .record import Record
from .transaction import (
    BegunTransaction,
    depth_of,
    has_pending_changes,
    is_dirty,
    is_update_observed,
)

AnySession: TypeAlias = Session | AsyncSession


class NativeSession(Session):
    """A `Session` that records its work and reports the true outcome of a COMMIT.

    In the MRO it comes after the application's own session class and before SQLAlchemy's. The
    application's overrides run first, and their `super()` calls arrive here.
    """

    sqlnative: Record

    # -- using the database ----------------------------------------------------------------

    def execute(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Execute a statement and record it. Loads, including lazy ones, call this too."""
        record = self.sqlnative
        record.check_usable()
        if record.options is AUTOCOMMIT and record.state.writes(statement):
            raise record.state.error(ReadOnlySessionError)  # before it is sent and committed
        if getattr(statement, "is_insert", False):
            # Else psycopg forgets whether an upsert has touched a row as its cursor is closed.
            given: Any = options.get("execution_options") or {}
            options["execution_options"] = {"preserve_rowcount": True, **given}
        result = _recorded(record, super().execute, statement, *args, **options)
        record.note_result(result, statement)
        return result

    def scalars(self, *args: Any, **options: Any) -> Any:
        return NativeSession.execute(self, *args, **options).scalars()

    def scalar(self, statement: Any, *args: Any, **options: Any) -> Any:
        if isinstance(statement, Sequence):  # executing one returns no result object
            self.sqlnative.check_usable()
            return _recorded(self.sqlnative, super().scalar, statement, *args, **options)
        return NativeSession.execute(self, statement, *args, **options).scalar()

    def connection(self, *args: Any, **options: Any) -> Connection:
        """Hand out the connection; from then on anything may have been sent over it."""
        record = self.sqlnative
        record.check_usable()
        connection: Connection = _recorded(record, super().connection, *args, **options)
        _recorded(record, begin, connection)
        record.hand_out(connection)
        return connection

    def flush(self, *args: Any, **options: Any) -> None:
        """Flush pending changes. SQLAlchemy's autoflush calls this before each statement."""
        if not is_dirty(self):
            return
        record = self.sqlnative
        pending = has_pending_changes(self)
        if pending and record.options is AUTOCOMMIT:
            raise record.state.error(ReadOnlySessionError)
        if pending:
            record.check_thread()
        note_flush(self, record, pending)
        checked, record.committing = record.committing, False
        _recorded(record, super().flush, *args, **options)
        if checked:  # a flush after the last check, whose listeners may have hidden an error
            record.check_committable()
            record.committing = True

    def bulk_save_objects(self, *args: Any, **options: Any) -> None:
        _write(self, super().bulk_save_objects, *args, **options)

    def bulk_insert_mappings(self, *args: Any, **options: Any) -> None:
        _write(self, super().bulk_insert_mappings, *args, **options)

    def bulk_update_mappings(self, *args: Any, **options: Any) -> None:
        _write(self, super().bulk_update_mappings, *args, **options)

    # A background task may call these first, and they need no connection. SQLAlchemy would let a
    # closed session start again.

    def add(self, *args: Any, **options: Any) -> None:
        self.sqlnative.check_unfinished()
        super().add(*args, **options)

    def delete(self, *args: Any, **options: Any) -> None:
        self.sqlnative.check_unfinished()
        super().delete(*args, **options)

    def merge(self, *args: Any, **options: Any) -> Any:
        self.sqlnative.check_unfinished()
        return super().merge(*args, **options)

    if hasattr(Session, "delete_all"):  # SQLAlchemy 2.1, where these do not call the two above

        def delete_all(self, *args: Any, **options: Any) -> None:
            self.sqlnative.check_unfinished()
            super().delete_all(*args, **options)

        def merge_all(self, *args: Any, **options: Any) -> Any:
            self.sqlnative.check_unfinished()
            return super().merge_all(*args, **options)

    def refresh(self, *args: Any, **options: Any) -> None:
        self.sqlnative.check_unfinished()
        super().refresh(*args, **options)

    # -- transactions ----------------------------------------------------------------------

    def begin(self, nested: bool = False) -> SessionTransaction:
        record = self.sqlnative
        record.check_unfinished()
        for connection in record.connections if nested else ():
            begin_before_savepoint(connection)
        transaction = super().begin(nested)
        if not nested:
            return _begun(self, transaction)
        record.work.savepoint_begins(depth_of(transaction), record.connections)
        return transaction

    def get_transaction(self) -> SessionTransaction | None:
        transaction = super().get_transaction()
        return None if transaction is None else _begun(self, transaction)

    def commit(self) -> None:
        """Commit as SQLAlchemy does: check, flush, check again, COMMIT, interpret the outcome."""
        record = self.sqlnative
        record.check_unfinished()
        if record.connections:
            record.check_thread()
        record.committed = False
        try:
            while (nested := self.get_nested_transaction()) is not None:
                nested.commit()
            _commit_checked(self, super().commit)
        except Exception as error:
            record.commit_failed(error)
            raise

    def prepare(self) -> None:
        """Prepare a two-phase commit; then the server can't tell what the transaction has done."""
        record = self.sqlnative
        record.check_usable()
        super().prepare()
        record.work.prepared = record.work.may_have_written

    def rollback(self) -> None:
        record = self.sqlnative
        if record.connections:
            record.check_thread()
        record.end_results(streams_only=True)
        super().rollback()

    # These roll back too, which the author of a `with session:` may not expect.

    def close(self) -> None:
        _note_discarded(self)
        super().close()

    def reset(self) -> None:
        _note_discarded(self)
        super().reset()

    def invalidate(self) -> None:
        _note_discarded(self, ask=False)  # the connection may hang
        super().invalidate()


def sync_session(session: AnySession) -> NativeSession:
    """Return the synchronous session behind an `AsyncSession`, or the session itself."""
    given: Any = session
    inner: NativeSession = getattr(given, "sync_session", given)
    return inner


def record_of(session: AnySession) -> Record:
    """Return the record of a session whose class `native_class` made."""
    return sync_session(session).sqlnative


def may_store(session: NativeSession) -> bool:
    """Return whether a commit may store something, judged without asking the server."""
    listened = bool(session.dispatch.before_commit)  # a listener may write
    return listened or session.sqlnative.may_have_written or has_pending_changes(session)


# Functions, because a method could have the name of one of the application's class.


def _recorded(record: Record, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a method of SQLAlchemy's, and record that it runs and how it fails."""
    executing, record.executing = record.executing, True
    try:
        return method(*args, **options)
    except Exception as error:
        record.handle_error(error)
        raise
    finally:
        record.executing = executing


def _write(session: NativeSession, method: Callable[..., None], *args: Any, **options: Any) -> None:
    record = session.sqlnative
    record.check_usable()
    if record.options is AUTOCOMMIT:
        raise record.state.error(ReadOnlySessionError)
    record.work.wrote = record.work.wrote or session.is_active  # after a failed flush it is not
    _recorded(record, method, *args, **options)


def note_flush(session: Session, record: Record, pending: bool) -> None:
    """Record what a flush is about to send: it leaves no history of SQL expressions."""
    record.work.wrote = record.work.wrote or pending
    # A mapper's listeners get the connection, even for an object without a change to send.
    if not record.work.wrote and any(map(is_update_observed, session.dirty)):
        record.work.handed_out = True  # also of a connection that joins in the flush
        for connection in record.connections:
            record.hand_out(connection)


def _begun(session: NativeSession, transaction: SessionTransaction) -> SessionTransaction:
    record = session.sqlnative
    if record.begun is None or record.begun.transaction is not transaction:
        record.begun = BegunTransaction(session, transaction)
    return cast("SessionTransaction", record.begun)


def _commit_checked(session: NativeSession, commit: Callable[[], None]) -> None:
    """Check the transaction as the last thing before its COMMIT."""
    if not session.dispatch.before_commit:
        if session.in_transaction():
            _check_before_commit(session)
        return _commit_uninterrupted(session, commit)
    if event.contains(session, "before_commit", _check_before_commit):
        return commit()  # from such a listener, which SQLAlchemy refuses
    # Listeners on the session run after those on its classes, and the newest runs last.
    event.listen(session, "before_commit", _check_before_commit)
    try:
        return _commit_uninterrupted(session, commit)
    finally:
        event.remove(session, "before_commit", _check_before_commit)


def _check_before_commit(session: NativeSession) -> None:
    """Refuse to commit an aborted transaction, after all listeners and right before COMMIT."""
    record = session.sqlnative
    # Flush here, not in commit() after this check: flush listeners may swallow an error.
    session.flush()
    record.end_results(streams_only=True)  # before the check: a connection may be lost there
    record.check_committable()
    record.committing = session.is_active  # after a failed flush, SQLAlchemy refuses to commit


def _commit_uninterrupted(session: NativeSession, commit: Callable[[], None]) -> None:
    """Let a COMMIT of the application's own end, even if its caller is cancelled (rule 13)."""
    record, state = session.sqlnative, session.sqlnative.state
    if record.shielded or not state.root.dialect.is_async or not may_store(session):
        return commit()
    return await_only(to_completion(partial(run_in_greenlet, commit), databases=[state]))


def _note_discarded(session: NativeSession, *, ask: bool = True) -> None:
    record = session.sqlnative
    if record.connections:
        record.check_thread()
    record.end_results()
    for connection in record.connections:
        # SQLAlchemy could not roll back the savepoint around one whose release has failed.
        nested = connection.get_nested_transaction()
        if nested is not None and not nested.is_active:
            nested.close()
    if not (record.finished or record.discarded) and session.in_transaction():
        unstored = record.count_unstored() > 0 if ask else record.may_have_written
        record.discarded = unstored or has_pending_changes(session)
