"""The addresses of the two databases."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, make_url


@dataclass(frozen=True)
class Settings:
    """The addresses of both databases; a `URL` hides its password when printed."""

    database: URL
    analytics: URL


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read DATABASE_URL and SECOND_DATABASE_URL; without the second, derive it from the first.

    Raises:
        ValueError: DATABASE_URL is not set.
    """
    if not environment.get("DATABASE_URL"):
        raise ValueError("DATABASE_URL is not set. Set it, or run: make demo")
    database = _read_url(environment["DATABASE_URL"])
    analytics = environment.get("SECOND_DATABASE_URL")
    return Settings(database, _read_url(analytics) if analytics else _beside(database))


def _read_url(text: str) -> URL:
    url = make_url(text)
    # SQLAlchemy 2.0 would choose psycopg2 here, which does not support asyncio.
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _beside(url: URL) -> URL:
    # A server allows two engines on one database. SQLite locks the whole file for one writer, so
    # a request that writes to both would wait for itself.
    if url.get_backend_name() != "sqlite" or not url.database:
        return url
    file = Path(url.database)
    return url.set(database=str(file.with_name(f"{file.stem}-analytics{file.suffix}")))
