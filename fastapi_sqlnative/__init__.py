"""A thin, native bridge between FastAPI and SQLAlchemy 2."""

from ._drivers.pools import PoolStatus
from ._lifespan.install import install_database
from ._lifespan.running import installed_databases
from .databases import AsyncDatabase, Database
from .dependencies import get_database_handle, get_db, reader, transactional
from .errors import (
    DatabaseErrorDescription,
    DatabaseErrorKind,
    ErrorRule,
    describe_database_error,
    error_responses,
    http_errors,
    install_error_handlers,
    map_database_error,
)
from .health import health_router, start_draining

__all__ = [
    "AsyncDatabase",
    "Database",
    "DatabaseErrorDescription",
    "DatabaseErrorKind",
    "ErrorRule",
    "PoolStatus",
    "describe_database_error",
    "error_responses",
    "get_database_handle",
    "get_db",
    "health_router",
    "http_errors",
    "install_database",
    "install_error_handlers",
    "installed_databases",
    "map_database_error",
    "reader",
    "start_draining",
    "transactional",
]
