"""Who is compared: applications with the same routes, each built as its documentation says.

Every one has engines with the same options, given or made; whatever else a documentation
recommends for the engine (a ping before each use, for one) would compare that instead.
"""

import importlib
import importlib.metadata
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
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

# -- how a route gets its session, and who commits ------------------------------------------------

Endpoint = Callable[..., Any]
Way = Callable[[Workload], Endpoint]


def declared(dependency: Any, *, commit: bool = False) -> Way:
    """Declare the session as a dependency; the endpoint commits a write where nobody else does."""

    def endpoint(workload: Workload) -> Endpoint:
        work, commits = workload.work, commit and workload.writes

        async def serve(session: Any = dependency) -> Any:
            result = await work(session)
            if commits:
                await session.commit()
            return result

        return serve

    return endpoint


def declared_sync(dependency: Any, *, commit: bool = False) -> Way:
    """Declare a synchronous session in a `def` endpoint."""

    def endpoint(workload: Workload) -> Endpoint:
        work, commits = workload.work_sync, commit and workload.writes
        assert work is not None

        def serve(session: Any = dependency) -> Any:
            result = work(session)
            if commits:
                session.commit()
            return result

        return serve

    return endpoint


def opened(open_session: Callable[[], AbstractAsyncContextManager[AsyncSession]]) -> Way:
    """Open the session in the endpoint."""

    def endpoint(workload: Workload) -> Endpoint:
        work = workload.work

        async def serve() -> Any:
            async with open_session() as session:
                return await work(session)

        return serve

    return endpoint


def opened_sync(open_session: Callable[[], Any]) -> Way:
    """Open a synchronous session in a `def` endpoint."""

    def endpoint(workload: Workload) -> Endpoint:
        work = workload.work_sync
        assert work is not None

        def serve() -> Any:
            with open_session() as session:
                return work(session)

        return serve

    return endpoint


def found(find_session: Callable[[], Any]) -> Way:
    """Have the package find the request's session in a context variable."""

    def endpoint(workload: Workload) -> Endpoint:
        work = workload.work

        async def serve() -> Any:
            session = find_session()
            return await work(session if isinstance(session, AsyncSession) else await session)

        return serve

    return endpoint


# -- the contestants ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """An application without routes, and how they get their sessions of its last database."""

    app: FastAPI
    read: Way
    write: Way


@dataclass(frozen=True)
class Contestant:
    """Somebody who is compared.

    Attributes:
        name: as the page says it.
        build: makes the application from the URLs of its databases.
        build_sync: the same with synchronous engines, where it has them.
        package: the distribution that it comes from; none for what is written by hand.
        only_reads: it has no way to write.
    """

    name: str
    build: Callable[[Sequence[str]], Built]
    build_sync: Callable[[Sequence[str]], Built] | None = None
    package: str = ""
    only_reads: bool = False

    @property
    def version(self) -> str | None:
        """Tell which version is installed; `None` where none is."""
        if not self.package:
            return ""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def serves(self, workload: Workload, *, asynchronous: bool) -> bool:
        """Tell whether it takes part in a row."""
        if workload.writes and self.only_reads:
            return False
        return asynchronous or (self.build_sync is not None and workload.work_sync is not None)

    def application(self, urls: Sequence[str], *, asynchronous: bool) -> FastAPI:
        """Build the application, with a route for each workload."""
        build = self.build if asynchronous else self.build_sync
        assert build is not None, f"{self.name} has no synchronous sessions"
        built = build(urls)
        for each in WORKLOADS:
            if self.serves(each, asynchronous=asynchronous):
                way = built.write if each.writes else built.read
                route = built.app.get(each.path, response_model=each.response_model)
                route(way(each))
        return built.app


def engines(urls: Sequence[str]) -> list[AsyncEngine]:
    return [create_async_engine(url, **POOL) for url in urls]


def sync_engines(urls: Sequence[str]) -> list[Engine]:
    return [create_engine(url, **POOL) for url in urls]


def closing(engines: Sequence[AsyncEngine | Engine]) -> FastAPI:
    """Make an application that closes its engines itself."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        for engine in engines:
            if isinstance(engine, AsyncEngine):
                await engine.dispose()
            else:
                engine.dispose()

    return FastAPI(lifespan=lifespan)


# By hand: one generator for each database, as FastAPI's tutorial has one.


def by_hand(scope: Any) -> Callable[[Sequence[str]], Built]:
    def build(urls: Sequence[str]) -> Built:
        of_urls = engines(urls)
        makers = [async_sessionmaker(each, expire_on_commit=False) for each in of_urls]

        async def get_session() -> AsyncGenerator[AsyncSession]:
            async with makers[-1]() as session:
                yield session

        way = declared(Depends(get_session, scope=scope), commit=True)
        return Built(closing(of_urls), way, way)

    return build


def by_hand_sync(scope: Any) -> Callable[[Sequence[str]], Built]:
    def build(urls: Sequence[str]) -> Built:
        of_urls = sync_engines(urls)
        makers = [sessionmaker(each, expire_on_commit=False) for each in of_urls]

        def get_session() -> Generator[Any]:
            with makers[-1]() as session:
                yield session

        way = declared_sync(Depends(get_session, scope=scope), commit=True)
        return Built(closing(of_urls), way, way)

    return build


def begin_by_hand(urls: Sequence[str]) -> Built:
    of_urls = engines(urls)
    makers = [async_sessionmaker(each, expire_on_commit=False) for each in of_urls]

    async def get_session() -> AsyncGenerator[AsyncSession]:
        async with makers[-1].begin() as session:
            yield session

    way = declared(Depends(get_session, scope="function"))
    return Built(closing(of_urls), way, way)


def begin_by_hand_sync(urls: Sequence[str]) -> Built:
    of_urls = sync_engines(urls)
    makers = [sessionmaker(each, expire_on_commit=False) for each in of_urls]

    def get_session() -> Generator[Any]:
        with makers[-1].begin() as session:
            yield session

    way = declared_sync(Depends(get_session, scope="function"))
    return Built(closing(of_urls), way, way)


def inline(urls: Sequence[str]) -> Built:
    of_urls = engines(urls)
    makers = [async_sessionmaker(each, expire_on_commit=False) for each in of_urls]
    return Built(closing(of_urls), opened(makers[-1]), opened(makers[-1].begin))


def inline_sync(urls: Sequence[str]) -> Built:
    of_urls = sync_engines(urls)
    makers = [sessionmaker(each, expire_on_commit=False) for each in of_urls]
    return Built(closing(of_urls), opened_sync(makers[-1]), opened_sync(makers[-1].begin))


# Every package is imported late: some are not installed, and nobody's memory is to hold another.


def _installed(of_urls: Sequence[AsyncEngine | Engine]) -> tuple[FastAPI, Any, str]:
    package = importlib.import_module("fastapi_sqlnative")
    app = FastAPI()
    for place, engine in enumerate(of_urls):
        package.install_database(app, name=f"db{place}", engine=engine, shutdown=engine.dispose)
    return app, package, f"db{len(of_urls) - 1}"


def sqlnative(urls: Sequence[str]) -> Built:
    app, package, name = _installed(engines(urls))
    write = declared(Depends(package.transactional(name)))
    return Built(app, declared(Depends(package.get_db(name))), write)


def sqlnative_sync(urls: Sequence[str]) -> Built:
    app, package, name = _installed(sync_engines(urls))
    write = declared_sync(Depends(package.transactional(name)))
    return Built(app, declared_sync(Depends(package.get_db(name))), write)


def sqlnative_reader(urls: Sequence[str]) -> Built:
    app, package, name = _installed(engines(urls))
    way = declared(Depends(package.reader(name)))
    return Built(app, way, way)


def sqlnative_reader_sync(urls: Sequence[str]) -> Built:
    app, package, name = _installed(sync_engines(urls))
    way = declared_sync(Depends(package.reader(name)))
    return Built(app, way, way)


def advanced_alchemy(urls: Sequence[str]) -> Built:
    package = importlib.import_module("advanced_alchemy.extensions.fastapi")
    configs = [
        package.SQLAlchemyAsyncConfig(
            engine_instance=engine,
            session_config=package.AsyncSessionConfig(expire_on_commit=False),
            commit_mode="autocommit",
            bind_key=f"db{place}",
            session_key=f"session{place}",
        )
        for place, engine in enumerate(engines(urls))
    ]
    return _alchemy(package, configs, declared)


def advanced_alchemy_sync(urls: Sequence[str]) -> Built:
    package = importlib.import_module("advanced_alchemy.extensions.fastapi")
    configs = [
        package.SQLAlchemySyncConfig(
            engine_instance=engine,
            session_config=package.SyncSessionConfig(expire_on_commit=False),
            commit_mode="autocommit",
            bind_key=f"db{place}",
            session_key=f"session{place}",
        )
        for place, engine in enumerate(sync_engines(urls))
    ]
    return _alchemy(package, configs, declared_sync)


def _alchemy(package: Any, configs: list[Any], declare: Callable[[Any], Way]) -> Built:
    app = FastAPI()
    alchemy = package.AdvancedAlchemy(config=configs, app=app)
    way = declare(Depends(alchemy.provide_session(configs[-1].bind_key)))
    return Built(app, way, way)


def toolsets(urls: Sequence[str]) -> Built:
    database_of = importlib.import_module("fastapi_toolsets.db").Database
    app = FastAPI()
    databases = [database_of(url, **POOL) for url in urls]
    for each in databases:
        each.install(app)
    way = declared(Depends(databases[-1]))
    return Built(app, way, way)


def context_async(urls: Sequence[str]) -> Built:
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


def fastapi_async(urls: Sequence[str]) -> Built:
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
    Contestant(OURS, sqlnative, sqlnative_sync),
    Contestant(OUR_READER, sqlnative_reader, sqlnative_reader_sync, only_reads=True),
    Contestant(LIMIT, inline, inline_sync),
    Contestant("by hand, function scope", by_hand("function"), by_hand_sync("function")),
    Contestant("by hand, request scope", by_hand("request"), by_hand_sync("request")),
    Contestant("by hand, `begin()`", begin_by_hand, begin_by_hand_sync),
    Contestant("advanced-alchemy", advanced_alchemy, advanced_alchemy_sync, "advanced-alchemy"),
    Contestant("fastapi-toolsets", toolsets, package="fastapi-toolsets"),
    Contestant("context-async-sqlalchemy", context_async, package="context-async-sqlalchemy"),
    Contestant("fastapi-async-sqlalchemy", fastapi_async, package="fastapi-async-sqlalchemy"),
)
BY_HAND = tuple(each.name for each in CONTESTANTS if each.name.startswith("by hand"))

# Who cannot be installed beside the others, and why.
LEFT_OUT = {
    "fastapi-sqla": "4.0.1 caps FastAPI below 0.142, and fastapi-toolsets wants 0.142 or newer",
    "dbwarden-fastapi": "0.2.0 needs dbwarden, which caps SQLAlchemy below 2.1, and Python 3.12.7",
}


def contestant(name: str) -> Contestant:
    """Find a contestant by name."""
    return next(each for each in CONTESTANTS if each.name == name)


def installed() -> list[Contestant]:
    """List those whose package is there."""
    return [each for each in CONTESTANTS if each.version is not None]
