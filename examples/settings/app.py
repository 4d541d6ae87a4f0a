"""An application that builds its engine from settings."""

from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI
from pydantic import Field, PlainValidator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import URL, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from fastapi_sqlnative import AsyncDatabase, get_database_handle, install_database, reader


class DatabaseSettings(BaseSettings):
    """The settings from DATABASE_URL, DATABASE_POOL_SIZE and so on in the environment."""

    # An invalid value may contain a password: the error names the setting without its value.
    model_config = SettingsConfigDict(
        env_prefix="DATABASE_", hide_input_in_errors=True, frozen=True
    )

    # SQLAlchemy's URL hides its password when printed. Read it as plain text, not as JSON.
    url: Annotated[URL, NoDecode, PlainValidator(make_url)]
    pool_size: Annotated[int, Field(ge=1, le=50)] = 5
    max_overflow: Annotated[int, Field(ge=0, le=50)] = 10
    pool_timeout: Annotated[float, Field(gt=0)] = 5.0
    application_name: str = "settings-example"

    def build_engine(self) -> AsyncEngine:
        """Build the engine that these settings describe; the caller disposes of it."""
        return create_async_engine(
            self.url,
            pool_size=self.pool_size,
            max_overflow=self.max_overflow,
            pool_timeout=self.pool_timeout,
            connect_args={"application_name": self.application_name},
        )


router = APIRouter()


@router.get("/pool")
async def read_pool(
    database: Annotated[AsyncDatabase, Depends(get_database_handle())],
) -> int | None:
    """Show how many connections the pool keeps."""
    return database.pool_status().size


@router.get("/name")
async def read_name(session: Annotated[AsyncSession, Depends(reader())]) -> str:
    """Show this application's name on the server."""
    name: str = (await session.scalars(text("SHOW application_name"))).one()
    return name


def create_app(settings: DatabaseSettings | None = None) -> FastAPI:
    """Build the application; if no settings are given, read them from the environment.

    The engine is built when the application starts, and disposed of when it stops.
    """
    settings = settings or DatabaseSettings()  # type: ignore[call-arg] # from the environment
    app = FastAPI(title="Settings")
    install_database(app, engine=settings.build_engine)
    app.include_router(router)
    return app
