"""The record of one session, for rules 5, 6, 7 and 11; `session` keeps it up to date."""

import threading
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, event, exc

from .. import exceptions
from .._drivers import failures, results, transactions
from .._drivers.statements import writes
from .holders import UNIT, Holder, empty, report_holders
from .options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions, engine_with
from .shared import Engines
from .transaction import BegunTransaction, Work


@dataclass(eq=False, repr=False, slots=True)
class Record(Holder):
    """What one session has done since its last commit or rollback.

    It belongs to the session and lives as long. Exceptions are kept only until the transaction
    ends, because their tracebacks reference the connection.
    """

    # Refers weakly to the application's session: `async_session()` may find one that is equal.
    given: Any = None
    loop_thread: int | None = None  # that the session must not block; None: it may run anywhere
    commits: bool = False  # our code commits the session at the end
    finished: bool = False  # the request or block has ended
    shielded: bool = False  # from cancellation, while it is finished
    context: Any = None  # of the threads that finish it beside an asynchronous one
    ending: bool = False  # an override of close() and the like may still use it
    begun: BegunTransaction | None = None  # the one handed out by begin()
    discarded: bool = False  # closed with unstored changes
    committed: bool = False  # the last COMMIT succeeded
    stored: bool = False  # a COMMIT has stored something, or may have
    # Like `state.engines`, for engines that may exist only for this session.
    engines: Engines = field(default_factory=empty)
    # From here on, about one transaction.
    asked: bool = False  # for an engine: it has a connection or waits for one
    work: Work = field(default_factory=Work)
    joined: bool = False  # the transaction is not the session's own
    stores_on: int = 1  # the number of connections with changes, counted before COMMIT
    committing: bool = False  # the next thing to run is COMMIT
    failed: BaseException | None = None
    rolled_back: BaseException | None = None  # the failure that made the database do so
    streamed: bool = False  # a result may fail while it is read

    def begun_on(self, connection: Connection) -> None:
        """Record a connection that has joined the transaction, unless there is none to commit."""
        if not self.connections:
            self.held_since = monotonic()
        self.connections[connection] = transactions.changes(connection)
        self.state.holders[connection] = self
        # If it starts inside a savepoint, someone else owns the transaction around it.
        self.joined = self.joined or connection.in_nested_transaction()
        if connection.dialect is not self.state.root.dialect:
            self.state.listen(connection.dialect)
        if self.options is not AUTOCOMMIT:  # a reader writes nothing
            self.autocommits = self.autocommits or transactions.autocommits(connection)
        if self.commits and self.autocommits:
            raise self.state.error(exceptions.TransactionOptionsError)

    def engine_for(self, engine: Engine) -> Engine:
        """Return an engine that shares this one's pool and sets the session's options.

        It is cached, because a different engine would make the session open a second connection.
        """
        known = self.state.engines if engine is self.state.root else self.engines
        found = known.get((engine, self.options))
        # setdefault, because another thread may have added one meanwhile.
        return found or known.setdefault((engine, self.options), engine_with(engine, self.options))

    def will_commit(self, options: TransactionOptions) -> None:
        """Mark the session for the commit at the end, unless it is too late for the options."""
        name = self.state.name
        if options not in (NO_OPTIONS, self.options):
            if self.options != NO_OPTIONS:
                raise exceptions.TransactionOptionsError(
                    f"transactional({name!r}) was asked for twice in one request, with "
                    f"{self.options} and with {options}. A request has one transaction per "
                    "database: declare it once, with the options that it needs."
                )
            if self.connections:
                raise exceptions.TransactionOptionsError(
                    f"The transaction on database {name!r} has begun: an earlier dependency has "
                    f"used the session, and {options} can no longer apply. Declare the "
                    "transaction first, in the route's or router's "
                    f"dependencies=[Depends(transactional({name!r}, ...))]."
                )
            options.check_known_to(self.state.root.dialect, name)
            self.options = options
        self.commits = True
        if any(map(transactions.autocommits, self.connections)):
            raise self.state.error(exceptions.TransactionOptionsError)

    def hand_out(self, connection: Connection) -> None:
        """Record that anything may be sent over a connection from now on."""
        self.work.handed_out = True
        event.listen(connection, "commit", self.state.note_commit)
        if connection.dialect.name == "sqlite":
            event.listen(connection, "savepoint", transactions.begin_before_savepoint)
        if self.options is AUTOCOMMIT:
            event.listen(connection, "before_cursor_execute", self.state.refuse_writes)

    def discard_connections(self) -> None:
        """Close connections that the session failed to close: SQLAlchemy no longer tracks them."""
        for connection in tuple(self.connections):
            if not connection.closed:
                connection.invalidate()
                connection.close()
        self.forget()

    def forget(self) -> None:
        """Reset the record after a transaction, when the session holds no connection."""
        self.begun = self.failed = self.rolled_back = None
        if not self.finished:
            self.work, self.stores_on = Work(), 1
            self.asked = self.autocommits = self.joined = False
            self.committing = self.streamed = False
        self.release()  # last, because the loop's thread may look at once whether this is idle

    # -- may the session be used here and now? ---------------------------------------------

    def check_usable(self) -> None:
        """Refuse a session that is finished, whose database is stopped, or that would block."""
        if self.finished or self.state.stopping or self.loop_thread is not None:
            self.check_unfinished()
            self.state.check_running()
            self.check_thread()

    def check_unfinished(self) -> None:
        if self.finished and not self.ending:
            raise self.state.error(exceptions.SessionFinishedError)

    def check_thread(self) -> None:
        if self.loop_thread is not None and threading.get_ident() == self.loop_thread:
            raise self.state.error(exceptions.BlockingSessionError)

    def check_discarded(self) -> None:
        """Refuse to report success after a close() has discarded changes."""
        if self.discarded:
            raise self.state.error(exceptions.UncommittedChangesError)

    # -- what it has done ------------------------------------------------------------------

    def note_result(self, result: Any, statement: Any) -> None:
        """Record what a statement may have done, and whether its result is still being read."""
        cursor_result = getattr(result, "raw", None) or result
        context = getattr(cursor_result, "context", None)
        if context is None:
            # The ORM's bulk statements, and results that a listener has substituted.
            self.work.wrote = self.work.wrote or not getattr(statement, "is_select", False)
            return
        self.work.note(self.state.statement_of(context), cursor_result, self.connections)
        if cursor_result.cursor is not None and results.reads_later(context):
            self.streamed = True
            self.note_open_result(cursor_result)

    def note_failure(self, error: BaseException) -> None:
        """Record a failure on one of the session's connections."""
        if not isinstance(error, Exception):
            return  # after a cancellation the connection is discarded anyway; the server may hang
        self.failed = self.failed or error
        if self.may_have_written and any(
            transactions.has_rolled_back(
                connection,
                error,
                count_before=None if self.work.defined else before,
                before_commit=self.committing,
            )
            for connection, before in self.connections.items()
        ):
            self.rolled_back = error
        if any(transactions.changes(each) > before for each, before in self.connections.items()):
            self.work.unknown = True  # SQLite keeps the rows before the one that failed

    def handle_error(self, error: Exception) -> None:
        """Record an error raised by a session method; wrap a driver's if SQLAlchemy did not."""
        self.note_failure(error)
        if self.autocommits and isinstance(error, exc.DBAPIError) and error.connection_invalidated:
            # What it has sent may be stored, and only the answer lost.
            self.work.wrote = self.work.wrote or writes(error.statement or "")
        self.tag(error)
        if isinstance(error, exc.TimeoutError) and not hasattr(error, "__notes__"):
            report_holders(self.state, error)
        if (recognized := failures.recognize(error)) is not None:
            self.tag(recognized)
            raise recognized from error

    @property
    def may_have_written(self) -> bool:
        """Return whether a commit may store something, judged without asking the server."""
        return self.work.may_have_written and not self.options.read_only

    @property
    def has_stored(self) -> bool:
        """Return whether something is or may be stored, counting a COMMIT in progress."""
        return self.stored or (self.may_have_written and (self.committing or self.autocommits))

    @property
    def unit(self) -> Any:
        """The request's unit of work; without one, the record stands for it."""
        return self.request.get(UNIT, self)

    def tag(self, error: Any) -> None:
        """Set on a foreign error the database's name, and whether its request has stored work."""
        error.database_name = self.state.name
        error.database_stored = self.unit.has_stored

    def count_unstored(self, *, if_lost: bool | None = None) -> int:
        """Count the connections on which a COMMIT would store something now."""
        if not self.may_have_written:
            return 0
        if self.work.prepared:
            return len(self.connections)
        wrote = self.work.wrote and self.rolled_back is None
        if_lost = wrote if if_lost is None else if_lost
        return sum(self._is_unstored(each, wrote, if_lost) for each in self.connections)

    def _is_unstored(self, connection: Connection, wrote: bool, if_lost: bool) -> bool:
        """Ask the server if unsure: `wrote` is the answer of a database that can't tell."""
        if not connection.in_transaction() or transactions.autocommits(connection):
            return False
        if transactions.is_lost(connection):
            return if_lost
        if connection.dialect.name == "sqlite":
            changed = transactions.changes(connection) != self.connections[connection]
            return (self.work.defined or changed) and transactions.is_open_on_sqlite(connection)
        if self.joined:
            # The server's answer would include the owner's work.
            doubtful = self.failed is not None
            return wrote and not transactions.is_aborted(connection, doubtful=doubtful)
        if connection.dialect.name != "postgresql":
            return wrote and transactions.is_open_on_mysql(connection)
        work = self.work
        found = transactions.would_store(connection, id_explained=work.undone, defined=work.defined)
        return if_lost if found is None else found

    def prepare(self) -> None:
        """Refuse an aborted transaction, and find out whether a possible write really was one.

        With several databases this must be known before the first of them commits.
        """
        self.check_committable()
        if self.may_have_written and not self.work.wrote:
            self.work.unknown = self.count_unstored(if_lost=True) > 0
            self.work.handed_out = False

    # -- may it be committed, and what did the COMMIT do? ----------------------------------

    def check_committable(self) -> None:
        """Refuse to commit an aborted transaction, whose COMMIT would be a silent ROLLBACK."""
        if not self.may_have_written:
            return
        if len(self.connections) > 1:
            self.stores_on = self.count_unstored()
        for connection in self.connections:
            transactions.surface_loss(connection)
        doubtful = self.failed is not None or self.work.handed_out or self.streamed
        if self.rolled_back is None and not any(
            transactions.is_aborted(connection, doubtful=doubtful)
            for connection in self.connections
        ):
            return
        cause = self.rolled_back or self.failed
        raise self.state.error(exceptions.TransactionAbortedError) from cause

    def commit_failed(self, error: Exception) -> None:
        """Raise the error that says what a failed `commit()` means, if `error` itself doesn't."""
        if self.committed:
            raise self.state.error(exceptions.AfterCommitError) from error
        # It is over, and has stored nothing unless its outcome is unknown.
        committing, self.committing = self.committing, False
        unknown = committing and self._leaves_unknown(error)
        self.stored = self.stored or unknown
        self.tag(error)
        if not committing:
            return
        # A COMMIT that the driver refuses by itself has another cause, such as another task.
        if self.rolled_back is not None and not isinstance(error, exc.DBAPIError):
            raise self.state.error(exceptions.TransactionAbortedError) from self.rolled_back
        for connection in self.connections:
            # SQLAlchemy would keep the connection, which may still be in its transaction.
            refused = failures.reported_by_server(error, connection)
            if not (refused and (self.joined or transactions.rolls_back(connection))):
                connection.invalidate()
        if unknown:
            raise self.state.error(exceptions.CommitOutcomeUnknownError) from error

    def _leaves_unknown(self, error: Exception) -> bool:
        # With several engines, the first may have committed before the second refused.
        ended = sum(not each.in_transaction() for each in self.connections)
        return self.may_have_written and (
            (ended > 1 and self.stores_on > 1)
            or any(failures.leaves_outcome_unknown(error, each) for each in self.connections)
        )
