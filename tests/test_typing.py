"""The package is typed for its users: what is right passes, what is wrong is complained about.

The snippets of the documentation are users, too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import PAGES, README, code, module_name

APP = Path(__file__).with_name("typing_app.py")
ROOT = APP.parent.parent
# Without the project's own configuration: a user has not got it.
MYPY = [
    *("-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"),
    f"--cache-dir={ROOT / '.mypy_cache' / 'users'}",
]
PYRIGHT = ["-m", "pyright", "--pythonpath", sys.executable]

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


def complaints(checker: list[str], *files: Path) -> dict[str, list[str]]:
    """Run a type checker on files, from where the package is found; give its lines by file."""
    done = subprocess.run(
        [sys.executable, *checker, *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ".py:" in line]
    return {file.name: [line for line in lines if f"{file.name}:" in line] for file in files}


def check_users(checker: list[str], folder: Path, *others: Path) -> None:
    """Insist on no complaint about right uses, and on one about each wrong line."""
    wrong = folder / "wrong.py"
    wrong.write_text(WRONG)
    found = complaints(checker, wrong, APP, *others)
    complained = "\n".join(found.pop("wrong.py"))
    assert [line for line in LINES if f"wrong.py:{line}:" not in complained] == [], complained
    assert [line for lines in found.values() for line in lines] == []


def snippets(folder: Path) -> list[Path]:
    """Write the python of each page into a module."""
    found = []
    for page in PAGES:
        module = folder / f"{module_name(page)}.py"
        # SQLAlchemy 2.0 does not know the type of func.count(), 2.1 does.
        option = "" if page == README else "# mypy: no-warn-return-any"
        module.write_text(option + code(page), "utf-8")
        found.append(module)
    return found


@pytest.mark.timeout(300)  # without a cache mypy reads all of FastAPI and SQLAlchemy first
def test_mypy_finds_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    """An application and the documentation's are clean; a wrong colour, level or name is found."""
    check_users(MYPY, tmp_path, *snippets(tmp_path))


@pytest.mark.other_driver  # mypy has shown as much
@pytest.mark.timeout(300)
def test_pyright_finds_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    """An application is clean with pyright, too; a wrong colour, level or name is found."""
    check_users(PYRIGHT, tmp_path)
