"""Checks of the built distributions as users get them: in empty environments, without a checkout.

`make release-check` runs `python -m tests.release dist`. Nothing is published. In this order:

1. The wheel and the sdist contain the files that they should, and the sdist builds the same wheel.
2. The package serves an application when it is installed without extras and with all of them, by
   uv and by pip, and with each extra, by uv. The environment contains no package of an extra
   that was not asked for.
3. Everything public has a type, with only the wheel installed.
4. The core's tests pass on the installed wheel, with the other files of the sdist.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Packages of the extras that FastAPI 0.165 requires as well.
BROUGHT = {"opentelemetry-api"}
# Tests that represent the whole: requests, transactions, handles, start-up, errors and health.
CORE = (
    *("tests/test_sessions.py", "tests/test_transactions.py", "tests/test_handles.py"),
    *(
        "tests/test_startup_checks.py",
        "tests/test_errors_http.py",
        "tests/test_silent_rollbacks.py",
    ),
    *("tests/test_forgotten_work.py", "tests/test_websockets.py"),
)
# A user's first application, and the modules of the extras. It runs with nothing else installed.
SMOKE = """
import asyncio
import importlib
import pkgutil
import sys
from importlib.util import find_spec
from typing import Annotated

import fastapi_sqlnative
from fastapi import Depends, FastAPI
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from fastapi_sqlnative import health_router, install_database, transactional

NEEDED = {"migrations": ("alembic", "alembic"), "telemetry": ("telemetry", "opentelemetry")}


def build_engine() -> Engine:
    return create_engine("sqlite:///smoke.db")


app = FastAPI()
install_database(app, engine=build_engine)
app.include_router(health_router())


@app.post("/notes")
def add_note(session: Annotated[Session, Depends(transactional())]) -> int:
    session.execute(text("CREATE TABLE IF NOT EXISTS note (id integer PRIMARY KEY)"))
    session.execute(text("INSERT INTO note DEFAULT VALUES"))
    return session.execute(text("SELECT count(*) FROM note")).scalar_one()


async def request(method: str, path: str) -> tuple[int, bytes]:
    answer = []
    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        answer.append(message)

    await app(scope, receive, send)
    return answer[0]["status"], answer[1]["body"]


async def main() -> None:
    async with app.router.lifespan_context(app):
        assert await request("POST", "/notes") == (200, b"1")
        assert await request("POST", "/notes") == (200, b"2")
        assert (await request("GET", "/health/ready"))[0] == 200


if __name__ == "__main__":
    for _, module, _ in pkgutil.iter_modules(fastapi_sqlnative.__path__):
        extra, package = NEEDED.get(module, ("", "fastapi"))
        try:
            importlib.import_module(f"fastapi_sqlnative.{module}")
        except ImportError as error:
            assert extra not in sys.argv and find_spec(package) is None, error
            assert f"fastapi-sqlnative[{extra}]" in str(error), error
    asyncio.run(main())
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def members(archive: Path) -> set[str]:
    """List the files in a wheel, or in an sdist without its topmost folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return set(opened.namelist())
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}


def check_archives(wheel: Path, sdist: Path, folder: Path) -> None:
    """Check the files in both archives, and build the wheel again from the sdist alone."""
    tracked = set(run("git", "ls-files", cwd=ROOT).split())
    package = {name for name in tracked if name.startswith("fastapi_sqlnative/")}
    in_wheel, in_sdist = members(wheel), members(sdist)
    assert {name for name in in_wheel if ".dist-info/" not in name} == package
    assert "fastapi_sqlnative/py.typed" in package
    assert package <= in_sdist
    assert in_sdist - tracked == {"PKG-INFO"}, in_sdist - tracked
    run(sys.executable, "-m", "uv", "build", "--quiet", "--wheel", sdist, "--out-dir", folder)
    (again,) = folder.glob("*.whl")
    assert members(again) == in_wheel
    with zipfile.ZipFile(wheel) as opened:
        name = next(each for each in in_wheel if each.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(opened.read(name))
    relative = re.findall(r"\]\((?!https://)[^)]*\)", str(metadata.get_payload()))
    assert not relative, f"on PyPI these lead nowhere: {relative}"
    print(f"{wheel.name}: {len(in_wheel)} files; {sdist.name}: {len(in_sdist)} files", flush=True)


def environment(folder: Path, installer: str, *requirements: str) -> Path:
    """Make an empty environment, install the requirements, and return its Python."""
    python = folder / "bin" / "python"
    if installer == "uv":
        run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, folder)
        install: list[str | Path] = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "install",
            "--quiet",
            "--python",
            python,
        ]
    else:
        run(sys.executable, "-m", "venv", folder)
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    run(*install, *requirements)
    return python


def names(requirements: list[str]) -> set[str]:
    """Return the names of the packages in a list of requirements."""
    return {re.split(r"[^\w-]", each)[0] for each in requirements}


def check_installation(folder: Path, installer: str, wheel: Path, *extras: str) -> None:
    """Install the wheel in an empty environment, and serve the application of `SMOKE`."""
    suffix = f"[{','.join(extras)}]" if extras else ""
    python = environment(folder / "env", installer, f"{wheel}{suffix}")
    (folder / "smoke.py").write_text(SMOKE)
    run(python, "-W", "error", "smoke.py", *extras, cwd=folder)
    checked = run(python, "-m", "fastapi_sqlnative", "check", "smoke:app", "--json", cwd=folder)
    assert {each["status"] for each in json.loads(checked)} <= {"ok", "warning"}
    listed = run(sys.executable, "-m", "uv", "pip", "list", "--format=json", "--python", python)
    found = {each["name"] for each in json.loads(listed)}
    # FastAPI itself may require a package of an extra.
    wanted = names([each for extra in extras for each in EXTRAS[extra]])
    unwanted = names([each for needs in EXTRAS.values() for each in needs]) - wanted - BROUGHT
    assert wanted <= found, f"{wanted} of {found}"
    assert not unwanted & found, f"{unwanted} in {found}"
    print(f"{installer:4} {', '.join(extras) or 'no extras':10}: {len(found)} packages", flush=True)


def check_types(folder: Path, wheel: Path) -> None:
    """Run pyright on everything public, against the installed wheel, without the checkout."""
    extras = ",".join(EXTRAS)
    python = environment(folder / "env", "uv", f"{wheel}[{extras}]", "pytest", "pyright[nodejs]")
    command = ["pyright", "--verifytypes", "fastapi_sqlnative", "--ignoreexternal"]
    # Pyright uses only the first Python on the PATH, and fails below 100 %.
    path = f"PATH={python.parent}:{os.environ['PATH']}"
    said = run("env", path, *command, cwd=folder)
    (score,) = re.findall(r"Type completeness score: (.+)", said)
    print(f"type completeness: {score}", flush=True)
    assert score == "100%", said


def check_tests(folder: Path, wheel: Path, sdist: Path) -> None:
    """Run the core's tests on the wheel, from an unpacked sdist whose package was moved aside."""
    with tarfile.open(sdist) as opened:
        opened.extractall(folder, filter="data")
    (unpacked,) = folder.glob("fastapi_sqlnative-*")
    (unpacked / "fastapi_sqlnative").rename(folder / "aside")
    python = environment(
        folder / "env", "uv", f"{wheel}", "--group", f"{unpacked}/pyproject.toml:test"
    )
    where = run(python, "-c", "import fastapi_sqlnative as it; print(it.__file__)", cwd=unpacked)
    assert Path(where.strip()).is_relative_to(folder / "env"), where
    said = run(python, "-m", "pytest", "-q", "-n", "2", *CORE, cwd=unpacked)
    print(f"tests on the wheel: {said.strip().splitlines()[-1]}", flush=True)


def main() -> None:
    """Check the distributions in the folder that the first argument names."""
    dist = Path(sys.argv[1]).resolve()
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tempfile.TemporaryDirectory(prefix="sqlnative-release-") as name:
        folders = (Path(name) / str(number) for number in range(100))

        def folder() -> Path:
            found = next(folders)
            found.mkdir()
            return found

        check_archives(wheel, sdist, folder())
        for extra in EXTRAS:
            check_installation(folder(), "uv", wheel, extra)
        for installer in "uv", "pip":
            check_installation(folder(), installer, wheel)
            check_installation(folder(), installer, wheel, *EXTRAS)
        check_types(folder(), wheel)
        check_tests(folder(), wheel, sdist)


if __name__ == "__main__":
    main()
