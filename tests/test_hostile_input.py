"""Hostile input: generated requests, names, options and constraint names."""

import math
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import IntegrityError

from conftest import WorkerPostgres
from examples.showcase.app import create_app
from examples.showcase.models import AnalyticsBase, Base
from examples.showcase.settings import Settings
from fastapi_sqlnative import (
    ErrorRule,
    get_database_handle,
    get_db,
    health_router,
    install_database,
    installed_databases,
    map_database_error,
    reader,
    transactional,
)
from fastapi_sqlnative.errors import describe_database_error
from tests.serving import serve

shortly = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# --- requests -----------------------------------------------------------------------------------


@pytest.fixture(params=["psycopg", pytest.param("asyncpg", marks=pytest.mark.other_driver)])
def showcase(request: pytest.FixtureRequest, postgres: WorkerPostgres) -> Iterator[FastAPI]:
    """Yield the showcase on two databases, and drop its tables at the end."""
    first, second = (make_url(each.url(request.param)) for each in (postgres, postgres.second))
    yield create_app(Settings(first, second))
    for base, url in (Base, first), (AnalyticsBase, second):
        engine = create_engine(url.set(drivername="postgresql+psycopg"))
        base.metadata.drop_all(engine)
        engine.dispose()


def test_the_showcase_has_an_answer_to_any_request(showcase: FastAPI, thorough: bool) -> None:
    """The showcase answers any request as its OpenAPI document says, without a server error."""
    import schemathesis  # takes a third of a second, which other workers save
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance

    # Each example is a request that takes several milliseconds.
    examples = 50 if thorough else 5
    schema = schemathesis.openapi.from_dict(showcase.openapi())
    with serve(showcase) as served:
        operations: Any = schema.get_all_operations()
        for operation in (found.ok() for found in operations):

            @settings(shortly, max_examples=examples)
            @given(case=operation.as_strategy(), known=st.booleans())
            def send(case: Any, known: bool) -> None:
                headers = {"X-User": "ada"} if known else {}
                case.call_and_validate(
                    base_url=served.url,
                    headers=headers,
                    checks=[not_a_server_error, response_schema_conformance],
                )

            send()
        assert served.client.get("/health/ready").json()["status"] == "ready"


# --- names and options --------------------------------------------------------------------------

# An alphabet that Hypothesis knows without encoding every character, which takes a second.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXT,
    st.binary(),
    st.lists(TEXT),
)


@shortly
@given(TEXT)
def test_any_text_is_a_name(name: str) -> None:
    """Any text names one database and one dependency, and a blank name is `default`."""
    app = FastAPI()
    engine = create_engine("sqlite://")
    install_database(app, name=name, engine=engine, shutdown=engine.dispose)
    (installed,) = installed_databases(app)
    assert installed == (name.strip() or "default")
    for dependency in get_db, transactional, reader, get_database_handle:
        assert dependency(f" {name}\t") is dependency(name)


@shortly
@given(ANYTHING)
def test_a_time_is_one_or_is_refused_at_once(seconds: Any) -> None:
    """A value that is no valid time raises an error at once, and not when the time is used."""
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    is_time = is_number and 0 < seconds < math.inf
    engine = create_engine("sqlite://")
    makers = (
        lambda: health_router(timeout=seconds, down_after=seconds, wedged_after=seconds),
        lambda: install_database(FastAPI(), engine=engine, shutdown_timeout=seconds),
    )
    for make in makers:
        if is_time:
            make()
        else:
            with pytest.raises((TypeError, ValueError), match="seconds"):
                make()


@shortly
@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_a_rule_can_be_answered_or_is_refused_at_once(
    detail: Any, status: Any, retry_after: Any, pointer: Any
) -> None:
    """Any `ErrorRule` that can be created maps a failure to its status."""
    try:
        rule = ErrorRule(detail, status, retry_after, pointer)
    except (TypeError, ValueError):
        return
    mapped: Any = map_database_error(IntegrityError(None, None, psycopg.Error()), other=rule)
    assert mapped.status_code == (500 if status is None else status)


@shortly
@given(ANYTHING)
def test_an_isolation_level_is_one_or_is_refused_at_once(level: Any) -> None:
    """A value that is no isolation level raises an error, so that it never reaches the server."""
    if level is None:
        transactional(isolation_level=level)
        return
    with pytest.raises((TypeError, ValueError)):
        transactional(isolation_level=level)


# --- constraints --------------------------------------------------------------------------------

# Names that PostgreSQL accepts, of at most 63 bytes.
CONSTRAINT_NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=15
).filter(str.strip)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_constraint_is_found_whatever_its_name(postgres: WorkerPostgres, driver: str) -> None:
    """A constraint's rule is found even if its name has quotes, dots, percent signs or newlines."""
    engine = create_engine(postgres.url(driver))

    @shortly
    @given(CONSTRAINT_NAMES, CONSTRAINT_NAMES)
    def violate(name: str, value: str) -> None:
        define = sql.SQL("CREATE TEMPORARY TABLE odd (v text, CONSTRAINT {} CHECK (v IS NULL))")
        with engine.connect() as connection:
            # Not through SQLAlchemy, where a percent sign would stand for a parameter.
            cursor = connection.connection.cursor()
            cursor.execute(define.format(sql.Identifier(name)).as_string())
            with pytest.raises(IntegrityError) as raised:
                connection.execute(text("INSERT INTO odd VALUES (:v)"), {"v": value})
        found = describe_database_error(raised.value)
        assert found is not None
        assert (found.kind, found.constraint, found.table) == ("check", name, "odd")
        mapped: Any = map_database_error(raised.value, constraints={name: "No."})
        assert (mapped.status_code, mapped.detail) == (422, "No.")

    try:
        violate()
    finally:
        engine.dispose()
