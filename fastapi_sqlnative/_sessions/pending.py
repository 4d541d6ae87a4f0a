"""What waits in a session for a flush."""

from __future__ import annotations

from sqlalchemy import inspect
from sqlalchemy.orm import Session


def has_pending_changes(session: Session) -> bool:
    """Tell whether a flush would send something."""
    # Whatever is added or changed begins a transaction: asking for one first is cheap.
    return session.in_transaction() and would_be_flushed(session)


def would_be_flushed(session: Session) -> bool:
    """Tell whether a session has changes that reach the database."""
    return bool(
        session.new
        or session.deleted
        or (session.identity_map.check_modified() and any(map(_would_be_sent, session.dirty)))
    )


def _would_be_sent(row: object) -> bool:
    """Tell whether a flush would send an object: not for attributes that no table keeps."""
    state = inspect(row)
    stored = {
        attribute.key
        for attribute in state.mapper.column_attrs
        if any(getattr(each, "table", None) in state.mapper.tables for each in attribute.columns)
    } | {each.key for each in state.mapper.relationships if not each.viewonly}
    # Also what was deleted from the object, which has no value any more.
    return any(state.attrs[key].history.has_changes() for key in stored - state.unmodified)
