"""Rule 2: a session from an override reaches every dependency and belongs to the application."""

from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, WebSocket
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from fastapi_sqlnative import (
    AsyncDatabase,
    dependencies,
    get_database_handle,
    get_db,
    install_database,
    reader,
    transactional,
)
from tests.conftest import MakeEngine
from tests.in_process import running
from tests.serving import Item, Kind, Rows, add, route, serve, using

DEPENDENCIES = {
    "get_db": get_db(),
    "transactional": transactional(),
    "with-options": transactional(isolation_level="SERIALIZABLE", read_only=True),
    "reader": reader(),
}


@pytest.fixture
def app(engine: Engine | AsyncEngine) -> FastAPI:
    app = FastAPI()
    install_database(app, engine=engine, shutdown=engine.dispose)
    return app


@pytest.fixture
def own(kind: Kind, make_engine: MakeEngine) -> Iterator[Any]:
    """Yield a session of the application's own, with an engine that is not installed."""
    engine: Any = make_engine()
    yield AsyncSession(engine) if kind.asynchronous else Session(engine)
    if not kind.asynchronous:
        engine.dispose()


def as_function(own: Any) -> Callable[..., Any]:
    return lambda: own


def as_coroutine_function(own: Any) -> Callable[..., Any]:
    async def override() -> Any:
        return own

    return override


def as_generator(own: Any) -> Callable[..., Any]:
    def override() -> Generator[Any]:
        yield own

    return override


def as_async_generator(own: Any) -> Callable[..., Any]:
    async def override() -> AsyncGenerator[Any]:
        yield own

    return override


STYLES = [as_function, as_coroutine_function, as_generator, as_async_generator]


def add_and_fail(name: str) -> Callable[[Session], None]:
    def body(session: Session) -> None:
        add(name, flush=True)(session)
        raise ZeroDivisionError

    return body


def route_the_end(app: FastAPI, kind: Kind, own: Any) -> None:
    """Add `POST /end`, which checks, commits and closes `own`, and `POST /dispose`."""

    def body(session: Session) -> bool:
        untouched = session.in_transaction() and session.is_active
        session.commit()
        session.close()
        return untouched

    async def dispose() -> None:
        if kind.asynchronous:
            await own.bind.dispose()

    app.post("/end")(using(kind, Depends(as_function(own)), body))
    app.post("/dispose")(dispose)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_an_overriding_session_is_the_applications(
    kind: Kind, app: FastAPI, rows: Rows, own: Any, style: Callable[[Any], Callable[..., Any]]
) -> None:
    """A session from an override is used everywhere, and not committed, rolled back or closed."""
    app.dependency_overrides[get_db(" default")] = style(own)
    for name, dependency in DEPENDENCIES.items():
        route(app, kind, f"/{name}/returns", dependency, add(f"{name} returned", flush=True))
        route(app, kind, f"/{name}/raises", dependency, add_and_fail(f"{name} raised"))
    route_the_end(app, kind, own)
    stored: list[str] = []
    with serve(app) as served:
        for name in DEPENDENCIES:
            for end, status in ("returns", 201), ("raises", 500):
                assert served.post(f"/{name}/{end}").status_code == status
                assert rows.names == stored
                assert rows.backends("idle in transaction%") == 1
                assert served.post("/end").json() is True
                stored = rows.names
        served.post("/dispose")
    assert len(stored) == 2 * len(DEPENDENCIES)


@pytest.mark.parametrize("reads_again", [True, False], ids=["reads again", "reads once"])
@pytest.mark.parametrize("dependency", DEPENDENCIES.values(), ids=DEPENDENCIES)
def test_an_override_may_come_after_the_first_request(
    app: FastAPI, dependency: Any, reads_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An override set after a request applies to routes, inclusions and websockets.

    It does so even if FastAPI does not read signatures again.
    """
    assert dependencies.READS_SIGNATURES_AGAIN, "this FastAPI does"
    monkeypatch.setattr(dependencies, "READS_SIGNATURES_AGAIN", reads_again)
    given: list[Any] = []

    async def take(session: Annotated[Any, Depends(dependency)]) -> None:
        given.append(session)

    async def accept(websocket: WebSocket) -> None:
        await websocket.accept()

    router = APIRouter()
    router.get("/", dependencies=[Depends(take)])(lambda: None)
    router.websocket("/socket", dependencies=[Depends(take)])(accept)
    app.include_router(router)
    app.include_router(router, prefix="/again")

    def visit(served: TestClient) -> list[Any]:
        given.clear()
        for prefix in "", "/again":
            assert served.get(f"{prefix}/").status_code == 200
            with served.websocket_connect(f"{prefix}/socket"):
                pass
        return given

    with TestClient(app) as served:
        assert all(isinstance(each, Session | AsyncSession) for each in visit(served))
        app.dependency_overrides[get_db()] = lambda: "mine"
        assert visit(served) == ["mine"] * 4
        app.dependency_overrides = {}
        assert all(isinstance(each, Session | AsyncSession) for each in visit(served))


class Proxy:
    """An object of the application's that has all attributes of a session, its class included."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattribute__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_session"), name)


class Unbound:
    """A proxy that has no object yet."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


async def of_a_handle(
    database: Annotated[Any, Depends(get_database_handle("second"))],
) -> AsyncGenerator[Any]:
    async with AsyncExitStack() as stack:
        if isinstance(database, AsyncDatabase):
            yield await stack.enter_async_context(database.session())
        else:
            yield stack.enter_context(database.session())


def proxy_of(session: Annotated[Any, Depends(get_db("second"))]) -> Proxy:
    return Proxy(session)


async def given_alike(
    first: Annotated[Any, Depends(get_db())],
    second: Annotated[Any, Depends(DEPENDENCIES["with-options"])],
    third: Annotated[Any, Depends(reader())],
) -> bool:
    """Return whether all dependencies give the same object."""
    return first is second is third


@pytest.mark.parametrize("override", [of_a_handle, proxy_of, Unbound])
def test_an_override_may_give_what_is_not_the_requests_session(
    app: FastAPI, make_engine: MakeEngine, override: Callable[..., Any]
) -> None:
    """Every dependency gives an override's object as it is, even if it is a proxy of a session."""
    second = make_engine(second=True)
    install_database(app, name="second", engine=second, shutdown=second.dispose)
    app.dependency_overrides[get_db()] = override
    app.get("/")(given_alike)
    with TestClient(app) as served:
        assert served.get("/").json() is True


@pytest.mark.anyio
async def test_an_override_may_give_a_session_of_another_applications_request(
    app: FastAPI, make_engine: MakeEngine
) -> None:
    """An application called by an endpoint may share its session, which stays the endpoint's."""
    outer, engine = FastAPI(), make_engine()
    install_database(outer, name="outer", engine=engine, shutdown=engine.dispose)
    app.get("/")(given_alike)
    async with running(app) as inside, running(outer) as client:

        @outer.get("/")
        async def call(session: Annotated[Any, Depends(get_db("outer"))]) -> Any:
            app.dependency_overrides[get_db()] = lambda: session
            return (await inside.get("/")).json()

        assert (await client.get("/")).json() is True


def test_an_override_by_another_database_is_a_transaction_there(
    kind: Kind, app: FastAPI, make_engine: MakeEngine, rows: Rows, second_rows: Rows
) -> None:
    """If get_db is overridden by another database's, transactional and reader use that one too."""
    second = make_engine(second=True)
    install_database(app, name="second", engine=second, shutdown=second.dispose)
    app.dependency_overrides[get_db()] = get_db("second")
    second_rows.add("there")
    found: list[str] = []

    def read(session: Session) -> None:
        found.extend(session.scalars(select(Item.name)))

    looking = [Depends(using(kind, Depends(reader()), read))]
    route(app, kind, "/", transactional(), add("a", flush=True), dependencies=looking)
    route(app, kind, "/fails", transactional(), add_and_fail("b"))
    with serve(app) as served:
        assert served.post("/fails").status_code == 500
        assert second_rows.names == ["there"]
        assert served.post("/").status_code == 201
    assert (rows.names, second_rows.names) == ([], ["a", "there"])
    assert found == ["there"]


@pytest.mark.parametrize("dependency", [transactional(), reader()])
def test_transactional_and_reader_can_be_overridden_alone(
    kind: Kind, app: FastAPI, rows: Rows, dependency: Callable[..., Any]
) -> None:
    """An override of transactional or reader is used as it is, and get_db is unaffected."""
    app.dependency_overrides[dependency] = lambda: "mine"
    given: list[Any] = []

    @app.post("/")
    async def endpoint(
        mine: Annotated[Any, Depends(dependency)], db: Annotated[Any, Depends(get_db())]
    ) -> None:
        given.extend((mine, db))

    with serve(app) as served:
        assert served.post("/").status_code == 200
    assert given[0] == "mine"
    assert isinstance(given[1], AsyncSession if kind.asynchronous else Session)


@pytest.mark.parametrize("late", [False, True])
def test_a_route_that_only_reads_may_be_made_to_write(
    kind: Kind, app: FastAPI, rows: Rows, late: bool
) -> None:
    """A route that only reads can commit with a get_db that an override adds or restores."""

    def write(session: Session) -> None:
        session.add(Item(name="a"))
        session.commit()

    def replaced() -> None: ...

    writing = using(kind, Depends(get_db()), write)
    route(
        app,
        kind,
        "/",
        reader(),
        lambda _: None,
        dependencies=[Depends(replaced if late else writing)],
    )
    if not late:
        app.dependency_overrides[writing] = replaced
    with serve(app) as served:
        assert served.post("/").status_code == 201
        assert rows.names == []
        app.dependency_overrides = {replaced: writing} if late else {}
        assert served.post("/").status_code == 201
    assert rows.names == ["a"]


def test_an_override_ends_with_its_removal(kind: Kind, app: FastAPI, rows: Rows) -> None:
    """After an override is removed, the next request uses and commits a session of the package."""
    app.dependency_overrides[get_db()] = lambda: None
    route(app, kind, "/", transactional(), add("a", flush=True))
    with serve(app) as served:
        assert served.post("/").status_code == 500
        app.dependency_overrides.clear()
        assert served.post("/").status_code == 201
    assert rows.names == ["a"]


def test_an_override_beside_a_reader_may_write(
    kind: Kind, make_engine: MakeEngine, rows: Rows
) -> None:
    """An override of another dependency can write in a route that only reads."""
    app, engine = FastAPI(), make_engine()
    install_database(app, engine=engine, shutdown=engine.dispose)

    def user() -> None: ...

    def add_user(session: Session) -> None:
        session.add(Item(name="user"))
        session.commit()

    app.dependency_overrides[user] = using(kind, Depends(get_db()), add_user)
    names = select(Item.name)
    body: Callable[[Session], Any] = lambda session: session.scalars(names).all()  # noqa: E731
    read = Depends(using(kind, Depends(reader()), body))  # runs before `user`

    @app.get("/", dependencies=[read, Depends(user)])
    def endpoint(found: Annotated[Any, Depends(using(kind, Depends(reader()), body))]) -> Any:
        return found

    with serve(app) as served:
        assert served.client.get("/").json() == ["user"]
