"""README.md and docs/: snippets run, links resolve, and public names are documented.

These are the rules for writing a page. They apply to all of its blocks:

- ``python`` blocks run in order, in one module. A PostgreSQL database is at ``DATABASE_URL``, and a
  second one at ``ANALYTICS_DATABASE_URL``. Both are empty at the top of a page.
- A ``text`` block is the output of the ``python`` block before it.
- An ``http`` block starts the application that is called ``app`` at that point, and stops it at the
  end of the block. Each line is a request and its response. A class at the end of a line is the
  exception that reaches the server's log:

      POST /books {"title": "Emma"} -> 201 {"id": 1}
      POST /forgotten -> 500 UncommittedChangesError
      WS /echo hello -> "hello"

  ``start -> DatabaseNotInstalledError`` is the only line of its block: the application does not
  start.
- Every endpoint that a page defines is requested on that page.
- ``console`` blocks name targets of the Makefile, extras and an ``app`` that exist. ``pytest``
  calls the page's tests, which import the page's names from ``main``.
- An ``sql`` block runs in one transaction that is rolled back. A statement marked ``-- refused``
  must fail because the role lacks the privilege.
- A ``toml`` block is FastAPI's table in pyproject.toml.
- ``dockerfile``, ``yaml`` (Kubernetes) and ``ini`` (systemd) blocks and the commands that belong to
  them are compared with the page's ``app``: tests/deployments.py.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable, Generator, Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import fastapi
import psycopg
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from markdown_it import MarkdownIt
from markdown_it.token import Token
from sqlalchemy import make_url
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

import fastapi_sqlnative
from conftest import PostgresDatabase, WorkerPostgres
from fastapi_sqlnative import exceptions
from tests.deployments import Deployments
from tests.serving import launch, wait_until

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "docs").glob("**/*.md"))
(SKILL,) = (ROOT / "fastapi_sqlnative").glob(".agents/skills/*/SKILL.md")
INTEGRATIONS = ROOT / "docs" / "works-with.md"  # tests/test_site.py runs it: it needs the packages
PAGES = [README, SKILL, *(page for page in GUIDE if page != INTEGRATIONS)]
LINKED = [
    *GUIDE,
    *(
        page
        for where in ("", "examples/**/", "migrations_example/")
        for page in sorted(ROOT.glob(f"{where}*.md"))
    ),
]
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)

SCHEMA = "docs"
METHODS = {"get", "post", "put", "patch", "delete", "websocket"}
STATEMENT = re.compile(r"(.+?); *(?:-- *(.*?))?\n", re.DOTALL)
ANSWER = re.compile(r'(?P<status>\d{3})?(?P<body> ?["\[{\dntf].*?)?(?P<error> ?[A-Z]\w+)?')


@functools.cache
def parse(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))


def blocks(page: Path) -> list[Token]:
    return [each for each in parse(page) if each.type in ("fence", "code_block")]


def inline(page: Path, kind: str) -> list[Token]:
    """List the inline tokens of one kind in paragraphs, headings and cells."""
    return [child for each in parse(page) for child in each.children or () if child.type == kind]


def code(page: Path) -> str:
    """Return the page's python as one module that keeps the page's line numbers."""
    lines: list[str] = []
    for block in blocks(page):
        if block.info == "python":
            assert block.map is not None
            lines += [""] * (block.map[0] + 1 - len(lines))
            lines += block.content.splitlines()
    return "\n".join(lines) + "\n"


def module_name(page: Path) -> str:
    """Return the name of the module for a page's python."""
    return re.sub(r"\W", "_", page.relative_to(ROOT).with_suffix("").as_posix().lower())


# --- snippets -----------------------------------------------------------------------------------


class Watched:
    """A wrapper that records the endpoints called and the exception that reaches the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.called: set[str] = set()
        self.raised: BaseException | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.raised = None
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            self.raised = error
            raise
        finally:
            self.called.add(getattr(scope.get("endpoint"), "__name__", ""))


class Snippets:
    """The blocks of one page, run one after the other."""

    def __init__(self, page: Path, module: ModuleType) -> None:
        self.page = page
        self.names = module.__dict__
        self.printed = ""
        self.called: set[str] = set()
        self.deployments = Deployments(self.names)

    def run(self, block: Token) -> None:
        if block.info != "text":
            assert not self.printed, f"printed, and no text block says so: {self.printed}"
        runners: dict[str, Callable[[Token], None]] = {
            "python": self.python,
            "text": self.text,
            "http": self.http,
            "console": self.console,
            "sql": self.sql,
            "toml": self.toml,
            "dockerfile": lambda block: self.deployments.dockerfile(block.content),
            "yaml": lambda block: self.deployments.kubernetes(block.content),
            "ini": lambda block: self.deployments.systemd(block.content),
        }
        if block.type == "code_block" and self.page == SKILL:
            return  # an example of what not to write
        assert block.type == "fence", "an indented block says not what it is: use a fence"
        assert block.info in runners, f"nothing here runs {block.info!r}"
        assert block.map is not None
        try:
            runners[block.info](block)
        except BaseException as error:
            error.add_note(f"{self.page.name}:{block.map[0] + 1}")
            raise

    def python(self, block: Token) -> None:
        assert block.map is not None
        source = "\n" * (block.map[0] + 1) + block.content
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(source, self.page, "exec"), self.names)
        self.printed = output.getvalue()

    def text(self, block: Token) -> None:
        assert self.printed == block.content
        self.printed = ""

    def http(self, block: Token) -> None:
        app = self.names["app"]
        assert isinstance(app, FastAPI)
        watched = Watched(app)
        client = TestClient(watched, raise_server_exceptions=False)
        lines = [line.split(" -> ") for line in block.content.splitlines()]
        if lines[0][0] == "start":
            ((_, failure),) = lines
            with pytest.raises((LookupError, RuntimeError)) as raised, client:
                pass
            assert type(raised.value).__name__ == failure
            self.called |= {
                each.name
                for each in app.routes
                if isinstance(each, APIRoute) and repr(each.path) in str(raised.value)
            }
            return
        with client:
            for request, answer in lines:
                self.request(client, watched, request, answer)
        self.called |= watched.called

    def request(self, client: TestClient, watched: Watched, request: str, answer: str) -> None:
        expected = ANSWER.fullmatch(answer)
        assert expected is not None, f"not understood: {answer}"
        method, path, *rest = request.split(" ", 2)
        if method == "WS":
            with client.websocket_connect(path) as socket:
                socket.send_text(*rest)
                assert socket.receive_text() == json.loads(expected["body"])
            return
        response = client.request(method, path, json=json.loads(*rest) if rest else None)
        raised = "" if watched.raised is None else type(_alone(watched.raised)).__name__
        found = f"{request} -> {response.status_code} {response.text} {raised}"
        assert str(response.status_code) == expected["status"], found
        assert raised == (expected["error"] or "").strip(), found
        if expected["body"]:
            is_json = response.headers["content-type"] == "application/json"
            body = response.json() if is_json else response.text
            assert body == json.loads(expected["body"]), found

    def console(self, block: Token) -> None:
        for line in block.content.splitlines():
            words = shlex.split(line, comments=True)
            while "=" in words[0]:
                assert words.pop(0).startswith("DATABASE_URL=")
            match words:
                case ["make", target]:
                    assert f"\n{target}: " in (ROOT / "Makefile").read_text("utf-8")
                case ["uv", "run", "pytest"]:
                    tests = [each for name, each in self.names.items() if name.startswith("test_")]
                    assert tests
                    for test in tests:
                        test()
                case (
                    ["pip" | ".venv/bin/pip", "install", *packages]
                    | ["uv", "add", "--dev", *packages]
                    | ["uv", "add", *packages]
                ):
                    for package in packages:
                        check_package(package)
                case ["python", "-m", "venv", ".venv"] | ["uv", "init", "--bare", *_]:
                    pass  # tests/test_site.py runs the tutorial
                case ["uv", "run", "fastapi", "dev"]:
                    assert isinstance(self.names["app"], FastAPI)
                case _:
                    self.deployments.run(words)

    def toml(self, block: Token) -> None:
        tables = tomllib.loads(block.content)
        module, _, name = tables["tool"]["fastapi"]["entrypoint"].partition(":")
        assert module == "main"
        assert isinstance(self.names[name], FastAPI)

    def sql(self, block: Token) -> None:
        url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql")
        with (
            psycopg.connect(url.render_as_string(hide_password=False)) as connection,
            connection.transaction(force_rollback=True),
        ):
            for statement, comment in STATEMENT.findall(block.content):
                lacking = pytest.raises(psycopg.errors.InsufficientPrivilege)
                expected = lacking if comment == "refused" else contextlib.nullcontext()
                with expected, connection.transaction():
                    connection.execute(statement)


def check_package(requirement: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = re.fullmatch(r"([\w-]+|\.)(?:\[([\w,]+)\])?", requirement)
    assert found is not None
    if found[1] in (project["name"], "."):  # published, or from a checkout
        extras = (found[2] or "").split(",")
        assert set(filter(None, extras)) <= project["optional-dependencies"].keys()
    else:
        assert found[1] in {"aiosqlite", "asyncmy", "fastapi", "pytest", "uvicorn"}


def endpoints(page: Path) -> set[str]:
    """List the functions that are decorated as endpoints."""
    return {
        node.name
        for node in ast.walk(ast.parse(code(page)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr in METHODS
    }


@contextlib.contextmanager
def empty_schema(database: PostgresDatabase, path: str = SCHEMA) -> Generator[str]:
    """Create an empty schema, yield a URL that uses it, and drop it at the end."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
        connection.execute(f"CREATE SCHEMA {SCHEMA}")
        url = database.url("psycopg")
        separator = "&" if "?" in url else "?"
        yield f"{url}{separator}options={quote(f'-csearch_path={path}')}"
        connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


def run_snippets(page: Path, postgres: WorkerPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all blocks of a page in order, on empty schemas."""
    module = ModuleType(module_name(page))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # annotations are looked up here
    monkeypatch.setitem(sys.modules, "main", module)
    snippets = Snippets(page, module)
    # A clone that the page makes does not have this schema.
    path = f"{SCHEMA},public" if page.stem == "testing" else SCHEMA
    with empty_schema(postgres, path) as url, empty_schema(postgres.second) as second_url:
        monkeypatch.setenv("DATABASE_URL", url)
        monkeypatch.setenv("ANALYTICS_DATABASE_URL", second_url)
        for block in blocks(page):
            snippets.run(block)
    assert not snippets.printed, "printed, and no text block says so"
    assert endpoints(page) <= snippets.called, "endpoints that no http block requests"


@pytest.mark.usefixtures("patient_probes")
@each_page
def test_snippets_run(
    page: Path, postgres: WorkerPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of a page runs, with the output and the responses that the page shows."""
    run_snippets(page, postgres, monkeypatch)


@pytest.mark.slow("a process for each page, 2 s: what they do is tested in test_draining")
@pytest.mark.parametrize("page", ["deployment.md", "health.md"])
def test_sigterm_drains_as_a_page_says(page: str, postgres: WorkerPostgres, tmp_path: Path) -> None:
    """A page's application, run with the Dockerfile's command, drains on SIGTERM."""
    (dockerfile,) = (
        each for each in blocks(ROOT / "docs" / "deployment.md") if each.info == "dockerfile"
    )
    listening = dockerfile.content.replace("0.0.0.0", "127.0.0.1").replace("8000", "0")
    command: list[str] = json.loads(listening.rpartition("CMD ")[2])
    first, *others = (
        each.content for each in blocks(ROOT / "docs" / page) if each.info == "python"
    )
    draining = [each for each in others if "drain_on_sigterm(app" in each]
    (tmp_path / "main.py").write_text(first + "".join(draining), "utf-8")
    environment = {"DATABASE_URL": postgres.url("psycopg"), "DRAIN_SECONDS": "60"}
    with launch([sys.executable, "-m", *command], tmp_path, **environment) as (process, client):
        wait_until(lambda: client.get("/health/ready").json()["status"] == "ready")
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").json()["status"] == "draining")
        assert client.get("/health/ready").status_code == 503
        assert client.get("/answer").json() == 42
        process.send_signal(signal.SIGTERM)  # the drain is long, and a second signal ends it
        assert process.wait(60) == -signal.SIGTERM


# --- links and names ----------------------------------------------------------------------------


@functools.cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    tokens = parse(page)
    headings = [
        tokens[place + 1] for place, each in enumerate(tokens) if each.type == "heading_open"
    ]
    plain = ["".join(child.content for child in each.children or ()) for each in headings]
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in plain}


def test_links_lead_somewhere() -> None:
    """A link within the repository leads to an existing file, and its anchor to a heading in it."""
    hrefs = [
        (page, href)
        for page in LINKED
        for link in inline(page, "link_open")
        if not (href := str(link.attrs["href"])).startswith("https://")
    ]
    assert [(page.name, href) for page, href in hrefs if not leads_somewhere(page, href)] == []


def leads_somewhere(page: Path, href: str) -> bool:
    path, _, anchor = href.partition("#")
    target = (page.parent / path).resolve() if path else page
    there = target.exists() and target.is_relative_to(ROOT)
    return there and (not anchor or anchor in anchors(target))


def test_the_index_leads_to_every_page() -> None:
    """The index of the guide links to every other page."""
    index = ROOT / "docs" / "index.md"
    linked = {str(link.attrs["href"]).partition("#")[0] for link in inline(index, "link_open")}
    assert {page.relative_to(index.parent).as_posix() for page in GUIDE} - linked == {"index.md"}


def words(pages: list[Path]) -> set[str]:
    """Return the name at the start of each inline `code`, without what follows it."""
    found = (
        re.match(r"\w+", each.content) for page in pages for each in inline(page, "code_inline")
    )
    return {each[0] for each in found if each}


def test_every_public_name_is_documented() -> None:
    """Every name that the package exports is mentioned in the guide."""
    assert set(fastapi_sqlnative.__all__) <= words(GUIDE)


def test_every_exception_is_documented() -> None:
    """Every exception of the package is mentioned on the page about exceptions."""
    assert set(exceptions.__all__) <= words([ROOT / "docs" / "exceptions.md"])


def public_modules() -> list[ModuleType]:
    """List the package and its public modules, which are those with `__all__`."""
    found = pkgutil.walk_packages(fastapi_sqlnative.__path__, f"{fastapi_sqlnative.__name__}.")
    names = [each.name for each in found if "._" not in each.name]
    modules = [fastapi_sqlnative, *map(importlib.import_module, names)]
    return [module for module in modules if hasattr(module, "__all__")]


def test_the_reference_is_complete() -> None:
    """Every public name of every public module is in the reference once, with a docstring."""
    described = [
        path
        for page in GUIDE
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)
    ]
    objects = [pkgutil.resolve_name(path) for path in described]
    assert len(described) == len(set(described))
    for module in public_modules():
        for name in module.__all__:
            found = [each for each in objects if each is getattr(module, name)]
            assert len(found) == 1, f"{module.__name__}.{name} is described {len(found)} times"
            assert found[0].__doc__, f"{module.__name__}.{name} has no docstring"


def described_parameters(described: Any) -> Iterator[tuple[str, str]]:
    """Yield each parameter of a function, or of a class and its methods, with its docstring."""
    docstring = inspect.getdoc(described) or ""
    for name in re.findall(r"(?:like|those of) `(\w+(?:\.\w+)?)`", docstring):
        docstring += inspect.getdoc(pkgutil.resolve_name(f"{described.__module__}.{name}")) or ""
    with contextlib.suppress(ValueError):  # a class without a signature
        yield from ((name, docstring) for name in inspect.signature(described).parameters)
    if inspect.isclass(described):
        for method in vars(described).values():
            if inspect.isfunction(method) and "\n" in (method.__doc__ or ""):
                yield from described_parameters(method)


@pytest.mark.parametrize(
    "module",
    [each for each in public_modules() if not hasattr(each, "pytest")],
    ids=lambda module: module.__name__,
)
def test_every_parameter_is_described(module: ModuleType) -> None:
    """The docstring of a public function or class mentions each of its parameters."""
    for public in module.__all__:
        described = getattr(module, public)
        if inspect.isclass(described) and issubclass(described, BaseException | Enum | list):
            continue
        for name, docstring in described_parameters(described):
            mentioned = rf"\b{name}\b" if inspect.isclass(described) else rf"^\W*{name}: |`{name}"
            flags = re.MULTILINE | re.IGNORECASE
            assert name == "self" or re.search(mentioned, docstring, flags), f"{public}: {name}"


def test_names_in_the_guide_exist() -> None:
    """The pages import only existing, public names of the package."""
    for page in PAGES:
        for node in ast.walk(ast.parse(code(page))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "fastapi_sqlnative"
            ):
                public = importlib.import_module(node.module or "").__all__
                assert {alias.name for alias in node.names} <= set(public), page.name


def test_the_skill_is_found_by_its_name() -> None:
    """The skill for agents has a path like FastAPI's own, valid metadata and existing errors."""
    own = next((Path(fastapi.__file__).parent / ".agents" / "skills").glob("*/SKILL.md"), None)
    if own is not None:  # FastAPI's oldest supported version has none
        assert own.relative_to(own.parents[3]).parts[:2] == SKILL.relative_to(ROOT).parts[1:3]
    _, matter, _ = SKILL.read_text("utf-8").split("---\n", 2)
    described = dict(line.split(": ", 1) for line in matter.splitlines())
    assert described["name"] == SKILL.parent.name
    assert len(described["description"]) <= 1024
    assert set(exceptions.__all__) >= {name for name in words([SKILL]) if name.endswith("Error")}


def test_the_lowest_versions_are_the_ones_supported() -> None:
    """The page about support names the lowest versions that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [each for names in project["optional-dependencies"].values() for each in names]
    page = (ROOT / "docs" / "support.md").read_text("utf-8")
    for requirement in [*project["dependencies"], *extras, f"python{project['requires-python']}"]:
        lowest = re.search(r">=([\d.]+)", requirement)
        assert lowest is not None
        assert re.search(rf"\b{re.escape(lowest[1])}\b", page), requirement


def test_the_readme_is_short() -> None:
    """The README has at most 90 lines, and its application at most 25 that are not blank."""
    assert len(README.read_text("utf-8").splitlines()) <= 90
    (app,) = (block for block in blocks(README) if block.info == "python")
    assert len([line for line in app.content.splitlines() if line.strip()]) <= 25


def _alone(error: BaseException) -> BaseException:
    """Unwrap a group of one error, in which older versions of Starlette raise a stream's error."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
