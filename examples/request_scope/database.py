"""The session that passes the scope to the server, and a table that records it."""

from sqlalchemy import Connection, TextClause, event, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, SessionTransaction, mapped_column

from examples.request_scope.scope import RequestScope


class ScopedSession(Session):
    """A session whose transactions carry the scope in its `info`, if there is one."""


@event.listens_for(ScopedSession, "after_begin")
def _tell_the_server(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    scope: RequestScope | None = session.info.get("scope")
    if scope is None or transaction.nested:
        return
    told = {
        "application_name": scope.trace,  # shown in pg_stat_activity and the log
        "app.trace": scope.trace,
        "app.user": scope.user.name,
        "app.tenant": scope.user.tenant,
    }
    # `true`: until the transaction ends. The connection's next user does not inherit it.
    connection.execute(
        select(*(func.set_config(name, value, True) for name, value in told.items()))
    )


def setting(name: str) -> TextClause:
    """Read a transaction's setting, or NULL if it is not set, which the column refuses."""
    return text(f"nullif(current_setting('{name}', true), '')")  # '' once it was set


class Base(DeclarativeBase):
    """The base class of all models."""


class Change(Base):
    """A change; the server fills in who made it, and in which request."""

    __tablename__ = "request_scope_change"

    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]
    tenant: Mapped[str] = mapped_column(server_default=setting("app.tenant"))
    user: Mapped[str] = mapped_column(server_default=setting("app.user"))
    trace: Mapped[str] = mapped_column(server_default=setting("app.trace"))
