"""The tables, and the policies that come with them."""

from sqlalchemy import (
    DDL,
    ForeignKeyConstraint,
    Identity,
    Table,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# After a transaction that had it, a connection shows the setting as '' and not as NULL.
TENANT = "nullif(current_setting('app.tenant', true), '')"


class Base(DeclarativeBase):
    """The base class of all models."""


class User(Base):
    """Know somebody by a token, and the tenant that they belong to. Read before there is one."""

    __tablename__ = "tenants_by_row_security_user"

    token_digest: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str | None]


class Document(Base):
    """Hold what belongs to a tenant. Nobody writes the tenant: the server fills it in."""

    __tablename__ = "tenants_by_row_security_document"
    __table_args__ = (UniqueConstraint("tenant", "id"),)

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    tenant: Mapped[str] = mapped_column(server_default=text(TENANT))
    title: Mapped[str]


class Comment(Base):
    """Comment on a document of the same tenant."""

    __tablename__ = "tenants_by_row_security_comment"
    # The server checks foreign keys without the policies. On the id alone, anybody could write
    # under a foreign document, and learn which ids there are.
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "document_id"], [Document.tenant, Document.id]),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    tenant: Mapped[str] = mapped_column(server_default=text(TENANT))
    document_id: Mapped[int]
    text: Mapped[str]


GUARDED: tuple[Table, ...] = tuple(
    Base.metadata.tables[each.__tablename__] for each in (Document, Comment)
)
for _table in GUARDED:
    for _statement in (
        "ALTER TABLE %(fullname)s ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE %(fullname)s FORCE ROW LEVEL SECURITY",  # the owner is bound as well
        f"CREATE POLICY tenant ON %(fullname)s USING (tenant = {TENANT})",  # WITH CHECK too
    ):
        event.listen(_table, "after_create", DDL(_statement))  # type: ignore[no-untyped-call] # SQLAlchemy's
