"""A temporary MariaDB server on loopback, from the system's package, started as root or not.

No wheel contains MariaDB, so unlike PostgreSQL it has to be installed. POSIX only.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pymysql

from tests.postgres_server import (
    Account,
    _can_reach,
    _end_with_parent,
    _free_port,
    _give,
    _surroundings,
    _unprivileged_account,
    temporary_folder,
)

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0

REMEDIES = """Any one of these helps:
  - install MariaDB: apt-get install mariadb-server
  - point TEST_MARIADB_URL (tests) at a server that runs already, as in mysql://root@127.0.0.1:3306/,
    with a role that may create databases and users, and kill queries
  - point DATABASE_URL (the example) at a database of its own, as in mysql+asyncmy://me@db/shop"""

SETTINGS = {
    "bind-address": "127.0.0.1",
    "innodb-buffer-pool-size": "32M",
    "innodb-flush-log-at-trx-commit": "0",
    "innodb-log-file-size": "16M",
    "innodb-fast-shutdown": "2",  # a temporary server has nothing to clean up
    "performance-schema": "OFF",
    "skip-name-resolve": "ON",
}


class MariadbServerError(RuntimeError):
    """The error that says why there is no server and how to get one."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}\n{REMEDIES}")


class MariadbServer:
    """A MariaDB server on 127.0.0.1 whose `root` needs no password.

    It runs in a temporary folder until the context manager exits, and never outlives this process.
    On Linux this holds even if the process is killed.
    """

    def __init__(self) -> None:
        self.port = 0
        self._account = Account()
        self._home = Path()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address of the server, without a database and without a driver."""
        return f"mysql://root@127.0.0.1:{self.port}/"

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("MariadbServer was started in a thread: start it in main.")
        server = find_server()
        if os.geteuid() == 0:
            self._account = _unprivileged_account()
        self._home = _reachable_home(self._account)
        try:
            self._initialize(server)
            while not self._launch(server):
                pass  # another process has taken the port: try a different one
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _initialize(self, server: Path) -> None:
        installer = shutil.which("mariadb-install-db", path=_search_path())
        if installer is None:
            raise MariadbServerError(f"{server} is here and mariadb-install-db is not.")
        command = [installer, "--no-defaults", f"--datadir={self._home / 'data'}"]
        command += ["--auth-root-authentication-method=normal", "--skip-test-db"]
        command.append(f"--tmpdir={self._home}")
        done = subprocess.run(
            command, capture_output=True, text=True, **_surroundings(self._account)
        )
        if done.returncode != 0:
            raise MariadbServerError(f"{installer} failed:\n{done.stdout}{done.stderr}")

    def _launch(self, server: Path) -> bool:
        """Start the process and wait until it answers, or return False if its port was taken."""
        self.port = _free_port()
        places = {
            "datadir": self._home / "data",
            "tmpdir": self._home,
            "socket": self._home / "socket",
            "pid-file": self._home / "pid",
            "port": self.port,
        }
        command: list[str | Path] = [server, "--no-defaults"]
        command += [f"--{name}={value}" for name, value in (places | SETTINGS).items()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_parent(),
                **_surroundings(self._account),
            )
        give_up = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                said = self._log.read_text(errors="replace")[-2000:]
                if "Address already in use" in said:
                    return False
                raise MariadbServerError(f"{server} did not start:\n{said}")
            time.sleep(0.02)  # the server does not report when it is ready
        return True

    @property
    def _log(self) -> Path:
        return self._home / "log"

    def _answers(self) -> bool:
        try:
            host = "127.0.0.1"
            pymysql.connect(host=host, port=self.port, user="root", read_timeout=5).close()
        except pymysql.OperationalError:
            return False
        return True

    def _end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._home)


def find_server() -> Path:
    """Find the server's program, which distributions install outside a user's PATH."""
    found = shutil.which("mariadbd", path=_search_path())
    if found is None:
        raise MariadbServerError("No MariaDB server was found.")
    return Path(found)


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])


def _reachable_home(account: Account) -> Path:
    parent = temporary_folder()
    if account.user is not None and not _can_reach(Path(parent), account):
        parent = "/var/tmp"
    home = Path(tempfile.mkdtemp(prefix="sqlnative-mariadb-", dir=parent))
    _give(home, account)
    return home
