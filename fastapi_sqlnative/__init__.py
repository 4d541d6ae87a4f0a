"""A thin, native bridge between FastAPI and SQLAlchemy 2."""

from ._lifespan import install_database
from ._registry import installed_databases
from .databases import AsyncDatabase, Database, PoolStatus
from .dependencies import get_database_handle, get_db, reader, transactional

__all__ = [
    "AsyncDatabase",
    "Database",
    "PoolStatus",
    "get_database_handle",
    "get_db",
    "install_database",
    "installed_databases",
    "reader",
    "transactional",
]
