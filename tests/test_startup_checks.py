"""Rule 11: functions and routes that cannot work are found before they serve a request."""

import functools
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from enum import Enum
from types import GenericAlias
from typing import Annotated, Any, Generic, Literal, TypedDict, TypeVar, cast
from uuid import UUID

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, routing
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sqlalchemy import Column, Integer, Table, event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.ext.declarative import DeferredReflection
from sqlalchemy.orm import DeclarativeBase, Session
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from fastapi_sqlnative import (
    get_database_handle,
    get_db,
    install_database,
    reader,
    transactional,
)
from fastapi_sqlnative.cancellation import deadline
from fastapi_sqlnative.exceptions import (
    DatabaseDependencyError,
    DatabaseNotInstalledError,
)
from tests.in_process import async_sqlite, running, sqlite, start_and_stop

pytestmark = pytest.mark.anyio

Db = Annotated[AsyncSession, Depends(get_db())]
SyncDb = Annotated[Session, Depends(get_db())]


class Base(DeclarativeBase):
    """The base of this module's tables."""


class Visit(Base):
    """A row."""

    __table__ = Table("visit", Base.metadata, Column("id", Integer, primary_key=True))


def with_database(*, asynchronous: bool = True, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    install_database(app, engine=async_sqlite if asynchronous else sqlite)
    return app


# -- functions that cannot await ---------------------------------------------------------------


@pytest.mark.parametrize("ours", [get_db, transactional, reader])
async def test_a_plain_endpoint_cannot_use_an_async_session(ours: Callable[..., Any]) -> None:
    """A `def` endpoint with an AsyncSession fails start-up, because it cannot await anything."""
    app = with_database()

    @app.post("/items")
    def endpoint(session: Annotated[AsyncSession, Depends(ours())]) -> None:
        session.add(object())

    with pytest.raises(DatabaseDependencyError, match=r"'/items'.*endpoint is not an `async def`"):
        await start_and_stop(app)


async def test_a_plain_endpoint_that_gets_no_session() -> None:
    """A `def` endpoint may have an async transaction in `dependencies`: it gets no session."""
    app = with_database()
    app.add_api_route("/items", lambda: 7, dependencies=[Depends(transactional())])
    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


def executes(session: Db) -> Any:
    session.execute(text("SELECT 1")).close()  # that is the mistake


def commits(session: Db) -> Any:
    session.commit()  # type: ignore[unused-coroutine] # that is the mistake


def commits_and_rebinds(session: Db) -> Any:
    session.commit()  # type: ignore[unused-coroutine] # that is the mistake
    session = Facade(session)  # type: ignore[assignment] # too late
    return session.execute(text("SELECT 1"))


def commits_if(session: Db) -> Any:
    stored = True
    if stored:
        session.commit()  # type: ignore[unused-coroutine] # that is the mistake


def iterates(session: Any = Depends(get_db())) -> Any:
    for _row in session.scalars(text("SELECT 1")):  # that is the mistake
        pass


def gives_a_reader(session: Any = Depends(get_db())) -> Any:
    def read() -> Any:
        return session.execute(text("SELECT 1")).scalar()  # that is the mistake

    return read


def passes_on(session: Db) -> Any:
    return Repository(session)


def adds(session: Db) -> Any:
    session.add(Visit())
    session.expunge_all()
    return session


def commits_another(session: Db) -> Any:
    queue = Facade(session)
    queue.commit()
    return session


def returns(session: Db) -> Any:
    return session


class Repository:
    """A class that keeps the session, so that others can await its methods."""

    def __init__(self, session: Db) -> None:
        self.session = session

    def with_(self, _read: Callable[[Session], Any]) -> "Repository":
        return self


@pytest.mark.parametrize(
    "dependency",
    [executes, commits, commits_and_rebinds, commits_if, iterates, gives_a_reader],
)
async def test_a_plain_dependency_that_uses_an_async_session(dependency: Any) -> None:
    """A `def` dependency that calls an awaitable method of the session fails start-up."""
    app = with_database()

    @app.get("/items")
    async def endpoint(found: Annotated[Any, Depends(dependency)]) -> None: ...

    name = dependency.__name__
    with pytest.raises(DatabaseDependencyError, match=rf"'/items'.*{name} is not an `async def`"):
        await start_and_stop(app)


def gives_a_report(session: Db) -> Any:
    def report(session: Session) -> Any:
        session.execute(text("SELECT 1")).close()
        return session

    report.session = session  # type: ignore[attr-defined] # functions may have attributes
    return report


def gives_a_lambda(session: Db) -> Any:
    return Repository(session).with_(lambda session: session.execute(text("SELECT 1")).scalar())


def of_both_colours(session: Annotated[Any, Depends(get_db())]) -> Any:
    if isinstance(session, Session):
        session.execute(text("SELECT 1")).close()
    return session


class Facade(Repository):
    """A class with methods like a session's."""

    def execute(self, statement: object) -> "Facade":
        return self

    def commit(self) -> None: ...


def wraps(session: Annotated[Any, Depends(get_db())]) -> Any:
    session = Facade(session)
    session.commit()
    session = session.execute(text("SELECT 1"))
    return session.session


@pytest.mark.parametrize(
    "dependency",
    [
        *(passes_on, returns, adds, commits_another, Repository),
        *(gives_a_report, gives_a_lambda, of_both_colours, wraps),
    ],
)
async def test_a_plain_dependency_may_pass_a_session_on(dependency: Any) -> None:
    """A `def` dependency may pass the session on, and the endpoint that receives it can use it."""
    app = with_database()

    @app.get("/items")
    async def endpoint(found: Annotated[Any, Depends(dependency)]) -> int:
        session = getattr(found, "session", found)
        return int(await session.scalar(text("SELECT 7")))

    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


def decorated(ours: Callable[..., Any], **others: Any) -> Any:
    """Decorate one of the package's dependencies to return plain data and to need others."""

    @functools.wraps(ours)
    async def counts(connection: Any, **_: object) -> int:
        session = await ours(connection=connection)
        return int(await session.scalar(text("SELECT 7")))

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=Depends(each))
        for name, each in others.items()
    ]
    made: Any = counts
    made.__signature__ = inspect.Signature([*inspect.signature(ours).parameters.values(), *added])
    return made


@pytest.mark.parametrize("ours", [get_db(), reader()])
async def test_a_decorator_may_make_something_else_of_the_session(ours: Any) -> None:
    """A `def` endpoint may use a decorated dependency that returns data instead of the session."""
    app = with_database()

    @app.get("/items")
    def endpoint(found: Annotated[int, Depends(decorated(ours), scope="request")]) -> int:
        return found

    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


async def test_what_a_decorator_returns_may_have_any_type() -> None:
    """The annotation of a decorated dependency may name another kind of session than ours."""
    app, ours = with_database(), get_db()

    @functools.wraps(ours)
    async def behind(connection: Any) -> Session:
        session: Any = await ours(connection=connection)
        found: Session = session.sync_session
        return found

    made: Any = behind
    made.__signature__ = inspect.signature(ours)

    @app.get("/items")
    async def endpoint(found: Annotated[Session, Depends(made)]) -> bool:
        return type(found).__name__ != "AsyncSession"

    async with running(app) as client:
        assert (await client.get("/items")).json() is True


async def test_what_a_decorator_needs_is_checked_too() -> None:
    """If a decorator adds a dependency, the database of that dependency must be installed."""
    app = with_database()
    app.get("/items", dependencies=[Depends(decorated(get_db(), other=get_db("gone")))])(print)
    with pytest.raises(DatabaseNotInstalledError, match="gone"):
        await start_and_stop(app)


async def test_a_database_behind_a_partial_is_checked_too() -> None:
    """The database of a dependency behind a `functools.partial` must be installed."""
    app = with_database()
    app.get("/items", dependencies=[Depends(functools.partial(get_db("gone")))])(print)
    with pytest.raises(DatabaseNotInstalledError, match="gone"):
        await start_and_stop(app)


@pytest.mark.parametrize("ours", [get_db("gone"), transactional("gone"), reader("gone")])
async def test_what_is_overridden_is_not_checked(ours: Any) -> None:
    """An overridden dependency may name a database that is not installed."""
    app = with_database()
    app.get("/items", dependencies=[Depends(ours)])(lambda: 7)
    app.dependency_overrides[ours] = lambda: None
    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


# -- generators --------------------------------------------------------------------------------


def yields(session: SyncDb) -> Generator[str]:
    yield "line"


async def yields_async(session: Db) -> AsyncGenerator[str]:
    yield "line"


@pytest.mark.parametrize("endpoint", [yields, yields_async])
async def test_an_endpoint_that_yields_outlives_its_session(endpoint: Any) -> None:
    """An endpoint that yields its response and uses the request's session fails start-up."""
    app = with_database(asynchronous=endpoint is yields_async)
    app.add_api_route("/items", endpoint, response_model=None)
    with pytest.raises(DatabaseDependencyError, match=r"get_database_handle\('default'\)"):
        await start_and_stop(app)


async def library(session: Db) -> AsyncGenerator[AsyncSession]:
    """Yield the session, as a library's dependency whose scope cannot be changed."""
    yield session


async def of_the_application(session: Db) -> AsyncSession:
    return session


async def test_a_generator_that_exits_before_the_response_is_not_refused() -> None:
    """With `scope="function"`, a library's generator may have the session."""
    app = with_database()

    @app.get("/items")
    async def endpoint(
        session: Annotated[AsyncSession, Depends(library, scope="function")],
    ) -> int:
        return int(await session.scalar(text("SELECT 7")) or 0)

    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


async def test_the_advice_for_a_generator_works_as_written() -> None:
    """A dependency that returns the session can replace a library's generator, as advised."""
    app = with_database()

    @app.get("/items")
    async def endpoint(session: Annotated[AsyncSession, Depends(library)]) -> int:
        return int(await session.scalar(text("SELECT 7")) or 0)

    with pytest.raises(DatabaseDependencyError, match="a function that returns"):
        await start_and_stop(app)
    app.dependency_overrides[library] = of_the_application
    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


async def test_the_advice_for_data_works_as_written() -> None:
    """A generator starts once its dependency has a return annotation for the data, as advised."""
    app = with_database()

    async def read(session: Db):  # type: ignore[no-untyped-def] # as in FastAPI's tutorial
        return await session.scalar(text("SELECT 7"))

    async def logs(value: Annotated[Any, Depends(read)]) -> AsyncGenerator[None]:
        yield

    app.add_api_route("/items", lambda: 7, dependencies=[Depends(logs)])
    with pytest.raises(DatabaseDependencyError, match="annotate the return type"):
        await start_and_stop(app)
    read.__annotations__["return"] = int
    await start_and_stop(app)


class Visitor(BaseModel):
    """Data about a request, which holds no session."""

    name: str = "Ada"


class Member(DeferredReflection, Base):
    """A row whose table is not reflected yet."""

    __tablename__ = "member"


async def visitor(session: Db):  # type: ignore[no-untyped-def] # as in FastAPI's tutorial
    await session.execute(text("SELECT 1"))
    return Visitor()


def repository(session: Db):  # type: ignore[no-untyped-def] # the same
    return Repository(session)


async def logs(visitor: Annotated[Visitor | None, Depends(visitor)]) -> AsyncGenerator[None]:
    yield
    logging.getLogger(__name__).info("%s has left", visitor)


async def logs_row(member: Annotated[Member | None, Depends(visitor)]) -> AsyncGenerator[None]:
    yield
    logging.getLogger(__name__).info("%s has left", member)


class Role(Enum):
    """The role of a visitor."""

    READER = 1


class Found(TypedDict):
    """Data that was read about a visitor."""

    id: int


def given(value: Any) -> Callable[..., AsyncGenerator[None]]:
    async def logs_value(value: Annotated[Any, Depends(visitor)]) -> AsyncGenerator[None]:
        yield
        logging.getLogger(__name__).info("%s has left", value)

    logs_value.__annotations__["value"] = Annotated[value, Depends(visitor)]
    return logs_value


class Alias:
    """A `type` alias of Python 3.12, whose value is evaluated on access."""

    def __init__(self, evaluate: Callable[[], object]) -> None:
        self.evaluate = evaluate

    @property
    def __value__(self) -> object:
        return self.evaluate()


def imported_for_type_checkers() -> object:
    raise NameError("name 'Imported' is not defined")


JSON: Any = Alias(lambda: GenericAlias(dict, (str, JSON)) | str)
REPOSITORIES: Any = Alias(lambda: GenericAlias(list, REPOSITORIES) | Repository)


def returned(value: Any) -> Callable[..., AsyncGenerator[None]]:
    def read(session: Db) -> Any: ...

    async def logs_result(result: Annotated[Any, Depends(read)]) -> AsyncGenerator[None]:
        yield

    read.__annotations__["return"] = value
    return logs_result


async def saves(repository: Annotated[Repository, Depends(repository)]) -> AsyncGenerator[None]:
    yield
    await repository.session.commit()  # that is the mistake


async def saves_any(repository: Annotated[Any, Depends(repository)]) -> AsyncGenerator[None]:
    yield
    await repository.session.commit()  # that is the mistake


async def saves_object(repository: Annotated[object, Depends(repository)]) -> AsyncGenerator[None]:
    yield
    await cast("Repository", repository).session.commit()  # that is the mistake


async def saves_hidden(repository: Any = Depends(repository)) -> AsyncGenerator[None]:
    yield
    await repository.session.commit()  # that is the mistake


def hidden(session: Db) -> Any:
    return Repository(session)


async def saves_of_hidden(repository: Annotated[Any, Depends(hidden)]) -> AsyncGenerator[None]:
    yield
    await repository.session.commit()  # that is the mistake


def hidden_row(session: Db) -> Any:
    return {"name": "Ada"}


async def logs_hidden(row: Annotated[dict[str, str], Depends(hidden_row)]) -> AsyncGenerator[None]:
    yield
    logging.getLogger(__name__).info("%s has left", row["name"])


Kind = TypeVar("Kind", bound=Repository)


def typed(session: Db) -> Repository:
    return Repository(session)


class Service:
    """A service that holds a repository, and takes another service."""

    def __init__(self, repository: Repository, next_one: "Service | None" = None) -> None:
        self.repository = repository


def service(repository: Annotated[Repository, Depends(typed)]) -> Service:
    return Service(repository)


class Make(Generic[Kind]):
    """A dependency that makes any kind of repository."""

    def __init__(self, kind: type[Kind]) -> None:
        self.kind = kind

    def __call__(self, session: Db) -> Kind:
        return self.kind(session)


async def saves_typed(repository: Annotated[Repository, Depends(typed)]) -> AsyncGenerator[None]:
    yield
    await repository.session.commit()  # that is the mistake


async def saves_of_service(service: Annotated[Service, Depends(service)]) -> AsyncGenerator[None]:
    yield
    await service.repository.session.commit()  # that is the mistake


async def saves_made(
    repository: Annotated[Repository, Depends(Make(Repository))],
) -> AsyncGenerator[None]:
    yield
    await repository.session.commit()  # that is the mistake


class Caller:
    """Data that was read for a request, in a class of the application."""

    def __init__(self, name: str, origin: "Caller | None" = None) -> None:
        self.name = name


async def caller(session: Db) -> Caller:
    return Caller(str(await session.scalar(text("SELECT 'Ada'"))))


class Report:
    """Data that was read and is written later, in separate sessions."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], kind: type[Repository]) -> None:
        self.sessions = sessions


async def report(session: Db) -> Report:
    return Report(async_sessionmaker(), Repository)


async def logs_report(report: Annotated[Report, Depends(report)]) -> AsyncGenerator[None]:
    yield
    logging.getLogger(__name__).info("%s is written", report)


async def logs_caller(caller: Annotated[Caller, Depends(caller)]) -> AsyncGenerator[None]:
    yield
    logging.getLogger(__name__).info("%s has left", caller.name)


# As for a name that is imported only under TYPE_CHECKING.
saves_hidden.__annotations__["repository"] = hidden.__annotations__["return"] = "Hidden"
hidden_row.__annotations__["return"] = "Hidden"


class Streams(Repository):
    """A repository whose instances may be called to stream, while FastAPI calls only the class."""

    async def __call__(self) -> AsyncGenerator[int]:
        yield 7


async def logs_streams(streams: Annotated[Streams, Depends()]) -> None: ...


def by_name(session: Db):  # type: ignore[no-untyped-def] # the same
    return {"default": session}


def pair(session: Db) -> tuple[Visitor, AsyncSession]:
    return Visitor(), session


async def saves_one(
    sessions: Annotated[dict[str, AsyncSession], Depends(by_name)],
) -> AsyncGenerator[None]:
    yield
    await sessions["default"].commit()  # that is the mistake


async def saves_second(
    given: Annotated[tuple[Visitor, AsyncSession], Depends(pair)],
) -> AsyncGenerator[None]:
    yield
    await given[1].commit()  # that is the mistake


VALUES: list[Any] = [UUID, Role, Found, Literal["a", 1], datetime | None, Decimal, Visit]
WITH_DATA: list[Any] = [logs, logs_row, logs_caller, logs_report, *map(given, VALUES)]
WITH_DATA += [returned(JSON), returned(Alias(imported_for_type_checkers))]
WITH_SESSION = [saves, saves_any, saves_one, saves_second, saves_object]
WITH_SESSION += [saves_typed, saves_of_service, saves_made, returned(REPOSITORIES)]
# Older versions of FastAPI evaluate all annotations, and take such a class for a generator.
if hasattr(routing, "iter_route_contexts"):
    WITH_DATA += [logs_streams, logs_hidden]
    WITH_SESSION += [saves_hidden, saves_of_hidden]


@pytest.mark.parametrize(
    ("generator", "works"),
    [(each, True) for each in WITH_DATA] + [(each, False) for each in WITH_SESSION],
)
async def test_a_generator_may_outlive_the_session_with_data(generator: Any, works: bool) -> None:
    """A generator may outlive the session with data, but not with objects made from the session."""
    app = with_database()
    app.add_api_route("/items", lambda: 7, dependencies=[Depends(generator)])
    if not works:
        with pytest.raises(DatabaseDependencyError, match=f"generator {generator.__qualname__}"):
            await start_and_stop(app)
        return
    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


# -- overrides and endpoints of any kind -------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "arguments"),
    [(get_db, "name"), (transactional, "name"), (reader, "name"), (deadline, "seconds")],
)
async def test_an_override_of_the_maker_can_never_match(
    maker: Callable[..., Any], arguments: str
) -> None:
    """An override of `get_db`, without the call, fails start-up, and the error names the call."""
    app = with_database()
    app.dependency_overrides[maker] = of_the_application
    call = rf"{maker.__name__}\({arguments}\)"
    with pytest.raises(DatabaseDependencyError, match=rf"dependency_overrides\[{call}\]"):
        await start_and_stop(app)


async def test_an_override_that_can_never_match_is_refused_by_the_next_request() -> None:
    """An override that can never match fails the next request if it is set after start-up.

    Tests do that, too, and must not go on with the installed database.
    """
    app = with_database()

    @app.get("/items")
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db())]) -> None: ...

    async with running(app) as client:
        assert (await client.get("/items")).status_code == 200
        app.dependency_overrides[get_db] = of_the_application
        with pytest.raises(
            DatabaseDependencyError, match=r"dependency_overrides\[get_db\(name\)\]"
        ):
            await client.get("/items")


class Unhashable:
    """An endpoint object without a hash."""

    __hash__ = None  # type: ignore[assignment] # as in a dataclass
    __name__ = "unhashable"

    async def __call__(self, session: Db) -> int:
        return int(await session.scalar(text("SELECT 7")) or 0)


async def test_an_endpoint_needs_no_hash() -> None:
    """A callable object without a hash can be an endpoint."""
    app = with_database()
    app.add_api_route("/items", Unhashable())
    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


def counted(session: Db) -> None: ...


class Method:
    """An async callable that a decorator makes of a function, and that also works in a class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)

    def __get__(self, *_: object) -> "Method":
        return self

    async def __call__(self, session: Db) -> int:
        return int(await session.scalar(text("SELECT 7")) or 0)


async def test_a_decorators_object_may_be_an_endpoint() -> None:
    """An async callable object can be an endpoint even if it wraps a function that is not async."""
    app = with_database()
    app.add_api_route("/items", Method(counted))
    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


# -- what dependencies return --------------------------------------------------------------------


class AuditedSession(AsyncSession):
    """An application's own session class."""

    async def audit(self) -> int:
        return int(await self.scalar(text("SELECT 7")) or 0)


class AuditedSyncSession(Session):
    """An application's own session class for an Engine."""


def audited(annotation: Any, *, asynchronous: bool = True, **options: Any) -> FastAPI:
    app = FastAPI()
    engine = async_sqlite if asynchronous else sqlite
    install_database(app, engine=engine, session_options=options)

    @app.get("/items")
    async def endpoint(session: Annotated[annotation, Depends(get_db())]) -> int:  # pyright: ignore[reportInvalidTypeForm]
        return await session.audit() if hasattr(session, "audit") else 7

    return app


@pytest.mark.parametrize(
    ("annotation", "asynchronous"), [(AuditedSession, True), (AuditedSyncSession, False)]
)
async def test_an_annotation_narrower_than_the_session(annotation: Any, asynchronous: bool) -> None:
    """An annotation narrower than the session class fails start-up, and the suggested fix works."""
    app = audited(annotation, asynchronous=asynchronous)
    advice = rf"session_options=\{{\"class_\": {annotation.__name__}\}}"
    with pytest.raises(DatabaseDependencyError, match=advice):
        await start_and_stop(app)
    advised = audited(annotation, asynchronous=asynchronous, class_=annotation)
    async with running(advised) as client:
        assert (await client.get("/items")).json() == 7


async def test_an_annotation_may_be_wider_than_the_session() -> None:
    """An annotation with SQLAlchemy's class fits the application's own session class."""
    async with running(audited(AsyncSession, class_=AuditedSession)) as client:
        assert (await client.get("/items")).json() == 7


@pytest.mark.parametrize("dependency", [get_db(), transactional(), reader(), get_database_handle()])
async def test_a_dependency_without_a_request_says_what_to_do(dependency: Any) -> None:
    """A dependency called directly, as in a unit test, raises an error that names another way."""
    with pytest.raises(DatabaseDependencyError, match=r"called directly.* isolated\(app\)"):
        await dependency()


@pytest.mark.parametrize("dependency", [get_db(), reader()])
async def test_a_dependency_called_in_a_middleware_says_what_to_do(dependency: Any) -> None:
    """A dependency called in a middleware raises an error that names another way.

    A middleware has a request, but nothing would end a session that it opened.
    """
    app = with_database()

    @app.middleware("http")
    async def look(request: Request, call_next: Callable[[Request], Any]) -> Any:
        with pytest.raises(DatabaseDependencyError, match=r"installed_databases\(request\.app\)"):
            await dependency(request)
        return await call_next(request)

    @app.get("/items")
    async def endpoint(session: Annotated[AsyncSession, Depends(get_db())]) -> int:
        return await session.scalar(text("SELECT 7")) or 0

    async with running(app) as client:
        assert (await client.get("/items")).json() == 7


@pytest.mark.parametrize("dependency", [get_db(), transactional(), reader()])
async def test_a_dependency_called_after_the_request_says_what_to_do(dependency: Any) -> None:
    """A dependency called after the request raises an error that names another way.

    Nothing would end a session that was opened after the request's own has ended.
    """
    app = with_database()
    called: list[str] = []

    async def call(request: Request, where: str) -> None:
        with pytest.raises(DatabaseDependencyError, match=r"installed_databases\(request\.app\)"):
            await dependency(request)
        called.append(where)

    @app.middleware("http")
    async def look(request: Request, call_next: Callable[[Request], Any]) -> Any:
        answer = await call_next(request)
        await call(request, "middleware")
        return answer

    @app.exception_handler(ZeroDivisionError)
    async def answer(request: Request, _: Exception) -> Response:
        await call(request, "exception handler")
        return Response(status_code=409)

    async def leaving(request: Request) -> AsyncGenerator[None]:
        yield
        await call(request, "exit")

    @app.get("/items", dependencies=[Depends(leaving, scope="function")])
    async def endpoint(
        request: Request,
        tasks: BackgroundTasks,
        session: Annotated[AsyncSession, Depends(get_db())],
        by: int,
    ) -> float:
        tasks.add_task(call, request, "background task")
        return 7 / by

    async with running(app) as client:
        assert (await client.get("/items?by=1")).json() == 7
        assert (await client.get("/items?by=0")).status_code == 409
    assert sorted(called) == [
        "background task",
        "exception handler",
        "exit",
        "middleware",
        "middleware",
    ]


# -- routes that the application's own lifespan adds -------------------------------------------


def adding(endpoint: Callable[..., Any]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        app.add_api_route("/late", endpoint, methods=["GET"])
        yield

    return with_database(lifespan=lifespan)


async def outlives(session: Annotated[Any, Depends(get_db(), scope="request")]) -> None: ...


async def reads(session: Db) -> int:
    return int(await session.scalar(text("SELECT 7")) or 0)


async def unknown(session: Annotated[AsyncSession, Depends(get_db("elsewhere"))]) -> None: ...


async def test_a_late_route_that_cannot_work_fails_the_start() -> None:
    """A route that the lifespan adds with a wrong scope fails start-up."""
    with pytest.raises(DatabaseDependencyError, match="'/late'"):
        await start_and_stop(adding(outlives))


async def test_a_late_route_with_an_unknown_name_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A route that the lifespan adds with an unknown name is logged, and its requests fail."""
    app = adding(unknown)
    with caplog.at_level(logging.ERROR, "fastapi_sqlnative"):
        async with running(app) as client:
            assert "'/late'" in caplog.text
            assert "'elsewhere'" in caplog.text
            with pytest.raises(DatabaseNotInstalledError):
                await client.get("/late")


async def test_a_late_route_that_is_right_serves() -> None:
    """A correct route that the lifespan adds is served like any other."""
    async with running(adding(reads)) as client:
        assert (await client.get("/late")).json() == 7


@pytest.mark.parametrize("mounted", [False, True])
async def test_a_route_added_while_requests_run_is_checked_by_its_first_request(
    mounted: bool,
) -> None:
    """A wrong route that is added to a running application fails its first request."""
    app, below = with_database(), FastAPI()
    app.mount("/below", below)
    async with running(app) as client:
        (below if mounted else app).add_api_route("/late", outlives)
        with pytest.raises(DatabaseDependencyError, match="'/late'"):
            await client.get("/below/late" if mounted else "/late")


async def test_a_router_included_while_requests_run_is_checked_with_its_dependencies() -> None:
    """The first request of a route checks the dependencies of its router's inclusion, too."""
    app, router = with_database(), APIRouter()
    router.add_api_route("/late", lambda: 7)
    async with running(app) as client:
        app.include_router(router, prefix="/in", dependencies=[Depends(outlives)])
        with pytest.raises(DatabaseDependencyError, match="'/in/late'"):
            await client.get("/in/late")


class Versioned(BaseRoute):
    """A route, without an application of its own, that chooses another one for each request."""

    def __init__(self, chosen: APIRoute) -> None:
        self.chosen = chosen

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return self.chosen.matches(scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.chosen.handle(scope, receive, send)


@pytest.mark.parametrize("right", [True, False])
async def test_a_route_that_only_another_route_knows_is_checked_by_its_first_request(
    right: bool,
) -> None:
    """A route that is not among the application's own is checked by its first request."""
    app = with_database()
    app.router.routes.append(Versioned(APIRoute("/items", reads if right else outlives)))
    async with running(app) as client:
        if right:
            assert (await client.get("/items")).json() == 7
        else:
            with pytest.raises(DatabaseDependencyError, match="'/items'"):
                await client.get("/items")


# -- route classes -----------------------------------------------------------------------------


class Answering(APIRoute):
    """A route that turns an exception of its endpoint into a response."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        original = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await original(request)
            except ZeroDivisionError:
                return JSONResponse({}, 200)

        return handler


@pytest.mark.parametrize("uses_a_database", [True, False])
async def test_a_route_class_of_its_own_is_warned_of(
    caplog: pytest.LogCaptureFixture, uses_a_database: bool
) -> None:
    """Only a custom route class is reported, once, and only for a route that uses a database.

    Such a class runs around the commit.
    """
    app, router = with_database(), APIRouter(route_class=Answering)

    async def with_session(session: Db) -> None: ...

    async def without() -> None: ...

    router.add_api_route("/items", with_session if uses_a_database else without)
    app.include_router(router)
    app.add_api_route("/ordinary", with_session)
    with caplog.at_level(logging.WARNING, "fastapi_sqlnative"):
        await start_and_stop(app)
    assert caplog.text.count("Answering") == len(caplog.records) == uses_a_database


async def test_what_a_route_class_answers_is_a_success() -> None:
    """If a route class answers an exception, what was written is stored, as the warning says."""
    app, router = with_database(), APIRouter(route_class=Answering)

    @router.post("/items")
    async def fail(session: Annotated[AsyncSession, Depends(transactional())]) -> None:
        committed = event.listens_for(session.sync_session, "after_commit")
        committed(lambda _session: stored.append(True))
        await session.execute(text("CREATE TABLE item (id int)"))
        raise ZeroDivisionError

    stored: list[bool] = []
    app.include_router(router)
    async with running(app) as client:
        assert (await client.post("/items")).status_code == 200
    assert stored == [True]
