"""One session of a request: its options, what it may have forgotten, and its commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._sessions.factory import SessionFactory
from ._sessions.finishing import Call, commit, tells_of_commit
from ._sessions.options import AUTOCOMMIT, NO_OPTIONS, TransactionOptions
from ._sessions.pending import has_pending_changes
from ._sessions.record import Record
from ._sessions.session import AnySession, NativeSession, sync_session
from ._sessions.shared import SharedState
from .exceptions import (
    AfterCommitError,
    PartialCommitError,
    ReadOnlySessionError,
    TransactionOptionsError,
    UncommittedChangesError,
)


@dataclass(eq=False, slots=True)
class Member:
    """A session of the request."""

    name: str
    factory: SessionFactory
    session: AnySession
    inner: NativeSession  # that does the work
    record: Record

    @property
    def state(self) -> SharedState:
        """What the sessions of its database share."""
        return self.record.state

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


def set_options(member: Member, options: TransactionOptions) -> None:
    """Have the session's transaction ask something of the server.

    Raises:
        TransactionOptionsError: the options cannot apply (any more).
    """
    record, name = member.record, member.state.name
    if record.options not in (NO_OPTIONS, options):
        raise TransactionOptionsError(
            f"transactional({name!r}) was asked for twice in one request, with {record.options} "
            f"and with {options}. A request has one transaction for a database: declare it once, "
            "with the options that it needs."
        )
    if record.connections and record.options != options:
        raise TransactionOptionsError(
            f"The transaction on database {name!r} has begun: an earlier dependency has used the "
            f"session, and {options} can no longer apply. Declare the transaction first, in the "
            f"route's or router's dependencies=[Depends(transactional({name!r}, ...))]."
        )
    member.factory.support(options)
    record.options = options


def check_nothing_forgotten(call: Call, member: Member) -> None:
    """Refuse a success while something that was written waits for a commit.

    Raises:
        UncommittedChangesError: through `get_db`.
        ReadOnlySessionError: through `reader`.
    """
    record, name = member.record, member.state.name
    record.check_discarded()
    if record.commits or not member.inner.in_transaction():
        return
    pending = has_pending_changes(member.inner)
    if record.options is AUTOCOMMIT:
        if pending:
            raise ReadOnlySessionError(
                f"Changes wait in the session from reader({name!r}), which only reads. Depend on "
                f"transactional({name!r}) to write."
            )
        return
    if pending or _leaves_unstored(call, member):
        raise UncommittedChangesError(
            f"The request wrote to database {name!r} through get_db({name!r}) and returned "
            f"without a commit. Depend on transactional({name!r}), which commits before "
            "the response, or call commit() or rollback() yourself."
        )


def _leaves_unstored(call: Call, member: Member) -> bool:
    if not member.record.work.is_worth_asking:
        return False
    answer: list[int] = []
    call(member.session, lambda _: answer.append(member.record.count_unstored()))
    return answer[0] > 0


def flush_and_prepare(session: AnySession) -> None:
    """Do before a first COMMIT what can be refused, and find out what there is to store."""
    inner = sync_session(session)
    if inner.in_transaction():
        inner.flush()
        inner.sqlnative.prepare()


def commit_member(
    call: Call, member: Member, earlier: Sequence[Member], later: Sequence[Member]
) -> None:
    """Commit one of the request's databases.

    Raises:
        PartialCommitError: some have stored something, and others that were to will not.
    """
    record = member.record
    stores = bool(earlier) and member.stores
    try:
        call(member.session, commit)
    except Exception as error:
        stored = [each.state.name for each in earlier if each.record.stored]
        if isinstance(error, AfterCommitError):
            # It is stored itself; those after it are not.
            waiting = [each for each in later if each.record.may_have_written]
            if record.stored and waiting:
                names = (*stored, member.state.name)
                raise PartialCommitError(names, waiting[0].state.name) from error
        elif stored and (stores or record.stored):
            raise PartialCommitError(tuple(stored), member.state.name) from error
        raise
