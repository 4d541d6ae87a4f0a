"""Rule 11: the mistakes in routes that start-up finds, before any request."""

import functools
import inspect
import re
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, Optional, Protocol, Union, cast

import pytest
from fastapi import APIRouter, Depends, FastAPI, Security, WebSocket, routing
from fastapi.security import SecurityScopes
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Host, Mount, Router
from typing_extensions import TypeAliasType

from fastapi_sqlnative import (
    AsyncDatabase,
    Database,
    get_database_handle,
    get_db,
    install_database,
    reader,
    transactional,
)
from fastapi_sqlnative.cancellation import cancel_on_disconnect, deadline
from fastapi_sqlnative.exceptions import DatabaseDependencyError, DatabaseNotInstalledError
from tests.in_process import async_sqlite, noting, running, sqlite, start_and_stop

pytestmark = pytest.mark.anyio

# Older versions of FastAPI ignore mounts in included routers, and cannot read a `type` alias or a
# signature with a name that only the type checker knows.
OLD = not hasattr(routing, "iter_route_contexts")

Dependency = Callable[..., Any]

OURS: dict[str, Callable[[str], Dependency]] = {
    "get_db": get_db,
    "transactional": transactional,
    "reader": reader,
    "get_database_handle": get_database_handle,
}


def nothing() -> None:
    """Do nothing, as an endpoint without parameters."""


def with_route(app: FastAPI | APIRouter, *depends: Any) -> None:
    app.get("/items", dependencies=depends)(nothing)


# --- the places where a dependency can be declared ---


def in_the_route(dependency: Dependency) -> FastAPI:
    app = FastAPI()
    with_route(app, Depends(dependency))
    return app


def as_an_annotation(dependency: Dependency) -> FastAPI:
    app = FastAPI()

    @app.get("/items")
    async def endpoint(session: Annotated[Any, Depends(dependency)]) -> None: ...

    return app


def as_a_default(dependency: Dependency) -> FastAPI:
    app = FastAPI()

    @app.get("/items")
    async def endpoint(session: Any = Depends(dependency)) -> None: ...

    return app


def in_a_sub_dependency(dependency: Dependency) -> FastAPI:
    def repository(session: Annotated[Any, Depends(dependency)]) -> None: ...

    async def service(repository: Annotated[None, Depends(repository)]) -> None: ...

    return as_an_annotation(service)


class Repository:
    """A class that FastAPI instantiates."""

    def __init__(self, session: Any) -> None: ...


def in_a_class(dependency: Dependency) -> FastAPI:
    class Injected(Repository):
        def __init__(self, session: Annotated[Any, Depends(dependency)]) -> None:
            super().__init__(session)

    return as_an_annotation(Injected)


def in_a_callable_object(dependency: Dependency) -> FastAPI:
    class Injected:
        def __call__(self, session: Annotated[Any, Depends(dependency)]) -> None: ...

    return as_an_annotation(Injected())


def in_a_partial(dependency: Dependency) -> FastAPI:
    def injected(number: int, session: Annotated[Any, Depends(dependency)]) -> None: ...

    return as_an_annotation(functools.partial(injected, 1))


def in_a_security_dependency(dependency: Dependency) -> FastAPI:
    def user(scopes: SecurityScopes, session: Annotated[Any, Depends(dependency)]) -> None: ...

    app = FastAPI()
    with_route(app, Security(user, scopes=["read"]))
    return app


def on_the_application(dependency: Dependency) -> FastAPI:
    app = FastAPI(dependencies=[Depends(dependency)])
    with_route(app)
    return app


def on_a_router(dependency: Dependency) -> FastAPI:
    app, router = FastAPI(), APIRouter(dependencies=[Depends(dependency)])
    with_route(router)
    app.include_router(router)
    return app


def on_an_inclusion(dependency: Dependency) -> FastAPI:
    app, router = FastAPI(), APIRouter()
    app.include_router(router, dependencies=[Depends(dependency)])
    with_route(router)  # after the inclusion: newer versions of FastAPI include it too
    with_route(app, Depends(dependency))
    return app


def on_a_second_inclusion(dependency: Dependency) -> FastAPI:
    app, router = FastAPI(), APIRouter()
    with_route(router)
    app.include_router(router)
    app.include_router(router, dependencies=[Depends(dependency)])
    return app


def in_nested_routers(dependency: Dependency) -> FastAPI:
    app, outer, inner = FastAPI(), APIRouter(), APIRouter()
    with_route(inner, Depends(dependency))
    outer.include_router(inner)
    app.include_router(outer)
    return app


def on_a_websocket(dependency: Dependency) -> FastAPI:
    app = FastAPI()

    @app.websocket("/items")
    async def endpoint(socket: WebSocket, session: Annotated[Any, Depends(dependency)]) -> None: ...

    return app


def on_an_included_websocket(dependency: Dependency) -> FastAPI:
    app, router = FastAPI(), APIRouter(dependencies=[Depends(dependency)])

    @router.websocket("/items")
    async def endpoint(socket: WebSocket) -> None: ...

    app.include_router(router)
    return app


def in_a_mounted_application(dependency: Dependency) -> FastAPI:
    app = FastAPI()
    app.mount("/sub", in_the_route(dependency))
    return app


def in_a_mount_within_a_mount(dependency: Dependency) -> FastAPI:
    app = FastAPI()
    app.mount("/outer", in_a_mounted_application(dependency))
    return app


def behind_middleware(dependency: Dependency) -> FastAPI:
    app = FastAPI()
    app.mount("/sub", BaseHTTPMiddleware(in_the_route(dependency)))
    return app


def in_a_mount_with_middleware(dependency: Dependency) -> FastAPI:
    app = FastAPI()
    middleware = [Middleware(BaseHTTPMiddleware)]
    app.router.routes.append(Mount("/sub", in_the_route(dependency), middleware=middleware))
    return app


def mounted_in_an_included_router(dependency: Dependency) -> FastAPI:
    app, router = FastAPI(), APIRouter()
    router.mount("/sub", in_the_route(dependency))
    app.include_router(router, prefix="/router")
    return app


def in_a_mounted_router(dependency: Dependency) -> FastAPI:
    app, router = FastAPI(), APIRouter()
    with_route(router, Depends(dependency))
    app.mount("/sub", router)
    return app


def mounted_in_a_mounted_router(dependency: Dependency) -> FastAPI:
    app = FastAPI()
    app.mount("/plain", Router([Mount("/sub", in_the_route(dependency))]))
    return app


def for_a_host(dependency: Dependency) -> FastAPI:
    app = FastAPI()
    app.router.routes.append(Host("api.example.org", in_the_route(dependency)))
    return app


PLACES = (
    in_the_route,
    as_an_annotation,
    as_a_default,
    in_a_sub_dependency,
    in_a_class,
    in_a_callable_object,
    in_a_partial,
    in_a_security_dependency,
    on_the_application,
    on_a_router,
    on_an_inclusion,
    on_a_second_inclusion,
    in_nested_routers,
    on_a_websocket,
    on_an_included_websocket,
    in_a_mounted_application,
    in_a_mount_within_a_mount,
    behind_middleware,
    in_a_mount_with_middleware,
    *(() if OLD else (mounted_in_an_included_router,)),
    in_a_mounted_router,
    mounted_in_a_mounted_router,
    for_a_host,
)


async def start(app: FastAPI, engine: Callable[[], Engine | AsyncEngine] = async_sqlite) -> None:
    """Start and stop the application, with the databases "orders" and "users"."""
    install_database(app, name="orders", engine=engine)
    install_database(app, name="users", engine=engine)
    await start_and_stop(app)


# --- names ---


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
async def test_a_misspelt_name_fails_the_start(place: Callable[[Dependency], FastAPI]) -> None:
    """A misspelt name anywhere fails start-up.

    The error names the route and lists the installed databases.
    """
    message = r"'/items'.*'oders'.*Installed: 'orders', 'users'\."
    with pytest.raises(DatabaseNotInstalledError, match=message):
        await start(place(get_db("oders")))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
async def test_a_name_that_exists_starts(place: Callable[[Dependency], FastAPI]) -> None:
    """An installed name anywhere passes the check, even with spaces around it."""
    await start(place(get_db(" orders ")))


@pytest.mark.parametrize("ours", OURS.values(), ids=OURS)
async def test_each_of_our_dependencies_is_checked(ours: Callable[[str], Dependency]) -> None:
    """The names given to get_db, transactional, reader and get_database_handle are all checked."""
    with pytest.raises(DatabaseNotInstalledError, match=r"Route '/items'.*'oders'"):
        await start(in_the_route(ours("oders")))


async def test_a_start_that_is_refused_leaves_nothing_open() -> None:
    """A start-up that a check fails closes the databases, and can be fixed and repeated."""
    app, log = FastAPI(), list[str]()
    route = get_db("oders")
    with_route(app, Depends(route))
    with pytest.raises(DatabaseNotInstalledError):
        await start(app, noting(log))
    assert log == ["disposed"] * 2
    app.dependency_overrides[route] = nothing
    await start_and_stop(app)


# --- overrides ---


@pytest.mark.parametrize("place", PLACES[:15], ids=lambda place: place.__name__)
async def test_an_overridden_dependency_is_not_looked_into(
    place: Callable[[Dependency], FastAPI],
) -> None:
    """A dependency that the application overrides may name a database that is not installed."""
    app = place(get_db("oders"))
    app.dependency_overrides[get_db("oders")] = nothing
    await start(app)


async def test_a_mounted_application_has_its_own_overrides() -> None:
    """The check applies only a mounted application's own overrides to it, as FastAPI does."""
    app, sub = FastAPI(), in_the_route(get_db("oders"))
    app.mount("/sub", sub)
    app.dependency_overrides[get_db("oders")] = nothing
    with pytest.raises(DatabaseNotInstalledError):
        await start(app)
    sub.dependency_overrides[get_db("oders")] = nothing
    await start_and_stop(app)


@pytest.mark.parametrize("ours", [transactional, reader])
async def test_an_override_of_get_db_answers_for_the_others(
    ours: Callable[[str], Dependency],
) -> None:
    """transactional(name) and reader(name) return what an override of get_db(name) returns."""
    app = FastAPI()

    @app.get("/items")
    async def endpoint(session: Annotated[Any, Depends(ours("oders"))]) -> str:
        return str(session)

    app.dependency_overrides[get_db("oders")] = lambda: "the application's own"
    install_database(app, name="orders", engine=async_sqlite)
    async with running(app) as client:
        assert (await client.get("/items")).json() == "the application's own"


async def test_an_override_of_get_db_does_not_answer_for_the_handle() -> None:
    """A handle is not a session, so its name is checked even if get_db is overridden."""
    app = in_the_route(get_database_handle("oders"))
    app.dependency_overrides[get_db("oders")] = nothing
    with pytest.raises(DatabaseNotInstalledError):
        await start(app)


async def test_a_dependency_above_may_be_overridden() -> None:
    """The dependencies of an overridden dependency are not checked."""

    def service(session: Annotated[Any, Depends(get_db("oders"))]) -> None: ...

    app = in_the_route(service)
    app.dependency_overrides[service] = nothing
    await start(app)


# --- scopes ---


Session_ = Annotated[Any, Depends(get_db("orders"))]


def generator(session: Session_) -> Generator[None]:
    yield


async def async_generator(session: Session_) -> AsyncGenerator[None]:
    yield


def plain(session: Session_) -> None: ...


def handing_on(session: Session_) -> Session:
    return cast("Session", session)


class Holding:
    def __init__(self, session: Session_) -> None: ...


def over_a_function(inner: Annotated[Any, Depends(handing_on)]) -> Generator[None]:
    yield


def over_a_class(inner: Annotated[Holding, Depends()]) -> Generator[None]:
    yield


def between(inner: Annotated[None, Depends(over_a_class)]) -> None: ...


def over_a_value(inner: Annotated[None, Depends(plain)]) -> Generator[None]:
    yield


class CallableGenerator:
    def __call__(self, session: Session_) -> Generator[None]:
        yield


class CallableAsyncGenerator:
    async def __call__(self, session: Session_) -> AsyncGenerator[None]:
        yield


class BoundGenerator:
    async def enter(self, session: Session_) -> AsyncGenerator[None]:
        yield


@functools.wraps(generator)
def wrapping(*args: Any, **kwargs: Any) -> Any:
    return generator(*args, **kwargs)


@functools.wraps(plain)
def wrapping_as_a_generator(*args: Any, **kwargs: Any) -> Generator[None]:
    yield


def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


class WrappedCallableGenerator:
    @wrapped
    def __call__(self, session: Session_) -> Generator[None]:
        yield


def numbered(number: int, session: Session_) -> Generator[None]:
    yield


def in_a_transaction(
    session: Annotated[Any, Depends(transactional("orders"))],
) -> Generator[None]:
    yield


def reading(session: Annotated[Any, Depends(reader("orders"))]) -> Generator[None]:
    yield


OUTLIVING: dict[str, Dependency] = {
    "generator": generator,
    "async-generator": async_generator,
    "through-a-function": over_a_function,
    "through-a-class": over_a_class,
    "below-a-function": between,
    "object": CallableGenerator(),
    "async-object": CallableAsyncGenerator(),
    "bound-method": BoundGenerator().enter,
    "partial": functools.partial(numbered, 1),
    "partial-of-a-partial": functools.partial(functools.partial(numbered), 1),
    "partial-of-an-object": functools.partial(CallableGenerator()),
    "wraps": wrapping,
    "wraps-as-a-generator": wrapping_as_a_generator,
    "wraps-in-a-class": WrappedCallableGenerator(),
    "contextmanager": asynccontextmanager(async_generator),
    "transactional": in_a_transaction,
    "reader": reading,
}


@pytest.mark.parametrize("dependency", OUTLIVING.values(), ids=OUTLIVING)
async def test_a_request_scoped_generator_cannot_hold_a_session(dependency: Dependency) -> None:
    """A generator that holds a session past the response fails start-up.

    The error shows how to declare it.
    """
    with pytest.raises(
        DatabaseDependencyError,
        match=r"Route '/items': the generator \S+ .*'orders'.*scope=\"function\"",
    ):
        await start(in_the_route(dependency))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
async def test_a_request_scoped_generator_is_found_everywhere(
    place: Callable[[Dependency], FastAPI],
) -> None:
    """Start-up finds a request-scoped generator that holds a session anywhere in the routes."""
    with pytest.raises(DatabaseDependencyError, match=r"'/items': the generator generator "):
        await start(place(generator))


@pytest.mark.parametrize("ours", [get_db, transactional, reader])
async def test_request_scope_around_ours_is_refused(ours: Callable[[str], Dependency]) -> None:
    """`scope="request"` on a session, which ends before the response, fails start-up."""
    app = FastAPI()
    with_route(app, Depends(ours("orders"), scope="request"))
    with pytest.raises(
        DatabaseDependencyError,
        match=r"'/items'.*'orders'.*scope=\"request\".*get_database_handle\('orders'\)",
    ):
        await start(app)


@pytest.mark.skipif(
    "max_concurrency" not in inspect.signature(Depends).parameters,
    reason="this FastAPI has no such limit",
)
@pytest.mark.parametrize("ours", [get_db, transactional, reader])
async def test_a_limit_around_ours_is_refused(ours: Callable[[str], Dependency]) -> None:
    """`max_concurrency` on a session fails start-up.

    It would limit how many sessions are opened at a time, not how many are in use.
    """
    app = FastAPI()
    limit: dict[str, Any] = {"max_concurrency": 1}
    with_route(app, Depends(ours("orders"), **limit))
    with pytest.raises(
        DatabaseDependencyError, match=r"'/items': max_concurrency .*'orders'.*def turn\(\): yield"
    ):
        await start(app)


def with_a_handle(
    database: Annotated[Any, Depends(get_database_handle("orders"))],
) -> Generator[None]:
    yield


def scoped(dependency: Dependency) -> Callable[..., Any]:
    async def endpoint(value: Annotated[None, Depends(dependency, scope="function")]) -> None: ...

    return endpoint


def unrelated() -> Generator[None]:
    yield


def beside(value: Annotated[None, Depends(unrelated)], session: Session_) -> None: ...


FINE: dict[str, Dependency] = {
    "function-scope": scoped(generator),
    "async-function-scope": scoped(async_generator),
    "function-scope-explicit-below": scoped(
        scoped(generator),
    ),
    "handle": with_a_handle,
    "plain": plain,
    "generator-over-a-value": over_a_value,
    "generator-beside": beside,
    "handle-request-scope": get_database_handle("orders"),
}


@pytest.mark.parametrize("dependency", FINE.values(), ids=FINE)
async def test_what_ends_with_the_session_may_hold_it(dependency: Dependency) -> None:
    """Function-scoped generators, plain callables and handles pass the check."""
    await start(in_the_route(dependency))


UNCALLED: dict[Dependency, str] = {
    get_db: "get_db(name)",
    transactional: "transactional(name)",
    reader: "reader(name)",
    get_database_handle: "get_database_handle(name)",
    deadline: "deadline(seconds)",
    cancel_on_disconnect: "cancel_on_disconnect()",
}


@pytest.mark.parametrize(("maker", "called"), UNCALLED.items(), ids=UNCALLED.values())
async def test_a_forgotten_call_fails_the_start(maker: Dependency, called: str) -> None:
    """`Depends(get_db)` without a call of get_db fails start-up, and the error shows the fix."""
    message = rf"'/items': Depends\({maker.__name__}\) lacks .*Depends\({re.escape(called)}\)"
    with pytest.raises(DatabaseDependencyError, match=message):
        await start(in_the_route(maker))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
async def test_a_forgotten_call_is_found_everywhere(
    place: Callable[[Dependency], FastAPI],
) -> None:
    """`Depends(deadline)` anywhere fails start-up, and `Depends(deadline(5))` does not."""
    with pytest.raises(DatabaseDependencyError, match=r"'/items': Depends\(deadline\) lacks"):
        await start(place(deadline))
    await start(place(deadline(5)))


async def test_function_scope_around_ours_is_fine() -> None:
    """A session may have `scope="function"`, which changes nothing, and a handle any scope."""
    app = FastAPI()
    with_route(
        app,
        Depends(get_db("orders"), scope="function"),
        Depends(get_database_handle("orders"), scope="function"),
        Depends(get_database_handle("orders"), scope="request"),
        Depends(get_database_handle("orders")),
    )
    await start(app)


# --- annotations ---


class OwnSession(Session):
    """An application's own session class."""


class OwnAsyncSession(AsyncSession):
    """An application's own asynchronous session class."""


class Executes(Protocol):
    """A protocol that both session classes implement."""

    def execute(self, statement: Any) -> Any: ...


SYNC_ALIAS = TypeAliasType("SYNC_ALIAS", Session)
DEPENDS_ALIAS = TypeAliasType("DEPENDS_ALIAS", Annotated[Session, Depends(get_db("orders"))])
NESTED_ALIAS = TypeAliasType("NESTED_ALIAS", SYNC_ALIAS | None)


def annotated(annotation: Any, ours: Callable[[str], Dependency] = get_db) -> FastAPI:
    """Make an application whose endpoint annotates one of our dependencies."""
    app = FastAPI()

    async def endpoint(session: Any) -> None: ...

    endpoint.__annotations__["session"] = Annotated[annotation, Depends(ours("orders"))]
    app.get("/items")(endpoint)
    return app


CONTRADICTIONS: dict[str, tuple[Any, Callable[[], Engine | AsyncEngine]]] = {
    "Session-AsyncEngine": (Session, async_sqlite),
    "AsyncSession-Engine": (AsyncSession, sqlite),
    "subclass-AsyncEngine": (OwnSession, async_sqlite),
    "subclass-Engine": (OwnAsyncSession, sqlite),
    "optional": (Optional[Session], async_sqlite),  # noqa: UP045 - the old spelling
    "union": (Union[Session, int], async_sqlite),  # noqa: UP007 - the old spelling
    "bar": (AsyncSession | None, sqlite),
    "annotated": (Annotated[Session, "a note"], async_sqlite),
    "alias": (SYNC_ALIAS, async_sqlite),
    "nested-alias": (NESTED_ALIAS, async_sqlite),
    "handle-for-session": (AsyncDatabase, async_sqlite),
    "factory-for-session": (async_sessionmaker[AsyncSession], async_sqlite),
    "sync-factory-for-session": (sessionmaker, sqlite),
}


@pytest.mark.parametrize(("annotation", "engine"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
async def test_an_annotation_that_contradicts_fails_the_start(
    annotation: Any, engine: Callable[[], Engine | AsyncEngine]
) -> None:
    """A wrong annotation of a session fails start-up, before a request raises AttributeError."""
    kind = "AsyncEngine and gives AsyncSession" if engine is async_sqlite else "Engine and gives"
    with pytest.raises(
        DatabaseDependencyError,
        match=rf"'/items': parameter 'session' of .*endpoint is annotated with .*'orders'.*{kind}",
    ):
        await start(annotated(annotation), engine)


HANDLES: dict[str, tuple[Any, Callable[[], Engine | AsyncEngine]]] = {
    "Database-AsyncEngine": (Database, async_sqlite),
    "AsyncDatabase-Engine": (AsyncDatabase, sqlite),
    "session-for-handle": (AsyncSession, async_sqlite),
    "factory-for-handle": (async_sessionmaker, async_sqlite),
}


@pytest.mark.parametrize(("annotation", "engine"), HANDLES.values(), ids=HANDLES)
async def test_a_handle_s_annotation_is_checked(
    annotation: Any, engine: Callable[[], Engine | AsyncEngine]
) -> None:
    """A handle annotated as the other handle class, a session or a factory fails start-up."""
    with pytest.raises(DatabaseDependencyError, match=r"gives (Async)?Database\."):
        await start(annotated(annotation, get_database_handle), engine)


ADVICE: dict[str, tuple[Any, Callable[[str], Dependency], str]] = {
    "colour": (Session, get_db, "Install the other kind of engine"),
    "colour-of-a-handle": (Database, get_database_handle, "Install the other kind of engine"),
    "handle-for-session": (AsyncDatabase, get_db, r"Depend on get_database_handle\('orders'\)"),
    "either-handle": (Database | AsyncDatabase, transactional, "Depend on get_database_handle"),
    "session-for-handle": (AsyncSession, get_database_handle, r"Depend on get_db\('orders'\)"),
    "factory": (async_sessionmaker, get_db, r"Use Annotated\[AsyncDatabase, Depends\(get_da"),
    "factory-for-handle": (
        sessionmaker[Session],
        get_database_handle,
        r"'orders'\)\)\], and call its session\(\)",
    ),
}


@pytest.mark.parametrize(("annotation", "ours", "advice"), ADVICE.values(), ids=ADVICE)
async def test_a_contradiction_names_what_to_depend_on(
    annotation: Any, ours: Callable[[str], Dependency], advice: str
) -> None:
    """The error says which dependency or kind of engine would match the annotation."""
    with pytest.raises(DatabaseDependencyError, match=advice):
        await start(annotated(annotation, ours))


AGREEMENTS: dict[str, tuple[Any, Callable[[], Engine | AsyncEngine]]] = {
    "Session": (Session, sqlite),
    "AsyncSession": (AsyncSession, async_sqlite),
    "optional": (Session | None, sqlite),
    "either": (Session | AsyncSession, async_sqlite),
    "any": (Any, async_sqlite),
    "object": (object, async_sqlite),
    "protocol": (Executes, async_sqlite),
    "own-class": (Repository, async_sqlite),
    "base-class": (AsyncSession.__mro__[1], async_sqlite),
    "context-manager": (AbstractAsyncContextManager, async_sqlite),
    "session-or-handle": (AsyncSession | AsyncDatabase, async_sqlite),
    "session-or-factory": (async_sessionmaker[AsyncSession] | AsyncSession, async_sqlite),
    "list": (list[Session], async_sqlite),
    "class": (type[Session], async_sqlite),
    "alias": (SYNC_ALIAS, sqlite),
    "text": ("Session", async_sqlite),
}


@pytest.mark.parametrize(("annotation", "engine"), AGREEMENTS.values(), ids=AGREEMENTS)
async def test_an_annotation_that_may_fit_is_left_alone(
    annotation: Any, engine: Callable[[], Engine | AsyncEngine]
) -> None:
    """An annotation that fits, could fit or has nothing to do with sessions passes the check."""
    await start(annotated(annotation), engine)


HANDLES_THAT_FIT: dict[str, tuple[Any, Callable[[], Engine | AsyncEngine]]] = {
    "Database": (Database, sqlite),
    "AsyncDatabase": (AsyncDatabase, async_sqlite),
    "either": (Database | AsyncDatabase, async_sqlite),
    "handle-or-session": (AsyncDatabase | AsyncSession, async_sqlite),
    "handle-or-factory": (sessionmaker[Session] | Database | None, sqlite),
    "base-class": (Database.__mro__[1], sqlite),
    "protocol": (Executes, async_sqlite),
    "object": (object, sqlite),
    "any": (Any, sqlite),
}


@pytest.mark.parametrize(("annotation", "engine"), HANDLES_THAT_FIT.values(), ids=HANDLES_THAT_FIT)
async def test_a_handle_s_annotation_that_fits_starts(
    annotation: Any, engine: Callable[[], Engine | AsyncEngine]
) -> None:
    """A handle may be annotated with its class, a union, a base class, a protocol or `Any`."""
    await start(annotated(annotation, get_database_handle), engine)


async def test_an_unannotated_parameter_starts() -> None:
    """A parameter without an annotation passes the check."""
    app = as_an_annotation(get_db("orders"))

    @app.get("/unannotated")
    async def unannotated(session=Depends(get_db("orders"))): ...  # type: ignore[no-untyped-def] # on purpose

    await start(app)


async def test_a_default_value_s_annotation_is_checked() -> None:
    """An annotation in the old style, `session: Session = Depends(...)`, is checked too."""
    app = FastAPI()

    @app.get("/items")
    async def endpoint(session: Session = Depends(get_db("orders"))) -> None: ...

    with pytest.raises(DatabaseDependencyError, match="annotated with Session"):
        await start(app)


async def test_annotations_are_checked_at_every_depth() -> None:
    """A repository's annotation is checked like an endpoint's, and the error names its class."""

    class Orders:
        def __init__(self, session: Annotated[Session, Depends(get_db("orders"))]) -> None: ...

    with pytest.raises(DatabaseDependencyError, match=r"of .*Orders is annotated"):
        await start(in_a_sub_dependency(Orders))


FUTURE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Annotated
from fastapi import Depends, FastAPI
from sqlalchemy.orm import Session
from fastapi_sqlnative import get_db
if TYPE_CHECKING:
    from elsewhere import Unknown

app = FastAPI()
"""
ENDPOINT = """
@app.get("/items")
def endpoint(session: Annotated[Session, Depends(get_db("orders"))]) -> None: ...
"""
UNREADABLE = """
@app.get("/items")
async def endpoint(session: Annotated[Session, Depends(get_db("orders"))]) -> Unknown: ...
"""
ALIAS = """
type Db = Annotated[Session, Depends(get_db("orders"))]

@app.get("/items")
def endpoint(session: Db) -> None: ...
"""
INNER_ALIAS = """
type Kind = Session
type Maybe = Kind | None

@app.get("/items")
def endpoint(session: Annotated[Maybe, Depends(get_db("orders"))]) -> None: ...
"""


def application_in(source: str) -> FastAPI:
    """Run a module's source, and return its application."""
    module: dict[str, Any] = {"__name__": "application"}
    exec(compile(source, "application", "exec", dont_inherit=True), module)
    app: FastAPI = module["app"]
    return app


SOURCES = {"future": FUTURE + ENDPOINT}
if sys.version_info >= (3, 12) and not OLD:
    SOURCES |= {"type-alias": FUTURE + ALIAS, "inner-type-alias": FUTURE + INNER_ALIAS}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
async def test_annotations_in_strings_are_read(source: str) -> None:
    """Annotations in `type` aliases and under `from __future__ import annotations` are checked."""
    with pytest.raises(DatabaseDependencyError, match="annotated with Session"):
        await start(application_in(source))
    await start(application_in(source), sqlite)


@pytest.mark.skipif(OLD, reason="this FastAPI refuses the route")
async def test_an_alias_for_the_whole_dependency_is_read() -> None:
    """The annotation in an alias for `Annotated[Session, Depends(...)]` is checked."""
    app = FastAPI()

    async def endpoint(session: Any) -> None: ...

    endpoint.__annotations__["session"] = DEPENDS_ALIAS
    app.get("/items")(endpoint)
    with pytest.raises(DatabaseDependencyError, match="annotated with Session"):
        await start(app)


@pytest.mark.skipif(OLD, reason="this FastAPI refuses the route")
async def test_an_annotation_that_cannot_be_read_is_no_mistake() -> None:
    """A signature with a name that only the type checker knows does not fail start-up."""
    source = (FUTURE + UNREADABLE).replace('"/items"', '"/items", response_model=None')
    await start(application_in(source))
