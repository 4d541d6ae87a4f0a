"""Tests of the engine's lifetime and its settings."""

import pytest
from pydantic import ValidationError
from sqlalchemy import event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from conftest import WorkerPostgres
from examples.settings.app import DatabaseSettings, create_app
from tests.serving import serve


class Counted(DatabaseSettings):
    """Settings that count the engines built from them and disposed of."""

    _built: int = 0
    _disposed: int = 0

    def build_engine(self) -> AsyncEngine:
        engine = super().build_engine()
        event.listen(engine.sync_engine, "engine_disposed", self._note_disposal)
        self._built += 1
        return engine

    def _note_disposal(self, _engine: object) -> None:
        self._disposed += 1

    @property
    def counters(self) -> tuple[int, int]:
        return self._built, self._disposed


def test_the_engine_is_built_once_and_disposed_of_once(databases: WorkerPostgres) -> None:
    """Each start builds one engine and disposes of it once, however many requests there are."""
    settings = Counted(url=make_url(databases.url("psycopg")))
    app = create_app(settings)
    assert settings.counters == (0, 0)
    for start in 1, 2:
        with serve(app) as served:
            for _ in range(3):
                assert served.client.get("/name").json() == "settings-example"
            assert settings.counters == (start, start - 1)
        assert settings.counters == (start, start)


@pytest.mark.usefixtures("databases")
def test_the_environment_reaches_pool_and_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool and the server use the settings from the environment."""
    monkeypatch.setenv("DATABASE_POOL_SIZE", "3")
    monkeypatch.setenv("DATABASE_APPLICATION_NAME", "shop")
    with serve(create_app()) as served:
        assert served.client.get("/pool").json() == 3
        assert served.client.get("/name").json() == "shop"


def test_a_wrong_setting_is_named_and_no_secret_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """An invalid setting stops the process before it serves, without showing the password."""
    monkeypatch.setenv("DATABASE_URL", "postgresql+psycopg://me:secret@db/shop")
    monkeypatch.setenv("DATABASE_POOL_SIZE", "secret")
    with pytest.raises(ValidationError, match="pool_size") as refused:
        create_app()
    assert "secret" not in str(refused.value)
    monkeypatch.delenv("DATABASE_POOL_SIZE")
    assert "secret" not in repr(DatabaseSettings())  # type: ignore[call-arg] # from the environment
