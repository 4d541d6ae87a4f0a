"""The contestants: applications with the same routes, each built as its documentation says.

All engines have the same options, whether a package receives or creates them. With the other
options that a documentation recommends (such as a ping before each use), the comparison would
measure those options instead.
"""

import importlib
import importlib.metadata
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import sessionmaker

from tests.peers.workloads import WORKLOADS, Workload

POOL = {"pool_size": 10, "max_overflow": 0}

# -- how a route gets its session, and what commits ------------------------------------------------

Endpoint = Callable[..., Any]
Way = Callable[[Workload], Endpoint]


def declared(dependency: Any, *, asynchronous: bool = True, commit: bool = False) -> Way:
    """Declare the session as a dependency, and with `commit` have the endpoint commit writes."""

    def endpoint(workload: Workload) -> Endpoint:
        commits = commit and workload.writes

        async def serve(session: Any = dependency) -> Any:
            result = await workload.work(session)
            if commits:
                await session.commit()
            return result

        def serve_sync(session: Any = dependency) -> Any:
            assert workload.work_sync is not None
            result = workload.work_sync(session)
            if commits:
                session.commit()
            return result

        return serve if asynchronous else serve_sync

    return endpoint


def opened(open_session: Callable[[], Any], *, asynchronous: bool) -> Way:
    """Open the session in the endpoint."""

    def endpoint(workload: Workload) -> Endpoint:
        async def serve() -> Any:
            async with open_session() as session:
                return await workload.work(session)

        def serve_sync() -> Any:
            assert workload.work_sync is not None
            with open_session() as session:
                return workload.work_sync(session)

        return serve if asynchronous else serve_sync

    return endpoint


def found(find_session: Callable[[], Any]) -> Way:
    """Have the package find the request's session in a context variable."""

    def endpoint(workload: Workload) -> Endpoint:
        async def serve() -> Any:
            session = find_session()
            session = session if isinstance(session, AsyncSession) else await session
            return await workload.work(session)

        return serve

    return endpoint


# -- the contestants ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """An application without routes, and how routes get sessions of its last database."""

    app: FastAPI
    read: Way
    write: Way


# The arguments are the URLs of the databases, and whether the engines are asynchronous.
Build = Callable[[Sequence[str], bool], Built]


@dataclass(frozen=True)
class Contestant:
    """An application that is compared.

    Attributes:
        name: its name on the page.
        build: builds the application.
        package: its distribution, or empty for this package and for hand-written code.
        only_asynchronous: whether it lacks synchronous sessions.
        only_reads: whether it lacks a way to write.
    """

    name: str
    build: Build
    package: str = ""
    only_asynchronous: bool = False
    only_reads: bool = False

    @property
    def version(self) -> str | None:
        """Return the installed version, or `None` if the package is not installed."""
        if not self.package:
            return ""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def serves(self, workload: Workload, *, asynchronous: bool) -> bool:
        """Return whether the contestant can run a workload."""
        if workload.writes and self.only_reads:
            return False
        return asynchronous or not (self.only_asynchronous or workload.work_sync is None)

    def application(self, urls: Sequence[str], *, asynchronous: bool) -> FastAPI:
        """Build the application, with a route for each workload."""
        built = self.build(urls, asynchronous)
        for each in WORKLOADS:
            if self.serves(each, asynchronous=asynchronous):
                way = built.write if each.writes else built.read
                route = built.app.get(each.path, response_model=each.response_model)
                route(way(each))
        return built.app


def engines(urls: Sequence[str], asynchronous: bool = True) -> list[Any]:
    create = create_async_engine if asynchronous else create_engine
    return [create(url, **POOL) for url in urls]


def makers(of_urls: Sequence[Any]) -> list[Any]:
    of_colour: dict[bool, Any] = {True: async_sessionmaker, False: sessionmaker}
    return [
        of_colour[isinstance(each, AsyncEngine)](each, expire_on_commit=False) for each in of_urls
    ]


def closing(of_urls: Sequence[AsyncEngine | Engine]) -> FastAPI:
    """Make an application that closes its engines itself."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        for engine in of_urls:
            if isinstance(engine, AsyncEngine):
                await engine.dispose()
            else:
                engine.dispose()

    return FastAPI(lifespan=lifespan)


# By hand: a generator, as in FastAPI's tutorial.


def generator(open_session: Callable[[], Any], asynchronous: bool) -> Callable[[], Any]:
    async def get_session() -> AsyncGenerator[Any]:
        async with open_session() as session:
            yield session

    def get_session_sync() -> Generator[Any]:
        with open_session() as session:
            yield session

    return get_session if asynchronous else get_session_sync


def by_hand(scope: Any) -> Build:
    def build(urls: Sequence[str], asynchronous: bool) -> Built:
        of_urls = engines(urls, asynchronous)
        dependency = Depends(generator(makers(of_urls)[-1], asynchronous), scope=scope)
        way = declared(dependency, asynchronous=asynchronous, commit=True)
        return Built(closing(of_urls), way, way)

    return build


def begin_by_hand(urls: Sequence[str], asynchronous: bool) -> Built:
    of_urls = engines(urls, asynchronous)
    dependency = generator(makers(of_urls)[-1].begin, asynchronous)
    way = declared(Depends(dependency, scope="function"), asynchronous=asynchronous)
    return Built(closing(of_urls), way, way)


def inline(urls: Sequence[str], asynchronous: bool) -> Built:
    of_urls = engines(urls, asynchronous)
    maker = makers(of_urls)[-1]
    read = opened(maker, asynchronous=asynchronous)
    return Built(closing(of_urls), read, opened(maker.begin, asynchronous=asynchronous))


# Every package is imported late: some are not installed, and the memory of one contestant must not
# include the others.


def sqlnative(read: str, write: str) -> Build:
    """Return a `Build` whose reads and writes depend on functions of this package."""

    def build(urls: Sequence[str], asynchronous: bool) -> Built:
        package: Any = importlib.import_module("fastapi_sqlnative")
        app = FastAPI()
        for place, engine in enumerate(engines(urls, asynchronous)):
            package.install_database(app, name=f"db{place}", engine=engine, shutdown=engine.dispose)
        ways = (
            declared(
                Depends(getattr(package, each)(f"db{len(urls) - 1}")), asynchronous=asynchronous
            )
            for each in (read, write)
        )
        return Built(app, *ways)

    return build


def advanced_alchemy(urls: Sequence[str], asynchronous: bool) -> Built:
    package: Any = importlib.import_module("advanced_alchemy.extensions.fastapi")
    colour = "Async" if asynchronous else "Sync"
    config, session_config = (
        getattr(package, name.format(colour)) for name in ("SQLAlchemy{}Config", "{}SessionConfig")
    )
    configs = [
        config(
            engine_instance=engine,
            session_config=session_config(expire_on_commit=False),
            commit_mode="autocommit",
            bind_key=f"db{place}",
            session_key=f"session{place}",
        )
        for place, engine in enumerate(engines(urls, asynchronous))
    ]
    app = FastAPI()
    alchemy = package.AdvancedAlchemy(config=configs, app=app)
    dependency = Depends(alchemy.provide_session(configs[-1].bind_key))
    way = declared(dependency, asynchronous=asynchronous)
    return Built(app, way, way)


def toolsets(urls: Sequence[str], _asynchronous: bool) -> Built:
    database_of = importlib.import_module("fastapi_toolsets.db").Database
    app = FastAPI()
    databases = [database_of(url, **POOL) for url in urls]
    for each in databases:
        each.install(app)
    way = declared(Depends(databases[-1]))
    return Built(app, way, way)


def context_async(urls: Sequence[str], _asynchronous: bool) -> Built:
    package = importlib.import_module("context_async_sqlalchemy")
    utilities = importlib.import_module("context_async_sqlalchemy.fastapi_utils")
    connections = [
        package.DBConnect(
            host=url,
            engine_creator=lambda host: create_async_engine(host, **POOL),
            session_maker_creator=lambda engine: async_sessionmaker(engine, expire_on_commit=False),
        )
        for url in urls
    ]

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        for each in connections:
            await each.close()

    app = FastAPI(lifespan=lifespan)
    utilities.add_fastapi_http_db_session_middleware(app)
    way = found(lambda: package.db_session(connections[-1]))
    return Built(app, way, way)


def fastapi_async(urls: Sequence[str], _asynchronous: bool) -> Built:
    package = importlib.import_module("fastapi_async_sqlalchemy")
    of_urls = engines(urls)
    app = closing(of_urls)
    db: Any = None
    for engine in of_urls:
        middleware, db = package.create_middleware_and_session_proxy()
        app.add_middleware(middleware, custom_engine=engine, commit_on_exit=True)
    way = found(lambda: db.session)
    return Built(app, way, way)


OURS = "fastapi-sqlnative"
OUR_READER = "fastapi-sqlnative, `reader`"
LIMIT = "inline `async with` (the limit)"
CONTESTANTS = (
    Contestant(OURS, sqlnative("get_db", "transactional")),
    Contestant(OUR_READER, sqlnative("reader", "reader"), only_reads=True),
    Contestant(LIMIT, inline),
    Contestant("by hand, function scope", by_hand("function")),
    Contestant("by hand, request scope", by_hand("request")),
    Contestant("by hand, `begin()`", begin_by_hand),
    Contestant("advanced-alchemy", advanced_alchemy, "advanced-alchemy"),
    Contestant("fastapi-toolsets", toolsets, "fastapi-toolsets", only_asynchronous=True),
    Contestant(
        "context-async-sqlalchemy",
        context_async,
        "context-async-sqlalchemy",
        only_asynchronous=True,
    ),
    Contestant(
        "fastapi-async-sqlalchemy",
        fastapi_async,
        "fastapi-async-sqlalchemy",
        only_asynchronous=True,
    ),
)
BY_HAND = tuple(each.name for each in CONTESTANTS if each.name.startswith("by hand"))

# The packages that cannot be installed beside the others, and why.
LEFT_OUT = {
    "fastapi-sqla": "4.0.1 caps FastAPI below 0.142, and fastapi-toolsets requires 0.142 or newer",
    "dbwarden-fastapi": "0.2.0 needs dbwarden, which caps SQLAlchemy below 2.1, and Python 3.12.7",
}


def contestant(name: str) -> Contestant:
    """Find a contestant by name."""
    return next(each for each in CONTESTANTS if each.name == name)


def installed() -> list[Contestant]:
    """List the contestants whose package is installed."""
    return [each for each in CONTESTANTS if each.version is not None]
