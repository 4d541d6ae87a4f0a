"""`make audit`: what it reports about the pinned versions, and when it fails."""

import json
import threading
from collections.abc import Iterator, Mapping
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.audit import audit

TODAY = date(2026, 11, 26)
ROOT = Path(__file__).parents[2]
FOUND: dict[str, Any] = {
    "id": "GHSA-test-test-test",
    "summary": "It is only for a test.",
    "affected": [{"package": {"ecosystem": "PyPI", "name": "fastapi"}}],
}


class Service(ThreadingHTTPServer):
    """An HTTP server that answers like OSV, with only the vulnerabilities that a test sets."""

    vulnerable: Mapping[str, Any]
    asked: set[str]


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        service = self.server
        assert isinstance(service, Service)
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        service.asked.add(f"{name}=={query['version']}")
        found = service.vulnerable.get(name)
        body = json.dumps({"vulns": [found]} if found else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # the base class's name
        """Print nothing."""


@pytest.fixture
def service() -> Iterator[Service]:
    """Run the vulnerability service on loopback."""
    with Service(("127.0.0.1", 0), Answer) as server:
        server.vulnerable, server.asked = {}, set()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def at(service: Service) -> str:
    return f"http://127.0.0.1:{service.server_port}/v1/query"


def accepting(folder: Path, until: str) -> Path:
    path = folder / "audit.toml"
    path.write_text(f"[[exception]]\nid = '{FOUND['id']}'\nreason = 'a test'\nuntil = {until}\n")
    return path


def test_every_pinned_version_is_asked_for(service: Service) -> None:
    """Without a vulnerability the audit passes, and it has queried every pinned version."""
    assert audit(at(service), today=TODAY) == 0
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    anywhere = {line for line in lines if "==" in line and ";" not in line}
    assert any(line.startswith("fastapi==") for line in anywhere)
    assert anywhere <= service.asked


def test_a_vulnerability_fails(service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    """A known vulnerability fails the audit, and the output names it."""
    service.vulnerable = {"fastapi": FOUND}
    assert audit(at(service), today=TODAY) == 1
    assert FOUND["id"] in capfd.readouterr().out


def test_an_exception_is_accepted(
    service: Service, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A listed exception passes and its reason is printed, while any other vulnerability fails."""
    service.vulnerable = {"fastapi": FOUND}
    noted = accepting(tmp_path, "2026-12-01")
    assert audit(at(service), exceptions=noted, today=TODAY) == 0
    assert "GHSA-test-test-test: a test" in capfd.readouterr().out
    service.vulnerable = {"starlette": FOUND | {"id": "GHSA-other-other"}}
    assert audit(at(service), exceptions=noted, today=TODAY) == 1


def test_an_exception_has_its_day(
    service: Service, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An exception whose date has come fails the audit, even without a vulnerability."""
    noted = accepting(tmp_path, "2026-11-26")
    assert audit(at(service), exceptions=noted, today=TODAY) == 1
    assert "look again at GHSA-test-test-test" in capfd.readouterr().out


def test_a_service_that_is_away_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    """If OSV is unreachable, the audit passes and reports that nothing is known."""
    assert audit("http://127.0.0.1:1/v1/query", today=TODAY) == 0
    assert "OSV could not be asked, so nothing is known" in capfd.readouterr().out
