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


def check(checker: str, path: Path) -> tuple[int, str]:
    """Run a type checker on one file, from where the package is found, and return what it says."""
    done = subprocess.run(
        [sys.executable, *CHECKERS[checker], str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_application_is_clean(checker: str) -> None:
    """An application written as the documentation shows has nothing to complain about."""
    code, said = check(checker, APP)
    assert code == 0, said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checker", CHECKERS)
def test_wrong_uses_are_complained_about(checker: str, tmp_path: Path) -> None:
    """Each wrong colour, level, name and argument is found in its line."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    code, said = check(checker, wrong)
    assert code == 1, said
    missed = [line for line in LINES if f"wrong.py:{line}:" not in said]
    assert missed == [], said
