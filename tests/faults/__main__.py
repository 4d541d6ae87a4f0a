"""The command line of the fault suite: `python -m tests.faults`.

It runs each fault once. With `--minutes` it repeats all faults with every driver and deployment.
"""

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.faults.breaking import fill_disk
from tests.faults.cluster import make_certificate, running_cluster
from tests.faults.report import write_report
from tests.faults.run import Finding, Run
from tests.faults.scenarios import SCENARIOS, Scenario


def main() -> int:
    """Run the selected faults, write the report, and return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, help="repeat everything for so long")
    parser.add_argument("--only", default="", help="a part of a fault's name")
    parser.add_argument("--driver", default="", help="one driver instead of each fault's own")
    parser.add_argument("--server", default="", help="one way to serve, likewise")
    parser.add_argument("--report", type=Path, default=Path("build/faults"))
    options = parser.parse_args()
    scenarios = list(chosen(options.only))
    runs: Iterable[Run] = every_run(scenarios)
    if options.minutes is None:
        runs = [
            Run(each, options.driver or each.drivers[0], options.server or each.servers[0])
            for each in scenarios
        ]
    findings = perform(runs, (options.minutes or 60) * 60, options.report)
    broken = sum(bool(each.broken) for each in findings)
    print(f"{len(findings)} faults, {broken} with a broken promise; see {options.report}/report.md")
    return int(bool(broken))


def chosen(part: str) -> Iterator[Scenario]:
    """Yield the faults whose name contains `part`.

    The fault that fills the disk needs root. Without root it is left out, except in CI.
    """
    for each in SCENARIOS:
        if part not in each.name:
            continue
        if each.fault is fill_disk and os.geteuid() != 0 and "CI" not in os.environ:
            print(f"{each.name!r} is left out: only root may mount a small disk.")
            continue
        yield each


def perform(runs: Iterable[Run], seconds: float, report: Path) -> list[Finding]:
    """Perform one run after another until the time is up, and write the report after each."""
    findings: list[Finding] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sqlnative-faults-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the accounts of the server and of PgBouncer need access
        certificate = make_certificate(folder)
        with running_cluster(folder, with_disk=os.geteuid() == 0) as cluster:
            (postgres,) = cluster.execute("SHOW server_version")[0]
            for run in runs:
                begun = time.monotonic()
                if begun - started > seconds:
                    break
                findings.append(found := run.perform(cluster, folder, certificate))
                _tell(found, time.monotonic() - begun)
                spent = time.monotonic() - started
                write_report(report, findings, seconds=spent, postgres=postgres)
                _keep_logs(folder, report if found.broken else None, len(findings))
    return findings


def _keep_logs(folder: Path, report: Path | None, number: int) -> None:
    """Move the application's logs beside the report, or delete them without a report."""
    for log in folder.glob("application*.log"):
        if report is not None:
            (report / "logs").mkdir(exist_ok=True)
            shutil.copy(log, report / "logs" / f"{number}-{log.name}")
        log.unlink()


def every_run(scenarios: Sequence[Scenario]) -> Iterator[Run]:
    """Yield every fault with every driver and deployment, endlessly."""
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


if __name__ == "__main__":
    sys.exit(main())
