"""The pending changes of a session."""

from __future__ import annotations

from sqlalchemy import inspect
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import History


def has_pending_changes(session: Session) -> bool:
    """Return whether a flush would send something."""
    # Every addition or change begins a transaction, and checking for one first is cheap.
    return session.in_transaction() and would_be_flushed(session)


def would_be_flushed(session: Session) -> bool:
    """Return whether a session has changes that a flush would send."""
    return bool(
        session.new
        or session.deleted
        or (
            session.identity_map.check_modified()
            and any(_would_be_sent(session, each) for each in session.dirty)
        )
    )


def _would_be_sent(session: Session, row: object) -> bool:
    """Return whether a flush would send an object, ignoring attributes without a column."""
    state = inspect(row)
    columns = {
        attribute.key
        for attribute in state.mapper.column_attrs
        if any(map(state.mapper.persist_selectable.c.contains_column, attribute.columns))
    } - state.unmodified
    related = {each.key for each in state.mapper.relationships if not each.viewonly}
    # History also covers deleted attributes, which have no value anymore.
    return any(state.attrs[key].history.has_changes() for key in columns) or any(
        _relates(session, state.attrs[key].history) for key in related - state.unmodified
    )


def _relates(session: Session, history: History) -> bool:
    # A flush skips related objects that are not in the session.
    return bool(history.deleted) or any(
        each is None or each in session for each in history.added or ()
    )
