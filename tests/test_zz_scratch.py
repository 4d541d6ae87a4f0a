import asyncio, threading
from typing import Any
import pytest
from fastapi import Depends, FastAPI, BackgroundTasks
from fastapi.responses import StreamingResponse
from sqlalchemy import NullPool, StaticPool, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.testclient import TestClient
from fastapi_sqlnative import *
from fastapi_sqlnative import health_router
from fastapi_sqlnative.testing import *
from tests.serving import Item, Kind, Rows, route, Base
from tests.test_testing_isolation import make_app, add, names, in_test

OPTIONS = {
  "null": dict(poolclass=NullPool), "ping": dict(pool_pre_ping=True), "recycle": dict(pool_recycle=0),
  "serial": dict(isolation_level="SERIALIZABLE"), "auto": dict(isolation_level="AUTOCOMMIT"),
  "auto-opt": dict(execution_options={"isolation_level":"AUTOCOMMIT"}),
  "noreset": dict(pool_reset_on_return=None), "rr-opt": dict(execution_options={"isolation_level":"REPEATABLE READ"}),
  "size1": dict(pool_size=1,max_overflow=0,pool_timeout=1),
}
@pytest.mark.parametrize("opt", OPTIONS)
def test_opts(kind, make_engine, rows, opt):
    engine = make_engine(**OPTIONS[opt])
    app = make_app(kind, engine)
    app.include_router(health_router())
    with TestClient(app, raise_server_exceptions=True) as client:
        client.post("/names")
        for _ in range(3):
            with isolated(app):
                assert client.post("/add").status_code == 201
                if not opt.startswith("auto"):
                    assert client.post("/explicit").status_code == 201
                    assert client.post("/fail").status_code == 409
                    assert client.post("/names").json() == ["added","kept","nested"]
                else:
                    assert client.post("/fail").status_code == 409
                    assert client.post("/names").json() == ["added", "failed"]
                assert client.get("/health/ready").status_code == 200
                assert client.post("/late").status_code == 201
                with pytest.raises(Exception): client.post("/again")
                assert client.post("/names").status_code == 201
            assert rows.names == []
        client.post("/add")
        assert rows.names == ["added"]
        assert client.post("/names").json() == ["added"]

def test_middleware_stream_maker(kind, make_engine, rows):
    engine = make_engine()
    app = make_app(kind, engine)
    class M(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            return await call_next(request)
    app.add_middleware(M)
    maker: Any = async_sessionmaker(engine) if kind.asynchronous else sessionmaker(engine)
    if kind.asynchronous:
        @app.get("/maker")
        async def f():
            async with maker.begin() as s:
                s.add(Item(name="maker"))
        @app.get("/stream")
        async def g(h: Any = Depends(get_database_handle())):
            async def rowsit():
                async with h.session() as s:
                    result = await s.stream_scalars(select(Item.name).order_by(Item.name), execution_options={"yield_per": 1})
                    async for n in result:
                        yield n + "\n"
            return StreamingResponse(rowsit())
        @app.get("/rstream")
        async def gr(s: Any = Depends(reader())):
            out=[]
            async for n in await s.stream_scalars(select(Item.name).order_by(Item.name), execution_options={"yield_per": 1}):
                out.append(n)
            return out
    else:
        @app.get("/maker")
        def f():
            with maker.begin() as s:
                s.add(Item(name="maker"))
        @app.get("/stream")
        def g(h: Any = Depends(get_database_handle())):
            def rowsit():
                with h.session() as s:
                    for n in s.scalars(select(Item.name).order_by(Item.name), execution_options={"yield_per": 1}):
                        yield n + "\n"
            return StreamingResponse(rowsit())
        @app.get("/rstream")
        def gr(s: Any = Depends(reader())):
            return list(s.scalars(select(Item.name).order_by(Item.name), execution_options={"yield_per": 1}))
    with TestClient(app) as client, isolated(app):
        assert client.get("/maker").status_code == 200
        assert client.post("/add").status_code == 201
        assert client.get("/stream").text == "added\nmaker\n"
        assert client.post("/names").json() == ["added", "maker"]
        assert client.get("/rstream").json() == ["added", "maker"]
    assert rows.names == []

def test_retry(kind, engine, rows):
    app = make_app(kind, engine)
    with TestClient(app) as client, isolated(app):
        db: Any = installed_databases(app)["default"]
        n=[]
        if kind.asynchronous:
            async def work(s): n.append(1); s.add(Item(name=f"x{len(n)}")); await s.flush()
            async def go(): await db.run_in_transaction(work)
        else:
            def work(s): n.append(1); s.add(Item(name=f"x{len(n)}")); s.flush()
            def go(): db.run_in_transaction(work)
        with fail_next_commit(app, "serialization"):
            client.portal.call(go)
        assert client.post("/names").json()==["x2"]
        with fail_next_statement(db, "deadlock"):
            client.portal.call(go)
        assert client.post("/names").json()==["x2","x4"]
    assert rows.names == []

def test_cancel(kind, make_engine, rows):
    if not kind.asynchronous: return
    engine = make_engine(pool_timeout=3)
    app = make_app(kind, engine)
    async def main():
        async with async_client(app) as c, isolated(app):
            await c.post("/add")
            db: Any = installed_databases(app)["default"]
            async def slow():
                async with db.transaction() as s:
                    s.add(Item(name="slow")); await s.flush()
                    await s.execute(text("select pg_sleep(5)"))
            t = asyncio.create_task(slow())
            await asyncio.sleep(0.3)
            t.cancel()
            with pytest.raises(asyncio.CancelledError): await t
            assert (await c.post("/names")).json() == ["added"]
    asyncio.run(main())
    assert rows.names == []

def test_override_health(kind, make_engine, rows, second_rows):
    engine = make_engine()
    app = make_app(kind, engine); app.include_router(health_router())
    def broken(): 
        e = make_engine(connect_args={})
        from sqlalchemy import create_engine
        from sqlalchemy.ext.asyncio import create_async_engine
        return (create_async_engine if kind.asynchronous else create_engine)(f"postgresql+{kind.driver}://nobody@127.0.0.1:1/none")
    with TestClient(app) as client:
        assert client.get("/health/ready").status_code == 200
        with override_database(app, "default", broken):
            assert client.get("/health/ready").status_code == 503
        assert client.get("/health/ready").status_code in (200, 503)
