"""Tests of `python -m examples NAME` and of the commands in every example's README."""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import WorkerPostgres
from examples.__main__ import ADDRESS, TO_TRY, main, to_try
from tests.postgres_server import temporary_folder
from tests.serving import serve, wait_until

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.parent for path in ROOT.glob("examples/*/app.py"))
ANSWER = re.compile(r"# (?P<status>\d{3})(?: (?P<body>.+))?")


# --- the READMEs ---


@pytest.fixture
def sqlite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the address of a new file into the environment."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path}/example.db")


def commands(readme: Path) -> Iterator[tuple[str, str, str | None]]:
    """Yield each command with the status and the body on the line below it."""
    for block in TO_TRY.findall(readme.read_text("utf-8")):
        lines = block.splitlines()
        for place, line in enumerate(lines):
            if line.startswith("curl "):
                answer = ANSWER.fullmatch("".join(lines[place + 1 : place + 2]))
                assert answer is not None, f"nothing says what it answers: {line}"
                yield line, answer["status"], answer["body"]


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(each, id=each.name, marks=[pytest.mark.mariadb] * (each.name == "mariadb"))
        for each in EXAMPLES
    ],
)
def test_a_readme_says_what_is_answered(example: Path, request: pytest.FixtureRequest) -> None:
    """On an empty database, each command in a README gets the response that the README shows."""
    own = {"mariadb": "mariadb_database", "sqlite": "sqlite_file"}
    request.getfixturevalue(own.get(example.name, "databases"))
    given = list(commands(example / "README.md"))
    assert given, "the README has no line to try"
    with serve(importlib.import_module(f"examples.{example.name}.app").create_app()) as served:
        for command, status, body in given:
            found, text = paste(command.replace(ADDRESS, served.url))
            assert str(found) == status, f"{command}\n{text}"
            assert body is None or value(text) == value(body), command


def value(body: str) -> Any:
    """Parse a body as JSON, if it is."""
    try:
        return json.loads(body)
    except json.JSONDecodeError:
        return body.strip()


def paste(command: str) -> tuple[int, str]:
    """Run a line with curl or, if it is not installed, send the same with httpx."""
    words = shlex.split(command)
    if shutil.which("curl"):
        words += ["-sS", "-w", "\n%{http_code}"]
        sent = subprocess.run(words, capture_output=True, text=True, check=True)  # noqa: S603 # our own command
        body, _, status = sent.stdout.rpartition("\n")
        return int(status), body
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-w")
    parser.add_argument("-X", default="")
    parser.add_argument("-d")
    parser.add_argument("-H", action="append", default=[])
    given = parser.parse_args(words[1:])
    headers = dict(header.split(": ", 1) for header in given.H)
    method = given.X or ("POST" if given.d else "GET")
    response = httpx.request(method, given.url, content=given.d, headers=headers)
    return response.status_code, response.text


# --- python -m examples ---


@contextmanager
def launched(
    name: str, directory: Path, stop: signal.Signals, **environment: str
) -> Generator[list[str]]:
    """Run an example as a process, yield its output, and check how it exits."""
    unset = {"DATABASE_URL": "", "SECOND_DATABASE_URL": "", "PORT": "0"}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(  # noqa: S603 # our own command
            [sys.executable, "-m", "examples", name],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), **unset, **environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield read_banner(process)
            process.send_signal(stop)
            assert process.wait(60) == 0
        finally:
            process.kill()
            errors.seek(0)
            said = errors.read()
            sys.stderr.write(said)  # shown with a failure
    assert "Traceback" not in said


def read_banner(process: "subprocess.Popen[str]") -> list[str]:
    assert process.stdout is not None
    printed: list[str] = []
    for line in process.stdout:
        printed.append(line.strip())
        if line.startswith("Ctrl-C"):
            return printed
    raise AssertionError(f"The example ended while it was starting: {printed}")


def port_of(printed: list[str]) -> int:
    (line,) = (line for line in printed if line.startswith("The example is served on"))
    return int(line.rpartition(":")[2])


def is_served(port: int) -> bool:
    # Not by binding it: another test's client may have been given the port meanwhile.
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def paste_all(printed: list[str], *, ada: int = 1_000_00) -> None:
    """Run the showcase's five printed commands; `ada` is the initial balance."""
    assert """1. ada's accounts: 200 [{"number":"ada-1","balance":100000}]""" in printed
    accounts, small, large, ready, ledger = (line for line in printed if line.startswith("curl"))
    assert answer_of(accounts) == (200, [{"number": "ada-1", "balance": ada}])
    status, entries = answer_of(small)
    assert (status, [entry["amount"] for entry in entries]) == (201, [-500, 500])
    assert answer_of(large) == (409, {"detail": "Insufficient funds."})
    assert answer_of(accounts) == (200, [{"number": "ada-1", "balance": ada - 500}])
    wait_until(lambda: answer_of(ready)[0] == 200)
    status, booked = answer_of(ledger)
    assert (status, booked[0]) == (200, entries[0])


def answer_of(command: str) -> tuple[int, Any]:
    status, body = paste(command)
    return status, json.loads(body)


def test_an_example_runs_on_a_given_postgres(databases: WorkerPostgres, tmp_path: Path) -> None:
    """It takes another port if one is taken; its commands work; Ctrl-C ends it with exit code 0."""
    given = {"DATABASE_URL": databases.dsn, "SECOND_DATABASE_URL": databases.second.dsn}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launched("showcase", tmp_path, signal.SIGINT, PORT=str(port), **given) as printed:
            assert port_of(printed) != port
            paste_all(printed)
    assert not is_served(port_of(printed))


@pytest.mark.slow("two more processes, 3 s: the launcher treats each address as it is tested above")
def test_an_example_runs_twice_on_sqlite(tmp_path: Path) -> None:
    """An existing file is reused; SIGTERM ends the process with exit code 0."""
    for ada in 1_000_00, 995_00:
        url = "sqlite+aiosqlite:///demo.db"
        with launched("showcase", tmp_path, signal.SIGTERM, DATABASE_URL=url) as printed:
            paste_all(printed, ada=ada)
    assert {file.name for file in tmp_path.iterdir()} == {"demo.db", "demo-analytics.db"}


@pytest.mark.slow("two processes and two clusters, 4 s")
@pytest.mark.timeout(180)  # starts two clusters, possibly on a busy machine
def test_two_examples_have_a_postgres_each_and_leave_nothing(tmp_path: Path) -> None:
    """Without an address, it starts an empty PostgreSQL, which is removed when it ends."""
    # Not tmp_path: as root, PostgreSQL's account cannot access pytest's folder.
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as temporary:
        Path(temporary).chmod(0o755)
        with (
            launched("showcase", tmp_path, signal.SIGTERM, TMPDIR=temporary) as first,
            launched("showcase", tmp_path, signal.SIGINT, TMPDIR=temporary) as second,
        ):
            paste_all(first)
            paste_all(second)
            root = httpx.get(f"http://127.0.0.1:{port_of(first)}/", follow_redirects=True)
            assert (root.status_code, root.url.path) == (200, "/docs")
        assert list(Path(temporary).iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_printed_can_be_pasted() -> None:
    """The output can be pasted into any shell: zsh's prompt does not know comments."""
    for readme in (example / "README.md" for example in EXAMPLES):
        lines, answers = to_try(readme.read_text("utf-8"))
        assert [line for line in lines if "#" in line] == []
        assert len([line for line in lines if line.startswith("curl ")]) == len(answers)
        for line in lines:  # text outside quotes means the same in each shell
            assert re.fullmatch(r"[\w ./:@-]+", re.sub(r"'[^']*'|\"[^\"$`!]*\"", "", line)), line


def refusal(*arguments: str) -> str:
    """Run the launcher with invalid arguments, and return its message; no server is started."""
    with pytest.raises(SystemExit) as refused:
        main(list(arguments))
    return str(refused.value)


@pytest.mark.parametrize("arguments", [[], ["quick_strat"], ["showcase", "quick_start"]])
def test_a_name_that_is_none_is_refused(arguments: list[str]) -> None:
    """Without an example's name nothing is started, and the message lists the names."""
    said = refusal(*arguments)
    assert re.findall(r"^  (\w+)$", said, re.MULTILINE) == [each.name for each in EXAMPLES]


def test_a_second_address_that_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """If only one of two databases is given, the message names the variable to set."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://me@127.0.0.1/shop")
    monkeypatch.setenv("PORT", "0")
    monkeypatch.delenv("SECOND_DATABASE_URL", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep pytest's own
    said = refusal("named_databases")
    assert said == "named_databases has two databases: set SECOND_DATABASE_URL too."


def test_the_index_leads_to_every_example() -> None:
    """Every folder with an application has a row in the index."""
    index = (ROOT / "examples" / "README.md").read_text("utf-8")
    assert [each.name for each in EXAMPLES if f"({each.name}/README.md)" not in index] == []
