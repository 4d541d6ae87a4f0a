"""The tables and their policies."""

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

# Once a transaction has used the setting, the connection shows it as '' rather than NULL.
TENANT = "nullif(current_setting('app.tenant', true), '')"


class Base(DeclarativeBase):
    """The base class of all models."""


class User(Base):
    """A user, known by a token, and their tenant. Read before the tenant is known."""

    __tablename__ = "tenants_by_row_security_user"

    token_digest: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str | None]


class Document(Base):
    """A tenant's document. The server fills in the tenant."""

    __tablename__ = "tenants_by_row_security_document"
    __table_args__ = (UniqueConstraint("tenant", "id"),)

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    tenant: Mapped[str] = mapped_column(server_default=text(TENANT))
    title: Mapped[str]


class Comment(Base):
    """A comment on a document of the same tenant."""

    __tablename__ = "tenants_by_row_security_comment"
    # The server checks foreign keys without the policies. With the id alone, a user could comment
    # on another tenant's document, and learn which IDs exist.
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
        "ALTER TABLE %(fullname)s FORCE ROW LEVEL SECURITY",  # applies to the owner too
        f"CREATE POLICY tenant ON %(fullname)s USING (tenant = {TENANT})",  # and WITH CHECK
    ):
        event.listen(_table, "after_create", DDL(_statement))  # type: ignore[no-untyped-call] # SQLAlchemy's
