"""Tests over HTTP of the predicate, against attempts to get around it."""

# ruff: noqa: S608 # the table names are constants

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, Final

import httpx
import psycopg
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy import (
    delete,
    func,
    insert,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, aliased

from examples.tenants_by_predicate.app import create_app
from examples.tenants_by_predicate.dependencies import Db, TenantDb, Transaction
from examples.tenants_by_predicate.models import Base, Project, User
from examples.tenants_by_predicate.tenancy import OtherTenantError, TenantMissingError
from fastapi_sqlnative import AsyncDatabase, installed_databases, reader
from tests.serving import Served, serve

PROJECT: Final = "tenants_by_predicate_project"
AUDIT: Final = "tenants_by_predicate_audit"
START = [("acme", "rocket", False), ("globex", "volcano", False)]


@pytest.fixture
def driver() -> str:
    """Give one driver: what tells tenants apart is SQLAlchemy's."""
    return "psycopg"


def stored(owner: psycopg.Connection) -> list[tuple[Any, ...]]:
    """List every project, and whether it is archived."""
    return owner.execute(
        f"SELECT tenant, name, archived_at IS NOT NULL FROM {PROJECT} ORDER BY id"
    ).fetchall()


class Tenant:
    """A client that sends a user's token."""

    def __init__(self, client: httpx.Client, token: str) -> None:
        self.client = client
        self.headers = {"Authorization": f"Bearer {token}"}

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return self.client.request(method, path, json=body, headers=self.headers | headers)

    @property
    def names(self) -> list[str]:
        return [each["name"] for each in self.call("GET", "/projects").json()]


@contextmanager
def served(app: FastAPI | None = None) -> Generator[tuple[Served, Tenant, Tenant]]:
    """Serve the example, with a project for each tenant."""
    with serve(app or create_app()) as running:
        ada, grace = Tenant(running.client, "ada"), Tenant(running.client, "grace")
        assert ada.call("POST", "/projects", {"name": "rocket"}).json()["tenant"] == "acme"
        assert grace.call("POST", "/projects", {"name": "volcano"}).json()["id"] == 2
        yield running, ada, grace


def test_each_tenant_has_its_own(owner: psycopg.Connection) -> None:
    """Lists, rows and taken names are limited to the user's tenant."""
    with served() as (_, ada, grace):
        assert (ada.names, grace.names) == (["rocket"], ["volcano"])
        assert ada.call("POST", "/projects", {"name": "rocket"}).status_code == 409
        assert grace.call("POST", "/projects", {"name": "rocket"}).status_code == 201


def test_a_foreign_row_is_none(owner: psycopg.Connection) -> None:
    """Reading or archiving another tenant's project gets the same answer as an unknown project."""
    with served() as (_, ada, _):
        for method, path in ("GET", "/projects/{}"), ("POST", "/projects/{}/archive"):
            foreign, missing = (ada.call(method, path.format(number)) for number in (2, 9))
            assert (foreign.status_code, foreign.json()) == (404, {"detail": "No such project."})
            assert missing.json() == foreign.json()
        assert ada.call("GET", "/audit").json() == []
    assert stored(owner) == START


CLAIMS: list[tuple[str, dict[str, str], int]] = [
    ("' OR true --", {}, 401),
    ("unknown", {}, 401),
    ("unknown", {"X-Tenant": "acme"}, 401),
    ("nobody", {}, 403),
    ("nobody", {"X-Tenant": "acme"}, 403),
    ("ada", {"X-Tenant": "globex"}, 403),
    ("ada", {"X-Tenant": ""}, 403),
    ("ada", {"X-Tenant": "acme"}, 200),
]


def test_only_the_user_decides_on_the_tenant(owner: psycopg.Connection) -> None:
    """A missing or spoofed tenant is refused before any query for it."""
    with served() as (running, _, _):
        for token, headers, status in CLAIMS:
            asking = Tenant(running.client, token)
            answer = asking.call("GET", "/projects", **headers)
            assert answer.status_code == status, (token, headers)
            assert stored(owner) == START
            written = asking.call("POST", "/projects", {"name": "moon"}, **headers)
            assert written.status_code == (201 if status == 200 else status), (token, headers)
            spoofed = {"name": "mars", "tenant": "globex"}
            assert asking.call("POST", "/projects", spoofed).status_code in (401, 403, 422)
    assert stored(owner) == [*START, ("acme", "moon", False)]


def test_archive_and_audit_are_one(owner: psycopg.Connection) -> None:
    """A project is archived with its audit entry or, if that is refused, not at all."""
    with served() as (_, ada, grace):
        assert ada.call("POST", "/projects/1/archive").json()["archived_at"] is not None
        assert ada.call("GET", "/audit").json() == ["ada archived 1"]
        entry: Final = (
            f"INSERT INTO {AUDIT} (tenant, project_id, action, by) VALUES (%s, 2, %s, 'me')"
        )
        owner.execute(entry, ("globex", "archived"))
        assert grace.call("POST", "/projects/2/archive").status_code == 409
        assert grace.call("GET", "/audit").json() == ["me archived 2"]
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            owner.execute(entry, ("acme", "seen"))
    assert stored(owner) == [("acme", "rocket", True), START[1]]


# -- a forgotten tenant ------------------------------------------------------------------------

OTHER = aliased(Project)
SUBQUERY = select(Project).subquery()
CTE = select(Project.name).cte()
UNION = union_all(select(Project.name), select(Project.name).where(Project.id < 0)).subquery()
QUERIES: dict[str, Any] = {
    "entity": select(Project.name),
    "or-true": select(Project.name).where((Project.tenant == "globex") | (Project.id > 0)),
    "alias": select(OTHER.name),
    "subquery": select(SUBQUERY.c.name),
    "subquery-as-entity": select(aliased(Project, SUBQUERY).name),
    "cte": select(CTE.c.name),
    "scalar-subquery": select(select(func.max(Project.name)).scalar_subquery()),
    "in": select(Project.name).where(Project.id.in_(select(OTHER.id))),
    "union-in-a-subquery": select(UNION.c.name),
    "aggregate": select(func.max(Project.name)).select_from(Project),
    "join": select(Project.name).join(OTHER, OTHER.id >= Project.id),
    "join-of-a-user": select(Project.name).join(User, User.name != Project.name).distinct(),
    "for-update": select(Project.name).with_for_update(),
}


def probe(app: FastAPI, work: Callable[[Session], Any]) -> None:
    """Add endpoints that use a session with a tenant, and sessions without one."""

    @app.post("/as-tenant")
    async def do_with_a_tenant(session: TenantDb, _: Transaction) -> Any:
        return await session.run_sync(work)

    @app.post("/as-nobody")
    async def do_without_a_tenant(session: Db, _: Transaction) -> Any:
        return await session.run_sync(work)

    @app.post("/as-reader")
    async def do_in_a_reader(session: Annotated[AsyncSession, Depends(reader())]) -> Any:
        return await session.run_sync(work)

    @app.post("/as-task")
    async def do_from_the_handle() -> Any:
        database = installed_databases(app, AsyncDatabase)["default"]
        async with database.transaction() as session:
            return await session.run_sync(work)

    @app.exception_handler(TenantMissingError)
    @app.exception_handler(OtherTenantError)
    async def tell(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(type(error).__name__, 500)


def test_a_query_that_forgets_the_tenant_gets_it(owner: psycopg.Connection) -> None:
    """However a query uses a class, it finds only rows of the request's tenant."""
    app = create_app()
    probe(app, lambda session: list(session.scalars(QUERIES[query])))
    with served(app) as (running, ada, grace):
        for query in QUERIES:
            for _ in range(2):  # SQLAlchemy caches what it compiles for the first
                assert ada.call("POST", "/as-tenant").json() == ["rocket"], query
                assert grace.call("POST", "/as-tenant").json() == ["volcano"], query
            for path in "/as-nobody", "/as-reader", "/as-task":
                found = running.client.post(path).json()
                assert found in ("TenantMissingError", [], [None]), query


def give_away(session: Session) -> None:
    session.get_one(Project, 1).tenant = "globex"


def delete_foreign(session: Session) -> None:
    with Session(session.get_bind()) as other:
        foreign = other.get_one(Project, 2)
    session.delete(foreign)


def change_foreign(session: Session) -> None:
    with Session(session.get_bind()) as other:
        foreign = other.get_one(Project, 2)
    session.add(foreign)
    foreign.tenant = "acme"


VALUES = {"tenant": "globex", "name": "mole"}
WRITES: dict[str, Callable[[Session], Any]] = {
    "add": lambda session: session.add(Project(**VALUES)),
    "give-away": give_away,
    "delete-foreign": delete_foreign,
    "change-foreign": change_foreign,
    "insert": lambda session: session.execute(insert(Project).values(VALUES)),
    "insert-many": lambda session: session.execute(insert(Project), [VALUES]),
    "core-insert": lambda session: session.execute(
        insert(Base.metadata.tables[PROJECT]).values(VALUES)
    ),
    "update": lambda session: session.execute(update(Project).values(tenant="globex")),
    "update-by-id": lambda session: session.execute(update(Project), [{"id": 2, "name": "x"}]),
    "delete": lambda session: session.execute(delete(Project).where(Project.id == 2)),
    "text": lambda session: session.execute(text(f"DELETE FROM {PROJECT}")),
    "union": lambda session: session.scalars(union_all(select(Project.name))).all(),
    "core-select": lambda session: session.execute(select(Base.metadata.tables[PROJECT])).all(),
    "from-text": lambda session: session.scalars(
        select(Project).from_statement(text(f"SELECT * FROM {PROJECT}"))
    ).all(),
}


def test_what_the_tenant_cannot_be_added_to_is_refused(owner: psycopg.Connection) -> None:
    """A statement that cannot take the predicate, or another tenant's object, fails the request."""
    app = create_app()

    def work(session: Session) -> None:
        WRITES[write](session)
        session.flush()

    probe(app, work)
    with served(app) as (running, ada, _):
        for write in WRITES:
            assert ada.call("POST", "/as-tenant").json() == "OtherTenantError", write
            for path in "/as-nobody", "/as-task":
                answer = running.client.post(path).json()
                assert answer in ("OtherTenantError", "TenantMissingError"), write
            assert stored(owner) == START, write


def test_writing_without_a_tenant_is_refused(owner: psycopg.Connection) -> None:
    """A session without a tenant does not write an object that sets its own tenant."""
    app = create_app()

    def work(session: Session) -> None:
        session.add(Project(tenant="acme", name="mole"))
        session.flush()

    probe(app, work)
    with served(app) as (running, _, _):
        for path in "/as-nobody", "/as-task":
            assert running.client.post(path).json() == "TenantMissingError"
    assert stored(owner) == START


def test_tenants_at_once_do_not_mix(owner: psycopg.Connection) -> None:
    """Many requests from both tenants each see only their own rows."""
    with served() as (_, ada, grace), ThreadPoolExecutor(12) as threads:
        seen = list(threads.map(lambda number: (ada, grace)[number % 2].names, range(24)))
    assert seen == [["rocket"], ["volcano"]] * 12
