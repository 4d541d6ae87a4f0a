"""The sessions of one request, each with what is known of it, and how each is committed."""

from __future__ import annotations

from collections.abc import Sequence

from . import exceptions
from ._sessions import finishing
from ._sessions.finishing import commit_is_observed
from ._sessions.options import AUTOCOMMIT
from ._sessions.session import AnySession, may_store, sync_session
from ._sessions.work import has_pending_changes


class Member:
    """A session of the request, with its synchronous session, its record and its database."""

    __slots__ = ("asked_again", "inner", "record", "session", "state")

    def __init__(self, session: AnySession) -> None:
        self.session = session
        self.inner = sync_session(session)
        self.record = self.inner.sqlnative
        self.state = self.record.state
        self.asked_again = False  # so that others than the first have it

    def check_nothing_forgotten(self) -> None:
        """Refuse to report success if the session leaves changes uncommitted."""
        record, name = self.record, self.state.name
        record.check_discarded()
        if record.commits or not self.inner.in_transaction():
            return
        pending = has_pending_changes(self.inner)
        if record.options is AUTOCOMMIT:
            if pending:
                raise self.state.error(exceptions.ReadOnlySessionError)
        elif pending or self._leaves_unstored():
            raise exceptions.UncommittedChangesError(
                f"The request wrote to database {name!r} through get_db({name!r}) and returned "
                f"without a commit. Depend on transactional({name!r}), which commits before "
                "the response, or call commit() or rollback() yourself."
            )

    def _leaves_unstored(self) -> bool:
        if not self.record.may_have_written:
            return False
        answer = [0]

        def count(_: AnySession) -> None:
            self.record.end_results()  # SQLite counts the changes of a statement at its end
            answer.append(self.record.count_unstored())

        finishing.perform(self.session, count)
        return answer[-1] > 0

    def commit(self, others: Sequence[Member]) -> None:
        """Commit, as one of the request's databases.

        A session with nothing to store is committed as well, in case we have missed a write, but
        losing its connection doesn't fail the request.
        """
        # Not idle if there are listeners, which may still write.
        marked = [each for each in others if each.record.commits]
        idle = bool(marked) and not (may_store(self.inner) or commit_is_observed(self.inner))
        try:
            finishing.perform(self.session, finishing.commit)
        except Exception as error:
            if idle and (
                getattr(error, "connection_invalidated", False) or isinstance(error, OSError)
            ):
                return
            kept, lost = others, [] if idle and not self.record.stored else [self]
            if isinstance(error, exceptions.AfterCommitError):
                # This database did commit; the ones after it won't.
                kept, lost = [*others, self], [e for e in marked if e.record.may_have_written]
            check_partial(error, kept, lost)
            raise


def check_partial(error: Exception, kept: Sequence[Member], lost: Sequence[Member]) -> None:
    """Refuse to report a failure as if nothing was stored, when another database has stored."""
    names = tuple(each.state.name for each in kept if each.record.stored)
    if names and lost:
        raise exceptions.PartialCommitError(names, lost[0].state.name) from error


def flush_and_prepare(session: AnySession) -> None:
    """Flush, and refuse what cannot be committed, before the first COMMIT."""
    inner = sync_session(session)
    if inner.in_transaction():
        inner.flush()
        if not inner.is_active:
            inner.commit()  # raises: an earlier flush has failed
        inner.sqlnative.prepare()
