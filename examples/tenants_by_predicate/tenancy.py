"""A session that adds the tenant to every query, and refuses statements to which it cannot."""

from sqlalchemy import Select, event, inspect
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria

from examples.tenants_by_predicate.models import OwnedByTenant


class TenantMissingError(RuntimeError):
    """A session without a tenant was used for a tenant's rows."""


class OtherTenantError(RuntimeError):
    """A statement or object may belong to another tenant than the session's."""


class TenantSession(Session):
    """A session that serves only the tenant in its `info`."""


@event.listens_for(TenantSession, "do_orm_execute")
def _add_the_predicate(state: ORMExecuteState) -> None:
    # A UNION is safe only in a subquery: SQLAlchemy 2.0.40 caches it with the first tenant.
    if not (state.is_orm_statement and isinstance(state.statement, Select)):
        raise OtherTenantError(
            "The tenant cannot be added to this statement: select() mapped classes, write by "
            "add(), delete() and attributes. Textual SQL belongs to an engine of its own."
        )
    tenant = state.session.info.get("tenant", "")
    if not tenant and any(issubclass(each.class_, OwnedByTenant) for each in state.all_mappers):
        raise _missing()
    # Applies wherever the class is used: in joins, aliases, subqueries and eager loads.
    # Without a tenant this is '', to which no row belongs.
    state.statement = state.statement.options(
        with_loader_criteria(OwnedByTenant, lambda cls: cls.tenant == tenant, include_aliases=True)
    )


@event.listens_for(TenantSession, "before_flush")
def _write_for_the_tenant_only(session: Session, *_: object) -> None:
    tenant = session.info.get("tenant", "")
    for row in {*session.new, *session.dirty, *session.deleted}:
        if not isinstance(row, OwnedByTenant):
            continue
        if not tenant:
            raise _missing()
        attribute = inspect(row).attrs.tenant
        if row in session.new and not attribute.history.added:
            row.tenant = tenant
        # Check the old tenant as well as the new one.
        if {*attribute.load_history().sum()} != {tenant}:
            raise OtherTenantError(f"A {type(row).__name__} of another tenant was to be written.")


def _missing() -> TenantMissingError:
    return TenantMissingError(
        "This session has no tenant: depend on tenant_db, or set session.info['tenant'] on one "
        "that a handle has opened."
    )
