"""Rule 14, for both colours: requests with several sessions do not deadlock."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.orm import Session

from fastapi_sqlnative import get_db, install_database, reader
from tests.conftest import MakeEngine
from tests.serving import Kind, Rows, flood, route, serve, using

pytestmark = pytest.mark.anyio
SMALL = {"pool_size": 2, "max_overflow": 1, "pool_timeout": 30}


async def every_answer(*floods: Awaitable[list[int]]) -> set[int]:
    """Run floods concurrently, together more requests than threads, and return their statuses."""
    return {status for found in await asyncio.gather(*floods) for status in found}


def sleep(session: Session) -> None:
    session.execute(text("SELECT pg_sleep(0.002)"))


def ask(kind: Kind, dependency: Callable[..., object]) -> object:
    """Depend on a query that runs before the endpoint's own."""
    return Depends(using(kind, Depends(dependency), sleep))


async def test_a_login_through_get_db_and_a_list_through_reader(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """Requests that need two connections of one small pool, and requests that need one, succeed."""
    app = FastAPI()
    engine = make_engine(**SMALL)
    install_database(app, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/both", reader(), sleep, dependencies=[ask(kind, get_db())])
    route(app, kind, "/one", get_db(), sleep)
    with serve(app) as served:
        assert await every_answer(flood(served, "/both", 23), flood(served, "/one", 22)) == {201}


async def test_two_databases_in_both_orders(
    kind: Kind, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """Requests that hold one database's connection while they wait for the other's all succeed."""
    app = FastAPI()
    for name, engine in ("a", make_engine(**SMALL)), ("b", make_engine(second=True, **SMALL)):
        install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    route(app, kind, "/ab", get_db("b"), sleep, dependencies=[ask(kind, get_db("a"))])
    route(app, kind, "/ba", get_db("a"), sleep, dependencies=[ask(kind, get_db("b"))])
    route(app, kind, "/a", get_db("a"), sleep)
    with serve(app) as served:
        floods = (flood(served, path, 15) for path in ("/ab", "/ba", "/a"))
        assert await every_answer(*floods) == {201}
