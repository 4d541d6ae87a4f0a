"""The package is typed for its users: what is right passes, what is wrong is complained about."""

import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).with_name("typing_app.py")
ROOT = APP.parent.parent
CHECKERS: dict[str, list[str]] = {
    # Without the project's own configuration: a user has not got it.
    "mypy": ["-m", "mypy", "--strict", "--config-file=", "--no-incremental"],
    "pyright": ["-m", "pyright", "--pythonpath", sys.executable],
}

WRONG = """\
from fastapi_sqlnative import AsyncDatabase, Database, get_db, install_database, transactional
from fastapi import FastAPI
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

Database(create_async_engine("sqlite+aiosqlite://"))
AsyncDatabase(create_engine("sqlite://"))
transactional(isolation_level="AUTOCOMMIT")
transactional("a", "SERIALIZABLE")
get_db(7)
install_database(FastAPI(), engine="sqlite://")
install_database(FastAPI(), create_engine("sqlite://"))
with Database(create_engine("sqlite://")).transaction() as session:
    session.no_such_method()
async def wrong() -> None:
    async with Database(create_engine("sqlite://")).session():
        pass
"""
LINES = [6, 7, 8, 9, 10, 11, 12, 14, 16]


@pytest.fixture(scope="module", params=CHECKERS)
def complaints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run a type checker on both files, from where the package is found."""
    wrong = tmp_path_factory.mktemp("typing") / "wrong.py"
    wrong.write_text(WRONG)
    done = subprocess.run(
        [sys.executable, *CHECKERS[request.param], str(APP), str(wrong)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_a_users_application_is_clean(complaints: str) -> None:
    """An application written as the documentation shows has nothing to complain about."""
    lines = [line for line in complaints.splitlines() if ".py:" in line]
    assert [line for line in lines if "wrong.py:" not in line] == []


@pytest.mark.timeout(300)
def test_wrong_uses_are_complained_about(complaints: str) -> None:
    """Each wrong colour, level, name and argument is found in its line."""
    assert [line for line in LINES if f"wrong.py:{line}:" not in complaints] == [], complaints
