"""What waits in a session for a flush."""

from __future__ import annotations

from sqlalchemy import inspect
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import History


def has_pending_changes(session: Session) -> bool:
    """Tell whether a flush would send something."""
    # Whatever is added or changed begins a transaction: asking for one first is cheap.
    return session.in_transaction() and would_be_flushed(session)


def would_be_flushed(session: Session) -> bool:
    """Tell whether a session has changes that reach the database."""
    return bool(
        session.new
        or session.deleted
        or (
            session.identity_map.check_modified()
            and any(_would_be_sent(session, each) for each in session.dirty)
        )
    )


def _would_be_sent(session: Session, row: object) -> bool:
    """Tell whether a flush would send an object: not for attributes that no table keeps."""
    state = inspect(row)
    columns = {
        attribute.key
        for attribute in state.mapper.column_attrs
        if any(getattr(each, "table", None) in state.mapper.tables for each in attribute.columns)
    } - state.unmodified
    related = {each.key for each in state.mapper.relationships if not each.viewonly}
    # Also what was deleted from the object, which has no value any more.
    return any(state.attrs[key].history.has_changes() for key in columns) or any(
        _relates(session, state.attrs[key].history) for key in related - state.unmodified
    )


def _relates(session: Session, history: History) -> bool:
    # A flush passes over objects that nobody has added to the session.
    return bool(history.deleted) or any(
        each is None or each in session for each in history.added or ()
    )
