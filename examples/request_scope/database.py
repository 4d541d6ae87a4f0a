"""The session that tells the server whose request it works for, and the table that remembers."""

from sqlalchemy import Connection, TextClause, event, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, SessionTransaction, mapped_column

from examples.request_scope.scope import RequestScope


class ScopedSession(Session):
    """Be a session whose transactions carry the scope in its `info`, where there is one."""


@event.listens_for(ScopedSession, "after_begin")
def _tell_the_server(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    scope: RequestScope | None = session.info.get("scope")
    if scope is None or transaction.nested:
        return
    told = {
        "application_name": scope.trace,  # pg_stat_activity and the log show it
        "app.trace": scope.trace,
        "app.user": scope.user.name,
        "app.tenant": scope.user.tenant,
    }
    # `true`: until the transaction ends. The next borrower of the connection has none of it.
    connection.execute(
        select(*(func.set_config(name, value, True) for name, value in told.items()))
    )


def setting(name: str) -> TextClause:
    """Read a setting of the transaction, and NULL where it has none: the column refuses that."""
    return text(f"nullif(current_setting('{name}', true), '')")  # '' is left of an earlier one


class Base(DeclarativeBase):
    """Collect the tables."""


class Change(Base):
    """Record something; the server fills in who did it, and in which request."""

    __tablename__ = "request_scope_change"

    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]
    tenant: Mapped[str] = mapped_column(server_default=setting("app.tenant"))
    user: Mapped[str] = mapped_column(server_default=setting("app.user"))
    trace: Mapped[str] = mapped_column(server_default=setting("app.trace"))
