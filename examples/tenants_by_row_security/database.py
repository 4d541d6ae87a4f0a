"""The session that sets the tenant on the server, and the role that cannot bypass it."""

import hashlib
import secrets

from sqlalchemy import URL, Connection, NullPool, event, func, insert, select, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    create_async_engine,
)
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.sql.functions import Function

from examples.tenants_by_row_security.models import GUARDED, Base, User


class TenantSession(Session):
    """A session whose transactions belong to the tenant in its `info`, or to none."""


@event.listens_for(TenantSession, "after_begin")
def _tell_tenant(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    # At every BEGIN: a commit in the middle of a request also ends the setting. In
    # AUTOCOMMIT mode, as in reader(), it ends with this statement: no tenant, no rows.
    if not transaction.nested:
        connection.execute(select(tenant_is(session.info.get("tenant"))))


def tenant_is(tenant: str | None) -> Function[str]:
    """Set the tenant until the transaction ends, as a bound value."""
    return func.set_config("app.tenant", tenant or "", True)


async def check_row_security(session: AsyncSession) -> None:
    """Refuse to serve if row security does not apply to this role or to a table.

    Raises:
        RuntimeError: before the first request.
    """
    for table in GUARDED:
        if not await session.scalar(select(func.row_security_active(table.name))):
            raise RuntimeError(
                f"Row security of table {table.name!r} does not bind this role: connect as one "
                "that is neither a superuser nor BYPASSRLS, and enable and force row security."
            )


# -- for the demo only: in production, use Alembic, as the owner ---------------------------------


def role_of(url: URL) -> str:
    """Return the name of the application's role, which must be unique on the server."""
    return f"{url.database}_app"


async def prepare(url: URL) -> URL:
    """Create tables, policies, users and the application's role; return the role's address."""
    password = secrets.token_urlsafe()
    owner = create_async_engine(url, poolclass=NullPool)
    async with owner.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await _seed(connection)
        await _give_role(connection, role_of(url), password)
    return url.set(username=role_of(url), password=password)


async def _seed(connection: AsyncConnection) -> None:
    if await connection.scalar(select(func.count()).select_from(User)):
        return
    for token, tenant in ("ada", "acme"), ("grace", "globex"), ("nobody", None):
        await connection.execute(insert(User).values(token_digest=digest(token), tenant=tenant))


def digest(token: str) -> str:
    """Return the hash that is stored instead of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


async def _give_role(connection: AsyncConnection, role: str, password: str) -> None:
    exists = await connection.scalar(
        text("SELECT count(*) FROM pg_roles WHERE rolname = :role"), {"role": role}
    )
    guarded = ", ".join(table.name for table in GUARDED)
    for statement in (
        f"{'ALTER' if exists else 'CREATE'} ROLE %I LOGIN PASSWORD %L",
        f"GRANT SELECT ON {User.__tablename__} TO %I",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON {guarded} TO %I",
    ):
        # Role names and passwords cannot be bound: the server quotes them.
        quoted = select(func.format(statement, role, password))
        await connection.exec_driver_sql(str(await connection.scalar(quoted)))


async def build_engine(owner: URL, pool_size: int) -> AsyncEngine:
    """Build the application's engine, for the role that owns nothing."""
    return create_async_engine(await prepare(owner), pool_size=pool_size, max_overflow=0)
