"""Tests over HTTP of row security, against attempts to get around it."""

# ruff: noqa: S608 # the table names are constants

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from typing import Annotated, Any, Final

import httpx
import psycopg
import pytest
from fastapi import Depends, FastAPI, HTTPException
from psycopg import sql
from sqlalchemy import URL, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.testclient import TestClient

from examples.tenants_by_row_security.app import Db, TenantDb, Transaction, create_app
from examples.tenants_by_row_security.database import prepare
from fastapi_sqlnative import AsyncDatabase, installed_databases, reader
from tests.in_process import running
from tests.serving import Served, backends, serve, until

DOCUMENT: Final = "tenants_by_row_security_document"
EVERYTHING = f"SELECT title FROM {DOCUMENT}"
Reader = Annotated[AsyncSession, Depends(reader())]


def add_attacks(app: FastAPI) -> None:
    """Add an endpoint for an attacker's own statements, in one of the example's sessions."""

    async def run(session: AsyncSession, statements: list[str]) -> list[Any]:
        result: list[Any] = []
        for statement in statements:
            match statement:
                case "COMMIT":
                    await session.commit()
                case "ROLLBACK":
                    await session.rollback()
                case _:
                    found = await session.execute(text(statement))
                    result = [row[0] for row in found] if found.returns_rows else []  # type: ignore[attr-defined] # a CursorResult's
        return result

    @app.post("/as-tenant")
    async def attack_as_tenant(statements: list[str], session: TenantDb, _: Transaction) -> Any:
        return await run(session, statements)

    @app.post("/as-nobody")
    async def attack_without_a_tenant(statements: list[str], session: Db, _: Transaction) -> Any:
        return await run(session, statements)

    @app.post("/as-reader")
    async def attack_through_a_reader(statements: list[str], _: TenantDb, session: Reader) -> Any:
        return await run(session, statements)

    @app.post("/as-task")
    async def attack_from_the_handle(statements: list[str]) -> Any:
        database = installed_databases(app, AsyncDatabase)["default"]
        async with database.transaction() as session:
            return await run(session, statements)

    @app.post("/refused")
    async def write_and_refuse(statements: list[str], session: TenantDb, _: Transaction) -> None:
        await run(session, statements)
        raise HTTPException(409)

    @app.post("/savepoint")
    async def fail_in_a_savepoint(statements: list[str], session: TenantDb, _: Transaction) -> Any:
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await run(session, [f"INSERT INTO {DOCUMENT} (title) VALUES (NULL)"])
        return await run(session, statements)


class Tenant:
    """A client that sends a user's token."""

    def __init__(self, client: httpx.Client, token: str) -> None:
        self.client = client
        self.headers = {"Authorization": f"Bearer {token}"}

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return self.client.request(method, path, json=body, headers=self.headers | headers)

    def attack(self, path: str, *statements: str) -> Any:
        """Run statements; return the last one's result, or the status."""
        answer = self.call("POST", path, list(statements))
        return answer.json() if answer.status_code == 200 else answer.status_code

    @property
    def titles(self) -> list[str]:
        return [each["title"] for each in self.call("GET", "/documents").json()]


@contextmanager
def served(pool_size: int = 1) -> Generator[tuple[Served, Tenant, Tenant]]:
    """Serve the example with a document for each tenant, and at first a pool of one."""
    app = create_app(pool_size=pool_size)
    add_attacks(app)
    with serve(app) as running:
        ada, grace = Tenant(running.client, "ada"), Tenant(running.client, "grace")
        assert ada.call("POST", "/documents", {"title": "of acme"}).json()["tenant"] == "acme"
        assert grace.call("POST", "/documents", {"title": "of globex"}).json()["id"] == 2
        yield running, ada, grace


def stored(owner: psycopg.Connection) -> list[tuple[Any, ...]]:
    """List all documents, as only a superuser sees them."""
    return owner.execute(f"SELECT tenant, title FROM {DOCUMENT} ORDER BY id").fetchall()


START = [("acme", "of acme"), ("globex", "of globex")]


def test_a_foreign_row_is_none(owner: psycopg.Connection) -> None:
    """Reading, renaming or commenting on another tenant's document is a 404."""
    with served() as (_, ada, grace):
        assert (ada.titles, grace.titles) == (["of acme"], ["of globex"])
        for method, path, body in (
            ("GET", "/documents/2", None),
            ("PUT", "/documents/2", {"title": "stolen"}),
            ("POST", "/documents/2/comments", {"text": "psst"}),
        ):
            foreign = ada.call(method, path, body)
            missing = ada.call(method, path.replace("2", "9"), body)
            assert (foreign.status_code, foreign.json()) == (404, {"detail": "No such document."})
            assert foreign.json() == missing.json()
        assert grace.call("POST", "/documents/2/comments", {"text": "mine"}).status_code == 201
    assert stored(owner) == START


@pytest.mark.parametrize(
    ("token", "status"), [("unknown", 401), ("nobody", 403), ("' OR true --", 401)]
)
def test_who_has_no_tenant_is_refused(owner: psycopg.Connection, token: str, status: int) -> None:
    """An unknown token, or a user without a tenant, is refused before any query."""
    with served() as (running, _, _):
        stranger = Tenant(running.client, token)
        assert stranger.call("GET", "/documents").status_code == status
        answer = stranger.call("POST", "/documents", {"title": "x"})
        assert answer.status_code == status
        assert running.client.get("/documents").status_code == 401
    assert stored(owner) == START


def test_a_tenant_that_is_claimed_is_not_believed(owner: psycopg.Connection) -> None:
    """Neither a header nor a body field can change the tenant."""
    with served() as (_, ada, _):
        claim = ada.call("GET", "/documents", **{"X-Tenant": "globex", "Tenant": "globex"})
        assert [each["tenant"] for each in claim.json()] == ["acme"]
        new = {"title": "x", "tenant": "globex"}
        assert ada.call("POST", "/documents", new).status_code == 422
    assert stored(owner) == START


ESCAPES = {
    "read-all": EVERYTHING,
    "join": f"SELECT a.title FROM {DOCUMENT} a JOIN {DOCUMENT} b ON a.id = b.id",
    "or-true": f"{EVERYTHING} WHERE tenant = 'globex' OR true",
    "update-all": f"UPDATE {DOCUMENT} SET title = title RETURNING title",
    "delete-foreign": f"DELETE FROM {DOCUMENT} WHERE id = 2",
    "insert-foreign": f"INSERT INTO {DOCUMENT} (tenant, title) VALUES ('globex', 'x')",
    "give-away": f"UPDATE {DOCUMENT} SET tenant = 'globex'",
    "take-id": f"INSERT INTO {DOCUMENT} (id, title) OVERRIDING SYSTEM VALUE VALUES (2, 'x')",
    "disable": f"ALTER TABLE {DOCUMENT} DISABLE ROW LEVEL SECURITY",
    "no-force": f"ALTER TABLE {DOCUMENT} NO FORCE ROW LEVEL SECURITY",
    "drop-policy": f"DROP POLICY tenant ON {DOCUMENT}",
    "add-policy": f"CREATE POLICY more ON {DOCUMENT} USING (true)",
    "truncate": f"TRUNCATE {DOCUMENT}",
    "row-security-off": "SET LOCAL row_security = off",
    "become-owner": "SET ROLE postgres",
    "bypass": "ALTER ROLE CURRENT_USER BYPASSRLS",
    "trigger": f"CREATE TRIGGER t BEFORE INSERT ON {DOCUMENT} EXECUTE FUNCTION now()",
}


def test_no_statement_gets_out(owner: psycopg.Connection) -> None:
    """A statement that omits the tenant, or names another, sees and changes only own rows."""
    with served() as (_, ada, grace):
        for escape, statement in ESCAPES.items():
            found = ada.attack("/as-tenant", statement, EVERYTHING)
            assert found in (["of acme"], 500), escape
            assert (ada.titles, grace.titles) == (["of acme"], ["of globex"]), escape
            assert stored(owner) == START, escape


WITHOUT = ["/as-nobody", "/as-task", "/as-reader"]


@pytest.mark.parametrize("path", WITHOUT)
def test_without_a_tenant_there_is_nothing(
    owner: psycopg.Connection, path: str, subtests: pytest.Subtests
) -> None:
    """Without a tenant no row is read or written, whoever used the connection before.

    A reader has none either: in AUTOCOMMIT mode the setting ends with its own statement. Writes
    are refused there before they are sent.
    """
    pool_size = 2 if path == "/as-reader" else 1  # it is a second session
    before: dict[str, Any] = {"": None, EVERYTHING: ["of acme"], "SELECT 1 / 0": 500}
    with served(pool_size) as (_, ada, _):
        for statement, found in before.items():
            with subtests.test(statement or "nothing before"):
                assert not statement or ada.attack("/as-tenant", statement) == found
                attack_without_a_tenant(ada, path)
    assert stored(owner) == START


def attack_without_a_tenant(ada: Tenant, path: str) -> None:
    """Try to read and write through an endpoint that has set no tenant."""
    nothing: Any = 500 if path == "/as-reader" else []
    assert ada.attack(path, EVERYTHING) == []
    assert ada.attack(path, f"UPDATE {DOCUMENT} SET title = 'x' RETURNING id") == nothing
    assert ada.attack(path, f"DELETE FROM {DOCUMENT} RETURNING id") == nothing
    assert ada.attack(path, f"INSERT INTO {DOCUMENT} (title) VALUES ('x')") == 500
    insert = f"INSERT INTO {DOCUMENT} (tenant, title) VALUES ('{{}}', 'x')"
    for tenant in "acme", "":
        assert ada.attack(path, insert.format(tenant)) == 500


def test_the_tenant_survives_a_commit_in_mid_request(owner: psycopg.Connection) -> None:
    """After a commit, a rollback and a failed savepoint, the request keeps its tenant."""
    insert = f"INSERT INTO {DOCUMENT} (title) VALUES ('more')"
    with served() as (_, ada, grace):
        assert ada.attack("/as-tenant", insert, "COMMIT", EVERYTHING) == ["of acme", "more"]
        assert ada.attack("/as-tenant", "ROLLBACK", EVERYTHING) == ["of acme", "more"]
        assert ada.attack("/savepoint", EVERYTHING) == ["of acme", "more"]
        assert grace.titles == ["of globex"]
    assert stored(owner) == [*START, ("acme", "more")]


ENDINGS: dict[str, Callable[[Tenant], Any]] = {
    "success": lambda ada: ada.attack("/as-tenant", EVERYTHING),
    "error": lambda ada: ada.attack("/as-tenant", EVERYTHING, "SELECT 1 / 0"),
    "http-exception": lambda ada: ada.attack("/refused", EVERYTHING),
    "savepoint": lambda ada: ada.attack("/savepoint", EVERYTHING),
    "reader": lambda ada: ada.attack("/as-reader", EVERYTHING),
}
# The tenant that a connection still has, read without one of the example's sessions.
LEFT_BEHIND = text("SELECT coalesce(current_setting('app.tenant', true), '')")


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_next_borrower_inherits_nothing(owner: psycopg.Connection, ending: str) -> None:
    """However a request ends, its connection is returned without a tenant."""
    app = create_app(pool_size=2 if ending == "reader" else 1)
    add_attacks(app)

    @app.get("/left-behind")
    async def look() -> list[str]:
        engine = installed_databases(app)["default"].engine
        assert isinstance(engine, AsyncEngine)
        size = 2 if ending == "reader" else 1
        async with AsyncExitStack() as stack:
            every = [await stack.enter_async_context(engine.connect()) for _ in range(size)]
            return [str(await connection.scalar(LEFT_BEHIND)) for connection in every]

    with serve(app) as running:
        ada = Tenant(running.client, "ada")
        ENDINGS[ending](ada)
        assert set(running.client.get("/left-behind").json()) == {""}


@pytest.mark.anyio
async def test_a_cancelled_request_leaves_nothing_behind(owner: psycopg.Connection) -> None:
    """A request that is cancelled in the middle of a statement leaves no tenant behind."""
    app = create_app(pool_size=1)
    add_attacks(app)
    bearer = {"Authorization": "Bearer ada"}
    async with running(app) as client:
        sleep = client.post("/as-tenant", json=["SELECT pg_sleep(60)"], headers=bearer)
        request = asyncio.create_task(sleep)
        await until(lambda: backends(owner, wait="%/PgSleep") == 1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert (await client.post("/as-task", json=[EVERYTHING])).json() == []
        engine = installed_databases(app)["default"].engine
        assert isinstance(engine, AsyncEngine)
        async with engine.connect() as connection:
            assert await connection.scalar(LEFT_BEHIND) == ""


def test_tenants_at_once_do_not_mix(owner: psycopg.Connection) -> None:
    """Many requests from both tenants on few connections each see only their own rows."""
    with served(pool_size=3) as (_, ada, grace), ThreadPoolExecutor(12) as threads:
        seen = list(threads.map(lambda number: (ada, grace)[number % 2].titles, range(24)))
    assert seen == [["of acme"], ["of globex"]] * 12


def test_a_role_that_is_not_bound_does_not_serve(
    owner: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses to start as the owner, here a superuser, or if a table's policies are off."""

    async def as_the_owner(url: URL, pool_size: int) -> AsyncEngine:
        await prepare(url)
        return create_async_engine(url)

    with serve(create_app()):
        pass
    owner.execute(f"ALTER TABLE {DOCUMENT} DISABLE ROW LEVEL SECURITY")
    with pytest.raises(RuntimeError, match="Row security of table"), TestClient(create_app()):
        pass
    owner.execute(f"ALTER TABLE {DOCUMENT} ENABLE ROW LEVEL SECURITY")
    monkeypatch.setattr("examples.tenants_by_row_security.app.build_engine", as_the_owner)
    with pytest.raises(RuntimeError, match="does not bind this role"), TestClient(create_app()):
        pass


def test_the_owner_is_bound_as_well(owner: psycopg.Connection) -> None:
    """Even the table's owner sees no row without a tenant: row security is forced."""
    with served() as (_, ada, _):
        role = sql.Identifier(f"{owner.info.dbname}_app")
        owner.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.Identifier(DOCUMENT), role))
        assert ada.attack("/as-nobody", EVERYTHING) == []
        assert ada.titles == ["of acme"]
