"""The tables: users of several tenants, and tables with a tenant column."""

from datetime import datetime

from sqlalchemy import DateTime, ForeignKeyConstraint, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The base class of all models."""


class User(Base):
    """A user, known by a token, and the tenant that they belong to."""

    __tablename__ = "tenants_by_predicate_user"

    token_digest: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    tenant: Mapped[str | None]


class OwnedByTenant:
    """A mixin for classes whose rows belong to a tenant."""

    tenant: Mapped[str] = mapped_column()


class Project(OwnedByTenant, Base):
    """A project, which may be archived."""

    __tablename__ = "tenants_by_predicate_project"
    __table_args__ = (UniqueConstraint("tenant", "id"), UniqueConstraint("tenant", "name"))

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    archived_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class AuditEntry(OwnedByTenant, Base):
    """An audit entry: who did something to a project, once per action."""

    __tablename__ = "tenants_by_predicate_audit"
    # Both columns, so that an entry cannot refer to another tenant's project.
    __table_args__ = (
        ForeignKeyConstraint(["tenant", "project_id"], [Project.tenant, Project.id]),
        UniqueConstraint("project_id", "action"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int]
    action: Mapped[str]
    by: Mapped[str]
