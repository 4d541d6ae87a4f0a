"""Checks of a page's Docker, Kubernetes and systemd files against the page's application.

None of these programs is available to the tests. So each file is parsed as they parse it, its
commands are parsed by the programs that they start, and values that must agree are compared: ports,
paths, names, seconds.
"""

import configparser
import contextlib
import inspect
import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import uvicorn
import yaml
from alembic.config import CommandLine
from fastapi import FastAPI
from starlette.testclient import TestClient

from fastapi_sqlnative import __main__ as checklist
from fastapi_sqlnative import health_router
from fastapi_sqlnative._lifespan.running import installations_of

API_VERSIONS = {"Deployment": "apps/v1", "Job": "batch/v1"}
PROBES = {
    "startupProbe": "/health/live",
    "livenessProbe": "/health/live",
    "readinessProbe": "/health/ready",
}
PROBE = {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"}
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "CMD"}
UNIT = {
    "Unit": {"Description", "Wants", "After"},
    "Service": {
        *("Type", "User", "WorkingDirectory", "EnvironmentFile", "Environment", "ExecStart"),
        *("KillMode", "KillSignal", "TimeoutStartSec", "TimeoutStopSec", "Restart", "RestartSec"),
    },
    "Install": {"WantedBy"},
}
READY_WITHIN: float = inspect.signature(health_router).parameters["timeout"].default
GUNICORN = {"--worker-class", "--workers", "--bind", "--graceful-timeout"}


class Deployments:
    """The checks of one page's files and commands.

    Args:
        names: The names that the page's Python blocks define. The application is `app`.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names
        self.command: list[str] = []  # the container's command
        self.objects: dict[str, dict[str, Any]] = {}  # Kubernetes objects, by kind and name
        self.units: dict[str, configparser.ConfigParser] = {}

    # --- files ---

    def dockerfile(self, content: str) -> None:
        lines = [line.split(maxsplit=1) for line in content.splitlines() if line]
        assert lines[0][0] == "FROM"
        assert lines[-1][0] == "CMD"
        found = dict(lines)
        assert {instruction for instruction, _ in lines} <= INSTRUCTIONS
        assert found["USER"].isdecimal(), "Kubernetes cannot tell whether a name is root's"
        assert int(found["USER"]) > 0
        self.command = json.loads(found["CMD"])  # with a string, a shell would get the signal
        served = self.uvicorn(self.command)
        assert served["host"] == "0.0.0.0", "nobody outside the container would reach it"
        assert str(served["port"]) == found["EXPOSE"]
        assert "alembic" not in content

    def kubernetes(self, content: str) -> None:
        for each in yaml.safe_load_all(content):
            kind = each["kind"]
            assert each["apiVersion"] == API_VERSIONS[kind]
            check: Callable[..., None] = getattr(self, kind.lower())
            pod = each["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            address = environment(container)["DATABASE_URL"]
            assert "secretKeyRef" in address, "the address has a password"
            check(each["spec"], pod, container)
            self.objects[f"{kind.lower()}/{each['metadata']['name']}"] = each
        containers = [
            each["spec"]["template"]["spec"]["containers"][0] for each in self.objects.values()
        ]
        assert len({each["image"] for each in containers}) == 1
        secrets = [str(environment(each)["DATABASE_URL"]) for each in containers]
        assert len(set(secrets)) == len(secrets), "migrations have a role of their own"

    def deployment(
        self, spec: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]
    ) -> None:
        labels = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        served = self.uvicorn(container.get("command", self.command))
        (port,) = container["ports"]
        assert port["containerPort"] == served["port"]
        for name, path in PROBES.items():
            probe = container[name]
            assert probe.keys() <= PROBE
            assert probe["httpGet"] == {"path": path, "port": port["name"]}
            assert self.answers(path)
        assert container["readinessProbe"]["timeoutSeconds"] > READY_WITHIN
        startup = container["startupProbe"]
        waits = [each.startup_wait or 0 for each in self.installations()]
        assert startup["periodSeconds"] * startup["failureThreshold"] > max(waits)
        sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        readiness = container["readinessProbe"]
        assert sleep > readiness["periodSeconds"] * readiness["failureThreshold"]
        drain = float(environment(container)["DRAIN_SECONDS"])
        assert pod["terminationGracePeriodSeconds"] > sleep + self.ending(served, drain)

    def job(self, spec: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]) -> None:
        alembic(container["command"])
        assert pod["restartPolicy"] == "Never"
        assert spec["backoffLimit"] == 0
        assert "livenessProbe" not in container

    def systemd(self, content: str) -> None:
        title, _, rest = content.partition("\n")
        unit = configparser.ConfigParser(interpolation=None, delimiters="=")
        unit.optionxform = str  # type: ignore[assignment,method-assign] # configparser's documented way
        unit.read_string(rest)
        for section in unit.sections():
            assert unit[section].keys() <= UNIT[section]
        service = unit["Service"]
        program, *arguments = shlex.split(service["ExecStart"].replace("%i", "8001"))
        path = PurePosixPath(program)
        assert path.is_relative_to(service["WorkingDirectory"])
        assert service["User"] != "root"
        if service.get("Type") == "oneshot":
            alembic([path.name, *arguments])
            assert int(service["TimeoutStartSec"]) > 0
        else:
            served = self.uvicorn([path.name, *arguments])
            drain = float(service["Environment"].removeprefix("DRAIN_SECONDS="))
            assert service["KillSignal"] == "SIGTERM"
            assert int(service["TimeoutStopSec"]) > self.ending(served, drain)
        self.units[title.removeprefix("# ").removesuffix(".service")] = unit
        secrets = [each["Service"]["EnvironmentFile"] for each in self.units.values()]
        assert len(set(secrets)) == len(secrets), "migrations have a role of their own"

    # --- commands ---

    def run(self, words: Sequence[str]) -> None:
        """Check one command line."""
        match words:
            case ["uvicorn", *_]:
                self.uvicorn(words)
            case ["python", "-m", "fastapi_sqlnative", *arguments]:
                self.checklist(arguments)
            case ["alembic", *_]:
                alembic(words)
            case ["gunicorn", application, *options]:
                self.gunicorn(application, dict(zip(options[::2], options[1::2], strict=True)))
            case ["docker", "build", "--tag", _, "."]:
                assert self.command
            case ["docker", "run", *options, _]:
                self.docker_run(dict(zip(options[::2], options[1::2], strict=True)))
            case ["kubectl", "apply", "--filename", name]:
                assert PurePosixPath(name).suffix == ".yaml"
            case ["kubectl", "wait", "--for", "condition=complete", "--timeout", timeout, job]:
                limit = self.objects[job]["spec"]["activeDeadlineSeconds"]
                assert int(timeout.removesuffix("s")) >= limit
            case ["kubectl", "rollout", "status", deployment]:
                assert deployment in self.objects
            case ["systemctl", "start" | "restart", unit]:
                template, at, _ = unit.partition("@")
                assert template + at in self.units
            case ["curl", *_, url]:
                assert self.answers(urlsplit(url).path)
            case _:
                raise AssertionError(f"nothing here checks {' '.join(words)!r}")

    def checklist(self, arguments: Sequence[str]) -> None:
        """Run the checklist on the page's application, whose databases are available."""
        module = ModuleType("main")
        module.__dict__.update(self.names)
        nowhere = io.StringIO()
        with (
            patch.dict(sys.modules, main=module),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            assert checklist.main(list(arguments)) == ("--strict" in arguments)

    def uvicorn(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the parameters that uvicorn parses from its arguments."""
        program, *arguments = words
        assert program == "uvicorn"
        served = uvicorn.main.make_context(program, arguments).params
        self.application(served["app"])
        return served

    def gunicorn(self, application: str, options: Mapping[str, str]) -> None:
        self.application(application)
        assert options.keys() <= GUNICORN
        drain: float = self.names["DRAIN_SECONDS"]
        requests = self.uvicorn(self.command)["timeout_graceful_shutdown"]
        seconds = {"timeout_graceful_shutdown": requests}
        assert int(options["--graceful-timeout"]) > self.ending(seconds, drain)

    def docker_run(self, options: Mapping[str, str]) -> None:
        served = self.uvicorn(self.command)
        assert options["--publish"].split(":")[1] == str(served["port"])
        assert int(options["--stop-timeout"]) > self.ending(served, self.names["DRAIN_SECONDS"])

    # --- the page's application ---

    def application(self, name: str) -> None:
        module, _, attribute = name.partition(":")
        assert module == "main"
        assert isinstance(self.names[attribute], FastAPI)

    def answers(self, path: str) -> bool:
        with TestClient(self.names["app"]) as client:
            return client.get(path).status_code == 200

    def installations(self) -> list[Any]:
        return list(installations_of(self.names["app"]).by_name.values())

    def ending(self, served: Mapping[str, Any], drain: float) -> float:
        """Return the number of seconds that a process may take to end."""
        databases: float = max(each.shutdown_timeout for each in self.installations())
        requests: float = served["timeout_graceful_shutdown"]
        return drain + requests + databases


def environment(container: Mapping[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container["env"]}


def alembic(words: Sequence[str]) -> None:
    program, *arguments = words
    assert program == "alembic"
    assert hasattr(CommandLine().parser.parse_args(arguments), "cmd")
