"""Run the faults: `python -m tests.faults`, or for MINUTES with every driver and deployment."""

import argparse
import contextlib
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
from sqlalchemy import create_engine

from tests.faults.application import Base
from tests.faults.breaking import DATABASE, ROLE, Cluster, mounted_disk
from tests.faults.report import write_report
from tests.faults.run import Finding, Run
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.postgres_server import PostgresServer

# As it is in production: what is acknowledged has reached the disk.
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}


def main() -> int:
    """Run what is asked for, write the report; return 1 when a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, help="repeat everything for so long")
    parser.add_argument("--only", default="", help="a part of a fault's name")
    parser.add_argument("--driver", default="", help="one driver instead of each fault's own")
    parser.add_argument("--report", type=Path, default=Path("build/faults"))
    options = parser.parse_args()
    chosen = [each for each in SCENARIOS if options.only in each.name]
    short = [Run(each, options.driver or each.drivers[0], each.servers[0]) for each in chosen]
    runs = short if options.minutes is None else every_run(chosen)
    budget = 60 * (options.minutes or 60)
    started = time.monotonic()
    findings: list[Finding] = []
    with _cluster() as (cluster, folder, certificate):
        (postgres,) = cluster.execute("SHOW server_version")[0]
        for run in runs:
            if time.monotonic() - started > budget:
                break
            begun = time.monotonic()
            findings.append(found := run.perform(cluster, folder, certificate))
            _tell(found, time.monotonic() - begun)
            seconds = time.monotonic() - started
            # After each fault, so that an interrupted run has its report.
            write_report(options.report, findings, seconds=seconds, postgres=postgres)
            _keep_logs(folder, options.report if found.broken else None, len(findings))
    broken = sum(bool(each.broken) for each in findings)
    print(f"{len(findings)} faults, {broken} with a broken promise; see {options.report}/report.md")
    return int(bool(broken))


def _keep_logs(folder: Path, report: Path | None, number: int) -> None:
    """Keep what the application has logged beside the report, or throw it away."""
    for log in folder.glob("application*.log"):
        if report is not None:
            (report / "logs").mkdir(exist_ok=True)
            shutil.copy(log, report / "logs" / f"{number}-{log.name}")
        log.unlink()


def every_run(scenarios: Sequence[Scenario]) -> Iterator[Run]:
    """Give every fault with every driver and deployment, again and again."""
    for pre_ping in itertools.cycle((False, True)):
        for turn in range(9):
            for each in scenarios:
                driver = each.drivers[turn % len(each.drivers)]
                yield Run(each, driver, each.servers[turn // 3 % len(each.servers)], pre_ping)


def _tell(found: Finding, seconds: float) -> None:
    recovery = "-" if found.recovery is None else f"{found.recovery:.1f} s"
    print(
        f"{found.scenario:40} {found.driver:14} {found.server:20} {seconds:5.1f} s:",
        f"{found.acknowledged} acknowledged, {found.refused} refused, {found.unknown} unknown,",
        f"recovered after {recovery}",
        *("\n    BROKEN: " + each for each in found.broken),
        flush=True,
    )


@contextlib.contextmanager
def _cluster() -> Iterator[tuple[Cluster, Path, Path]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sqlnative-faults-")))
        folder.chmod(0o755)  # the server's account and PgBouncer's look into it
        settings = DURABLE | {"max_connections": "40"}
        server = stack.enter_context(PostgresServer(settings=settings))
        disk = stack.enter_context(mounted_disk(folder / "disk", server.user))
        with psycopg.connect(server.url, autocommit=True) as admin:
            admin.execute(f"CREATE ROLE {ROLE} LOGIN")
            admin.execute(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
            admin.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")
        cluster = Cluster(server, disk)
        engine = create_engine(cluster.admin.replace("postgresql", "postgresql+psycopg", 1))
        Base.metadata.create_all(engine)
        engine.dispose()
        cluster.execute("ALTER TABLE entry SET TABLESPACE small")
        cluster.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}")
        yield cluster, folder, make_certificate(folder)


def make_certificate(folder: Path) -> Path:
    """Make a certificate for 127.0.0.1 that is its own authority; its key lies beside it."""
    certificate = folder / "server.pem"
    key = certificate.with_suffix(".key")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o644)  # PgBouncer reads it as nobody; it is worth nothing to anybody
    return certificate


if __name__ == "__main__":
    sys.exit(main())
