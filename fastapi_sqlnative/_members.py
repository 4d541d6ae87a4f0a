"""One session of a request: its options, what it may have forgotten, and its commit."""

from __future__ import annotations

from collections.abc import Sequence

from ._sessions.finishing import Call, commit, tells_of_commit
from ._sessions.options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions
from ._sessions.pending import has_pending_changes
from ._sessions.session import AnySession, sync_session
from .exceptions import (
    AfterCommitError,
    PartialCommitError,
    ReadOnlySessionError,
    TransactionOptionsError,
    UncommittedChangesError,
)


class Member:
    """A session of the request, with what does its work, what it remembers, and its database."""

    __slots__ = ("inner", "record", "session", "state")

    def __init__(self, session: AnySession) -> None:
        self.session = session
        self.inner = sync_session(session)
        self.record = self.inner.sqlnative
        self.state = self.record.state

    @property
    def waits(self) -> bool:
        """Tell whether finishing it may wait: for the database, or for code of the application."""
        return bool(
            self.record.asked
            or has_pending_changes(self.inner)
            or self.state.overridden
            or (self.record.commits and tells_of_commit(self.inner))
        )

    @property
    def stores(self) -> bool:
        """Tell whether its commit may store something."""
        return self.record.may_have_written or has_pending_changes(self.inner)

    def set_options(self, options: TransactionOptions) -> None:
        """Have the session's transaction ask something of the server, while it still can."""
        record, name = self.record, self.state.name
        if record.options not in (NO_OPTIONS, options):
            raise TransactionOptionsError(
                f"transactional({name!r}) was asked for twice in one request, with "
                f"{record.options} and with {options}. A request has one transaction for a "
                "database: declare it once, with the options that it needs."
            )
        if record.connections and record.options != options:
            raise TransactionOptionsError(
                f"The transaction on database {name!r} has begun: an earlier dependency has used "
                f"the session, and {options} can no longer apply. Declare the transaction first, "
                f"in the route's or router's dependencies=[Depends(transactional({name!r}, ...))]."
            )
        options.check_known_to(self.state.root.dialect, name)
        record.options = options

    def check_nothing_forgotten(self, call: Call) -> None:
        """Refuse a success while something that was written waits for a commit."""
        record, name = self.record, self.state.name
        record.check_discarded()
        if record.commits or not self.inner.in_transaction():
            return
        pending = has_pending_changes(self.inner)
        if record.options is AUTOCOMMIT:
            if pending:
                raise self.state.error(ReadOnlySessionError)
        elif pending or self._leaves_unstored(call):
            raise UncommittedChangesError(
                f"The request wrote to database {name!r} through get_db({name!r}) and returned "
                f"without a commit. Depend on transactional({name!r}), which commits before "
                "the response, or call commit() or rollback() yourself."
            )

    def _leaves_unstored(self, call: Call) -> bool:
        answer = [0]
        if self.record.work.is_worth_asking:
            call(self.session, lambda _: answer.append(self.record.count_unstored()))
        return answer[-1] > 0

    def commit(self, call: Call, earlier: Sequence[Member], later: Sequence[Member]) -> None:
        """Commit, after some of the request's databases and before others."""
        name, record = self.state.name, self.record
        stores = bool(earlier) and self.stores
        try:
            call(self.session, commit)
        except Exception as error:
            stored = tuple(each.state.name for each in earlier if each.record.stored)
            if isinstance(error, AfterCommitError):
                # It is stored itself; those after it are not.
                waiting = [each for each in later if each.record.may_have_written]
                if record.stored and waiting:
                    raise PartialCommitError((*stored, name), waiting[0].state.name) from error
            elif stored and (stores or record.stored):
                raise PartialCommitError(stored, name) from error
            raise


def flush_and_prepare(session: AnySession) -> None:
    """Do before a first COMMIT what can be refused, and find out what there is to store."""
    inner = sync_session(session)
    if inner.in_transaction():
        inner.flush()
        inner.sqlnative.prepare()
