"""The session class: every use of the database passes one of its methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias, cast

from sqlalchemy import Connection, Sequence, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from .._drivers.statements import writes
from .._drivers.transactions import begin, begin_before_savepoint
from ..exceptions import ReadOnlySessionError
from .options import AUTOCOMMIT
from .pending import has_pending_changes
from .record import Record
from .transaction import BegunTransaction, depth_of

AnySession: TypeAlias = Session | AsyncSession


# Since SQLAlchemy 2.1 a session sets options itself; with an engine that has them each connection
# and statement costs more.
TAKES_OPTIONS: Final = "execution_options" in inspect.signature(Session.__init__).parameters


class NativeSession(Session):
    """A `Session` that notes what it lets through, and says what a COMMIT has done.

    It stands behind the application's own session class, nearest to SQLAlchemy's: an override of
    the application's runs first, and what it calls by `super()` passes here.
    """

    sqlnative: Record

    # -- ways in ---------------------------------------------------------------------------

    def execute(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Let a statement through; loads, lazy ones too, come this way."""
        record = self.sqlnative
        record.check_usable()
        if record.options is AUTOCOMMIT and writes(statement):
            raise record.state.error(ReadOnlySessionError)  # now: nothing undoes it
        record.executing = True
        try:
            result = super().execute(statement, *args, **options)
        except Exception as error:
            record.fails(error)
            raise
        finally:
            record.executing = False
        record.let_through(result, statement)
        return result

    def scalars(self, *args: Any, **options: Any) -> Any:
        """Execute, and return scalars."""
        return self.execute(*args, **options).scalars()

    def scalar(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Execute, and return a scalar."""
        if isinstance(statement, Sequence):  # has no result
            with self._way_in():
                return super().scalar(statement, *args, **options)
        return self.execute(statement, *args, **options).scalar()

    def connection(self, *args: Any, **options: Any) -> Connection:
        """Hand out a connection, over which anything may be sent."""
        with self._way_in() as record:
            connection = super().connection(*args, **options)
            begin(connection)
        record.work.handed_out = True
        if record.options is AUTOCOMMIT:
            event.listen(connection, "before_cursor_execute", record.state.refuse_writes)
        return connection

    def flush(self, *args: Any, **options: Any) -> None:
        """Send pending changes. SQLAlchemy calls this before each statement."""
        record = self.sqlnative
        if record.options is AUTOCOMMIT and has_pending_changes(self):
            raise record.state.error(ReadOnlySessionError)
        if record.loop_thread is not None and has_pending_changes(self):
            record.check_thread()
        looked, record.committing = record.committing, False
        executing, record.executing = record.executing, True
        try:
            super().flush(*args, **options)
        except Exception as error:
            record.fails(error)
            raise
        finally:
            record.executing = executing
        if looked:  # objects of a listener's, after the last look
            record.check_committable()
            record.committing = True

    def bulk_save_objects(self, *args: Any, **options: Any) -> None:
        """Insert or update."""
        self._write(super().bulk_save_objects, *args, **options)

    def bulk_insert_mappings(self, *args: Any, **options: Any) -> None:
        """Insert."""
        self._write(super().bulk_insert_mappings, *args, **options)

    def bulk_update_mappings(self, *args: Any, **options: Any) -> None:
        """Update."""
        self._write(super().bulk_update_mappings, *args, **options)

    def _write(self, work: Callable[..., None], *args: Any, **options: Any) -> None:
        with self._way_in() as record:
            if record.options is AUTOCOMMIT:
                raise record.state.error(ReadOnlySessionError)
            record.work.wrote = True
            work(*args, **options)

    @contextmanager
    def _way_in(self) -> Generator[Record]:
        record = self.sqlnative
        record.check_usable()
        executing, record.executing = record.executing, True
        try:
            yield record
        except Exception as error:
            record.fails(error)
            raise
        finally:
            record.executing = executing

    # What a background task calls first, without asking for a connection: SQLAlchemy would refuse
    # a closed session too, but its message knows no remedy.

    def add(self, *args: Any, **options: Any) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().add(*args, **options)

    def delete(self, *args: Any, **options: Any) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().delete(*args, **options)

    def merge(self, *args: Any, **options: Any) -> Any:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        return super().merge(*args, **options)

    def refresh(self, *args: Any, **options: Any) -> None:
        """Refuse a finished session."""
        self.sqlnative.check_unfinished()
        super().refresh(*args, **options)

    # -- ways out --------------------------------------------------------------------------

    def begin(self, nested: bool = False) -> SessionTransaction:
        """Begin a transaction, or a savepoint."""
        record = self.sqlnative
        record.check_unfinished()
        for connection in record.connections if nested else ():
            begin_before_savepoint(connection)
        transaction = super().begin(nested)
        if not nested:
            return self._begun(transaction)
        record.work.savepoint_begins(depth_of(transaction), record.connections)
        return transaction

    def _begun(self, transaction: SessionTransaction) -> SessionTransaction:
        record = self.sqlnative
        if record.begun is None or record.begun.transaction is not transaction:
            end_streams = functools.partial(record.end_results, streams_only=True)
            record.begun = BegunTransaction(self, transaction, end_streams)
        return cast("SessionTransaction", record.begun)

    def get_transaction(self) -> SessionTransaction | None:
        """Return the transaction, if one has begun."""
        transaction = super().get_transaction()
        if transaction is None:
            return None
        return self._begun(transaction)

    def commit(self) -> None:
        """Commit as SQLAlchemy does: usable? flush; committable? COMMIT; what does it mean?

        Raises:
            TransactionAbortedError: an error inside the transaction was swallowed.
            CommitOutcomeUnknownError: the connection was lost during COMMIT.
            AfterCommitError: what ran after the COMMIT has failed.
        """
        record = self.sqlnative
        record.check_unfinished()
        if record.connections:
            record.check_thread()
        record.committed = False
        try:
            while self.in_nested_transaction():
                cast("SessionTransaction", self.get_nested_transaction()).commit()
            if self.dispatch.before_commit:
                self._commit_after_listeners()
            else:
                if self.in_transaction():
                    _look_last(self)  # nothing comes between this and COMMIT
                super().commit()
        except Exception as error:
            record.commit_failed(error)
            raise

    def _commit_after_listeners(self) -> None:
        # A listener of the session's own runs after those of its classes, and the newest last.
        event.listen(self, "before_commit", _look_last)
        try:
            super().commit()
        finally:
            event.remove(self, "before_commit", _look_last)

    def rollback(self) -> None:
        """Roll back."""
        record = self.sqlnative
        if record.connections:
            record.check_thread()
        record.end_results(streams_only=True)
        super().rollback()

    # They roll back too, and a `with session:` is not meant that way.

    def close(self) -> None:
        """Close, and note what is thrown away."""
        self._note_discarded(ask=True)
        super().close()

    def reset(self) -> None:
        """Reset, and note what is thrown away."""
        self._note_discarded(ask=True)
        super().reset()

    def invalidate(self) -> None:
        """Close and give the connection up, and note what is thrown away."""
        self._note_discarded(ask=False)  # over a connection that may hang
        super().invalidate()

    def _note_discarded(self, *, ask: bool) -> None:
        record = self.sqlnative
        if record.connections:
            record.check_thread()
        record.end_results()
        record.closed = True
        if record.finished or record.discarded or not self.in_transaction():
            return
        unstored = record.count_unstored() > 0 if ask else record.may_have_written
        record.discarded = unstored or has_pending_changes(self)


def sync_session(session: AnySession) -> NativeSession:
    """Return the session that does the work: an `AsyncSession` is a proxy for one."""
    return cast("NativeSession", getattr(session, "sync_session", session))


def record_of(session: AnySession) -> Record:
    """Return the record of a session that `native_class` made."""
    return sync_session(session).sqlnative


def _look_last(session: NativeSession) -> None:
    """Refuse to commit what cannot be: after every listener, and right before COMMIT."""
    record = session.sqlnative
    # First what commit() would flush after this, with listeners that may swallow an error.
    session.flush()
    record.check_committable()
    record.end_results(streams_only=True)
    record.committing = True
