"""One run of a fault against a running application, and the audit that follows."""

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from anyio.from_thread import start_blocking_portal

from tests.faults import registers
from tests.faults.audit import Load, Prober, State
from tests.faults.breaking import Stage
from tests.faults.cluster import DATABASE, OF_THE_APPLICATION, ROLE, Cluster
from tests.faults.processes import SERVERS, Deployed, Fleet, PgBouncer, deployed
from tests.faults.registers import RegisterLoad
from tests.faults.scenarios import Scenario
from tests.proxy import Proxy
from tests.serving import KINDS

WAYS = ("transactional", "own-commit", "handle")
UNKNOWN = "500 This may or may not have been stored. Check first."
CALM = 0.7  # seconds of load before the fault
CLIENTS = 8
GIVE_UP = 15.0  # seconds in which an application has to recover by itself
HEALTHY = 1.0  # seconds without a failure that count as recovered
SETTLE = 5.0  # seconds within which the last requests have to release everything


@dataclass
class Finding:
    """The results of a fault. Times are in seconds.

    Attributes:
        statuses: how often each status was answered, with the detail of an error.
        lost: writes that were acknowledged and are not stored.
        lies: writes that were refused and are stored.
        unknown_stored: writes of unknown outcome that are stored.
        inconsistent: registers whose history no order of operations explains.
        leaks: what was still in use after all requests had ended.
        recovery: from the repair to the last failure, or None if the application ended or did not
            recover.
        noticed, back: from the fault to readiness that fails, and from the repair to readiness that
            succeeds.
        wrong: probes whose answer was wrong after the time to notice.
        logged: bytes that the application has logged since the fault began.
        broken: the promises that were not kept, as sentences.
    """

    scenario: str
    driver: str
    server: str
    path: str
    requests: int = 0
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    unknown_stored: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)
    inconsistent: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    recovery: float | None = None
    slowest_error: float = 0.0
    noticed: float | None = None
    back: float | None = None
    wrong: list[str] = field(default_factory=list)
    logged: int = 0
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A fault with one driver and one deployment."""

    scenario: Scenario
    driver: str
    server: str
    pre_ping: bool = False

    def perform(self, cluster: Cluster, folder: Path, certificate: Path) -> Finding:
        """Cause the fault, repair it, and audit the application."""
        found = Finding(self.scenario.name, self.driver, self.server, self.scenario.path)
        cluster.execute("TRUNCATE entry, register")
        for name in registers.NAMES:
            cluster.execute("INSERT INTO register VALUES (%s, %s)", name, registers.INITIAL)
        with self._stage(cluster, folder, certificate) as stage:
            load = self._break(stage, found)
            _audit(load, cluster, found)
            found.leaks = _leaks(stage, ends=self.scenario.ends)
            found.broken += _broken(found)
        return found

    @contextlib.contextmanager
    def _stage(self, cluster: Cluster, folder: Path, certificate: Path) -> Generator[Stage]:
        path, bouncer = self.scenario.path, None
        environment = {"KIND": self.driver} | ({"PRE_PING": "1"} if self.pre_ping else {})
        with contextlib.ExitStack() as stack:
            proxy = Proxy("127.0.0.1", cluster.server.port)
            stack.enter_context(proxy.listening())
            port = proxy.own_port if path == "proxy" else cluster.server.port
            if path.startswith("pgbouncer"):
                over_tls = path.endswith("TLS")
                bouncer = PgBouncer(folder, port, ROLE, certificate if over_tls else None)
                bouncer.start()
                stack.callback(bouncer.kill)
                port = bouncer.port
                environment["PGBOUNCER"] = "1"
                environment |= {"CERTIFICATE": str(certificate)} if over_tls else {}
            driver = next(each.driver for each in KINDS if each.id == self.driver)
            environment["DATABASE_URL"] = (
                f"postgresql+{driver}://{ROLE}@127.0.0.1:{port}/{DATABASE}"
            )
            portal = stack.enter_context(start_blocking_portal())
            serving: AbstractContextManager[Deployed | Fleet] = (
                deployed(self.server, folder / "application.log", environment)
                if self.server in SERVERS
                else Fleet(folder, environment, portal).serving(2)
            )
            yield Stage(cluster, proxy, bouncer, stack.enter_context(serving), portal)

    def _break(self, stage: Stage, found: Finding) -> Load:
        port, level = stage.deployed.port, self.scenario.level
        load = RegisterLoad(port, level, CLIENTS) if level else Load(port, WAYS, CLIENTS)
        prober = Prober(stage.deployed.port)
        with prober.asking(stage.portal), load.writing(stage.portal):
            began = time.monotonic()
            time.sleep(CALM)
            logged = stage.deployed.logged
            broken = time.monotonic()
            with self.scenario.fault(stage):
                time.sleep(self.scenario.seconds)
            repaired = time.monotonic()
            if not self.scenario.ends:
                found.recovery = _recover(load, repaired)
                if found.recovery is None:
                    found.broken.append(f"It did not recover within {GIVE_UP:g} s.")
                # At least one probe has to be sent and answered after the time to notice.
                time.sleep(max(0.0, repaired + self.scenario.notice + 0.5 - time.monotonic()))
            if self.scenario.unbroken and (failed := load.failures(began)):
                found.broken.append(f"{len(failed)} requests failed: {failed[0].said}")
        found.logged = stage.deployed.logged - logged
        if self.scenario.ready is not None:
            _judge(prober, self.scenario, broken, repaired, found)
        return load


def _recover(load: Load, repaired: float) -> float | None:
    """Wait for a second without failures, and return the time from the repair to the last one."""
    while time.monotonic() < repaired + GIVE_UP:
        time.sleep(0.1)
        now = time.monotonic()
        last = max((each.answered for each in load.failures(repaired)), default=repaired)
        if now - last > HEALTHY and load.acknowledged(last) >= CLIENTS:
            return last - repaired
    return None


def _judge(
    prober: Prober, scenario: Scenario, broken: float, repaired: float, found: Finding
) -> None:
    """Compare the answers of readiness after the time to notice with the actual state."""
    ended = repaired + scenario.notice
    said_down = [each for each in prober.probes if each.status == 503]
    if scenario.ready:
        found.wrong = [str(each.report) for each in said_down]
        return
    during = prober.between(broken + scenario.notice, repaired)
    after = prober.between(ended, prober.probes[-1].answered)
    found.wrong = [f"while it was broken: {each.report}" for each in during if each.status == 200]
    found.wrong += [f"after the repair: {each.report}" for each in after if each.status == 503]
    first = next((each for each in said_down if each.answered >= broken), None)
    found.noticed = None if first is None else first.answered - broken
    later = [each for each in prober.probes if each.sent >= repaired and each.status == 200]
    found.back = later[0].answered - repaired if later else None
    if not during or not after:
        found.wrong.append("nobody asked in time")


def _audit(load: Load, cluster: Cluster, found: Finding) -> None:
    """Compare the ledger with what is stored."""
    by_state: dict[State, set[str]] = {
        state: {each.name for each in load.ledger if each.state is state} for state in State
    }
    states = Counter(each.state for each in load.ledger)
    found.requests = len(load.ledger)
    found.acknowledged, found.refused, found.unknown = (states[state] for state in State)
    found.statuses = dict(Counter(each.said for each in load.ledger))
    errors = [each.seconds for each in load.ledger if each.status >= 400]
    found.slowest_error = max(errors, default=0.0)
    if isinstance(load, RegisterLoad):
        values = dict(cluster.execute("SELECT name, value FROM register"))
        found.inconsistent = load.inconsistent(values, time.monotonic())
        return
    stored = {name for (name,) in cluster.execute("SELECT name FROM entry")}
    found.lost = sorted(by_state[State.ACKNOWLEDGED] - stored)
    found.lies = sorted(by_state[State.REFUSED] & stored)
    found.unknown_stored = len(by_state[State.UNKNOWN] & stored)


def _leaks(stage: Stage, *, ends: bool) -> list[str]:
    """Wait until nothing is in use, and return what still is when the time is up."""
    give_up = time.monotonic() + SETTLE
    while leaks := _in_use(stage, ends=ends):
        if time.monotonic() > give_up:
            break
        time.sleep(0.1)
    return leaks


def _in_use(stage: Stage, *, ends: bool) -> list[str]:
    busy = [
        f"a backend is {state}: {query}"
        for state, query in stage.cluster.execute(
            f"SELECT state, query FROM pg_stat_activity WHERE {OF_THE_APPLICATION}"
            " AND state <> 'idle'"
        )
    ]
    pools = {} if ends else stage.deployed.pools()
    busy += [f"checked out: {each}" for each in pools.values() if each["checked_out"]]
    if stage.bouncer is not None:
        return busy
    ((open_,),) = stage.cluster.execute(
        f"SELECT count(*) FROM pg_stat_activity WHERE {OF_THE_APPLICATION}"
    )
    known = sum(each["checked_in"] + each["checked_out"] for each in pools.values())
    return [*busy, f"{open_} connections, {known} in pools"] if open_ > known else busy


def _broken(found: Finding) -> list[str]:
    """Return a description of each broken promise."""
    said_500 = [each for each in found.statuses if each.startswith("500 ")]
    said: dict[str, Collection[str]] = {
        "acknowledged and not stored": found.lost,
        "refused and stored": found.lies,
        "registers inconsistent": found.inconsistent,
        "still in use": found.leaks,
        "readiness was wrong": found.wrong,
        "answered with 500, and it is no unknown outcome": set(said_500) - {UNKNOWN},
    }
    return [
        f"{len(each)} {what}: {', '.join(list(each)[:3])}" for what, each in said.items() if each
    ]
