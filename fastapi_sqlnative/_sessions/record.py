"""What one session has let through, and what follows for its use and its commit.

Everything the rules on lying and forgotten commits (5, 6, 7) and on finished sessions (11) need to
know stands here. `session` keeps it up to date.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .. import exceptions
from .._drivers import failures, transactions
from .holders import Holder, tell_holders
from .options import AUTOCOMMIT, TransactionOptions, engine_with
from .shared import SharedState
from .transaction import BegunTransaction
from .work import Work


class Record(Holder):
    """The memory of one session, from its last commit or rollback on.

    It belongs to the session and ends with it. An exception is kept until the transaction ends and
    no longer: its traceback holds the connection.

    Args:
        state: what the sessions of the database share.
        options: what the session's transactions ask of the server.
        loop_thread: the thread on which the session must not block, `None` for anywhere.
    """

    __slots__ = (
        "__weakref__",
        "asked",
        "autocommits",
        "begun",
        "closed",
        "commits",
        "committed",
        "committing",
        "discarded",
        "ending",
        "engines",
        "failed",
        "finished",
        "joined",
        "loop_thread",
        "open_results",
        "options",
        "rolled_back",
        "stored",
        "stores_on",
        "streamed",
        "work",
    )

    def __init__(
        self, state: SharedState, options: TransactionOptions, loop_thread: int | None
    ) -> None:
        super().__init__(state)
        self.options = options
        self.loop_thread = loop_thread
        self.commits = False  # whoever opened the session commits it at the end
        self.finished = False  # its time is over
        self.ending = False  # though an override of the application's may still use it
        self.begun: BegunTransaction | None = None  # that was handed out
        self.closed = False  # by the application
        self.discarded = False  # and over work that was not stored
        self.committed = False  # the last COMMIT has got through
        self.stored = False  # a COMMIT has stored something, or may have
        # As the state's, for engines that may have been made for this session alone.
        self.engines: dict[tuple[Engine, TransactionOptions], Engine] = {}
        self.open_results: list[Any] | None = None  # not read to their end
        self._begin()

    def _begin(self) -> None:
        self.asked = False  # for an engine: there is a connection, or somebody waits for one
        self.work = Work()
        self.autocommits = False  # each statement is stored at once
        self.joined = False  # a transaction that is not the session's own
        self.stores_on = 1  # so many connections, as far as it is known before COMMIT
        self.committing = False  # nothing comes between now and COMMIT
        self.failed: BaseException | None = None
        self.rolled_back: BaseException | None = None  # by the database, with this failure
        self.streamed = False  # a result that may fail while it is read

    def begun_on(self, connection: Connection) -> None:
        """Note a connection that the transaction runs on from now on.

        Raises:
            TransactionOptionsError: its engine commits each statement by itself, so that there
                is no transaction to commit or roll back.
        """
        self.take(connection)
        # With a savepoint on it from the beginning the transaction around it is somebody else's.
        self.joined = self.joined or connection.in_nested_transaction()
        if connection.dialect is not self.state.root.dialect:
            self.state.listen(connection.dialect)
        if self.options is not AUTOCOMMIT:  # a reader writes nothing
            self.autocommits = self.autocommits or transactions.autocommits(connection)
        if self.commits and self.autocommits:
            raise self.state.error(exceptions.TransactionOptionsError)

    def engine_for(self, engine: Engine) -> Engine:
        """Return an engine that shares the pool of this one, and sets the session's options.

        A session sees one engine for one engine, or it would open a second connection.
        """
        known = self.state.engines if engine is self.state.root else self.engines
        found = known.get((engine, self.options))
        # Another thread may have been faster.
        return found or known.setdefault((engine, self.options), engine_with(engine, self.options))

    def will_commit(self) -> None:
        """Note that whoever opened the session commits it at the end."""
        self.commits = True
        if any(map(transactions.autocommits, self.connections)):
            raise self.state.error(exceptions.TransactionOptionsError)

    def forget(self) -> None:
        """Start anew: the session's transaction has ended, and it holds no connection."""
        self.give_back()
        self.begun = None
        if self.finished:
            self.failed = self.rolled_back = None
        else:
            self._begin()

    # -- may the session be used here and now? ---------------------------------------------

    def check_usable(self) -> None:
        """Refuse a session that is finished or stopped, or that would block the event loop."""
        self.check_unfinished()
        self.state.check_running()
        self.check_thread()

    def check_unfinished(self) -> None:
        """Refuse a session whose time is over."""
        if self.finished and not self.ending:
            raise self.state.error(exceptions.SessionFinishedError)

    def check_thread(self) -> None:
        """Refuse to wait for the database on the event loop's own thread."""
        if self.loop_thread is not None and threading.get_ident() == self.loop_thread:
            raise self.state.error(exceptions.BlockingSessionError)

    def check_discarded(self) -> None:
        """Refuse a success when a close() has thrown away what was to be stored."""
        if self.discarded:
            raise self.state.error(exceptions.UncommittedChangesError)

    # -- what was let through --------------------------------------------------------------

    def let_through(self, result: Any, statement: Any) -> None:
        """Note what a statement may have done, and whether its result is still being read."""
        cursor_result = getattr(result, "raw", None) or result
        context = getattr(cursor_result, "context", None)
        if context is None:
            # The ORM's bulk statements, and what a listener of the application answered with.
            self.work.wrote = self.work.wrote or getattr(statement, "is_dml", True)
            return
        self.work.note(self.state.statement_of(context), result, context, self.connections)
        if cursor_result.cursor is not None and transactions.reads_later(context):
            self.streamed = True
            still_open = [each for each in self.open_results or () if each.cursor is not None]
            self.open_results = [*still_open, cursor_result]

    def end_results(self, *, streams_only: bool = False) -> None:
        """Close what is still read: at COMMIT or ROLLBACK streams, at the end everything.

        The connection goes to others then; a stream's rows wait on the server until that.
        """
        for result in self.open_results or ():
            context = result.context
            if streams_only and not context.execution_options.get("stream_results"):
                continue
            self.state.readers[context.root_connection] = self
            # One on a lost connection fails, and one that was read meanwhile has no cursor.
            with contextlib.suppress(context.dialect.loaded_dbapi.Error, OSError):
                context.cursor.close()

    def hears(self, error: BaseException) -> None:
        """Note a failure on one of the session's connections."""
        if not isinstance(error, Exception):
            return  # a cancellation costs the connection
        self.failed = self.failed or error
        if self.may_have_written and any(
            transactions.has_rolled_back(connection, error, before_commit=self.committing)
            for connection in self.connections
        ):
            self.rolled_back = error

    def fails(self, error: Exception) -> None:
        """Note an error that leaves the session.

        Raises:
            sqlalchemy.exc.OperationalError: in place of what SQLAlchemy does not know, when a
                driver cannot connect or waits no longer.
        """
        self.hears(error)
        self.state.sign(error)
        if isinstance(error, PoolTimeoutError) and not hasattr(error, "__notes__"):
            tell_holders(self.state, error)
        if (recognized := failures.recognize(error)) is not None:
            raise self.state.sign(recognized) from error

    @property
    def may_have_written(self) -> bool:
        """Tell whether a commit may store something, as far as can be told without asking."""
        return self.work.may_have_written and not self.options.read_only

    @property
    def has_lost_nothing(self) -> bool:
        """Tell whether a connection is gone that had nothing to store."""
        return not self.may_have_written and any(each.invalidated for each in self.connections)

    @property
    def has_stored(self) -> bool:
        """Tell whether something is stored, or may be, also by a COMMIT that is on its way."""
        return self.stored or (self.may_have_written and (self.committing or self.autocommits))

    def count_unstored(self, *, if_lost: bool | None = None) -> int:
        """Count the connections on which a COMMIT now would change something."""
        if not self.may_have_written:
            return 0
        wrote = self.work.wrote and self.rolled_back is None
        if_lost = wrote if if_lost is None else if_lost
        return sum(
            self.work.is_unstored(each, before, wrote=wrote, if_lost=if_lost, joined=self.joined)
            for each, before in self.connections.items()
        )

    def prepare(self) -> None:
        """Refuse what cannot be committed, and find out whether what may have written has.

        Other databases depend on it: this one may fail when they have committed.
        """
        self.check_committable()
        if self.may_have_written and not self.work.wrote:
            self.work.unknown = self.count_unstored(if_lost=True) > 0
            self.work.handed_out = False

    # -- may it be committed, and what did the COMMIT do? ----------------------------------

    def check_committable(self) -> None:
        """Refuse to commit what the server has given up: it would answer with a silent ROLLBACK.

        Raises:
            TransactionAbortedError: an error inside the transaction was swallowed.
        """
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
        """Say what a failure of `commit()` means, where the error itself does not.

        Raises:
            AfterCommitError: the COMMIT has got through.
            CommitOutcomeUnknownError: it may have.
        """
        if self.committed:
            raise self.state.error(exceptions.AfterCommitError) from error
        self.state.sign(error)
        if not self.committing:
            return
        if self.rolled_back is not None:
            raise self.state.error(exceptions.TransactionAbortedError) from self.rolled_back
        # With several engines the first may have stored something when the second says no.
        ended = sum(not each.in_transaction() for each in self.connections)
        unknown = self.may_have_written and (
            (ended > 1 and self.stores_on > 1)
            or any(failures.leaves_outcome_unknown(error, each) for each in self.connections)
        )
        for connection in self.connections:
            if not failures.is_servers_word(error, connection):
                # SQLAlchemy would keep one that may still be in its transaction.
                connection.invalidate()
        if unknown:
            self.stored = True
            raise self.state.error(exceptions.CommitOutcomeUnknownError) from error
