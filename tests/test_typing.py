"""The types of the package: a type checker accepts correct uses and reports wrong ones.

The documentation's snippets are correct uses, too.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import PAGES, README, code, module_name

# An application under the strictest rules, and the type of each public name.
RIGHT = [Path(__file__).with_name(f"typing_{name}.py") for name in ("app", "types")]
ROOT = Path(__file__).parents[1]
# Without the project's own configuration, which users do not have.
MYPY = [
    *("-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"),
    f"--cache-dir={ROOT / '.mypy_cache' / 'users'}",
]
PYRIGHT = ["-m", "pyright", "--pythonpath", sys.executable]

# A type checker must report each line that has a comment.
WRONG = """\
from typing import Annotated, Any
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from fastapi_sqlnative import (
    AsyncDatabase, Database, ErrorRule, get_db, health_router, http_errors, install_database,
    install_error_handlers, installed_databases, reader, transactional,
)
from fastapi_sqlnative.checklist import check_databases, log_findings

app = FastAPI()
sync = Database(create_engine("sqlite://"))
database = AsyncDatabase(create_async_engine("sqlite+aiosqlite://"))
Database(create_async_engine("sqlite+aiosqlite://"))  # the other colour
AsyncDatabase(create_engine("sqlite://"))  # the other colour
Database("sqlite://")  # an address
transactional(isolation_level="AUTOCOMMIT")  # no transaction
transactional(isolation_level="repeatable read")  # not as it is spelt
transactional("a", "SERIALIZABLE")  # by its place
transactional(readonly=True)  # a name that there is not
get_db(7)  # no name
reader(read_only=True)  # it always is
install_database(app, engine="sqlite://")  # an address
install_database(app, create_engine("sqlite://"))  # by its place
install_database(app, engine=sync.engine, shutdown="dispose")  # no function
install_database(app, engine=sync.engine, startup_wait="10")  # no number
install_database(app, engine=lambda url: create_engine(url))  # wants a parameter
installed_databases(app)["a"].transaction().__enter__()  # either colour
installed_databases(app, Session)  # no handle
health_router(databases={"default": "sometimes"})  # no policy
install_error_handlers(app, problem_detail=True)  # a name that there is not
sync.engine = create_engine("sqlite://").name  # no engine
with sync.transaction() as session:
    session.no_such_method()  # not SQLAlchemy's
    wrong: AsyncSession = session  # the other colour
with database.transaction() as never:  # wants async with
    pass

def work(session: Session) -> int:
    return 1

async def work_later(session: AsyncSession) -> int:
    return 1

async def later() -> None:
    async with sync.session():  # wants with
        pass
    text: str = await database.run_in_transaction(work_later)  # returns a number
    await database.run_in_transaction(work)  # the other colour
    sync.run_in_transaction(work_later)  # the other colour
    with http_errors(database):  # no session
        pass
    await check_databases(app, processes="8")  # no number
    log_findings(check_databases(app))  # not awaited
    (await check_databases(app))[0].status = "ok"  # frozen
"""
LINES = [
    number for number, line in enumerate(WRONG.splitlines(), start=1) if re.search(r"\S  # ", line)
]


def complaints(checker: list[str], *files: Path) -> dict[str, list[str]]:
    """Run a type checker where the package can be imported, and return its messages by file."""
    done = subprocess.run(
        [sys.executable, *checker, *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if ".py:" in line]
    return {file.name: [line for line in lines if f"{file.name}:" in line] for file in files}


def check_users(checker: list[str], folder: Path, *others: Path) -> None:
    """Fail if a correct use is reported, or if a wrong line is not."""
    wrong = folder / "wrong.py"
    wrong.write_text(WRONG)
    found = complaints(checker, wrong, *RIGHT, *others)
    complained = "\n".join(found.pop("wrong.py"))
    assert [line for line in LINES if f"wrong.py:{line}:" not in complained] == [], complained
    assert [line for lines in found.values() for line in lines] == []


def snippets(folder: Path) -> list[Path]:
    """Write the Python code of each page into a module."""
    found = []
    for page in PAGES:
        module = folder / f"{module_name(page)}.py"
        # SQLAlchemy 2.0 does not know the type of func.count(), 2.1 does.
        option = "" if page == README else "# mypy: no-warn-return-any"
        alone = code(page).replace("from main import", "#")  # the page itself is that module
        module.write_text(option + alone, "utf-8")
        found.append(module)
    return found


# Without a cache, a type checker reads all of FastAPI and SQLAlchemy first.
pytestmark = [
    pytest.mark.slow("each takes 15 s, and `make types` finds most of it"),
    pytest.mark.timeout(300),
]


def test_mypy_finds_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    """mypy accepts an application and the documentation's snippets, and reports each wrong use."""
    check_users(MYPY, tmp_path, *snippets(tmp_path))


def test_pyright_finds_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    """pyright accepts an application, and reports each wrong use."""
    check_users(PYRIGHT, tmp_path)
