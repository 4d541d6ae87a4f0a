"""Servers from Debian packages, run on loopback by an account that is not root."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.postgres_server import (
    Account,
    _can_reach,
    _end_with_parent,
    _give,
    _surroundings,
    _unprivileged_account,
)

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0


class ServiceError(RuntimeError):
    """The error that says which service is unavailable, and why."""


@dataclass
class Home:
    """A folder for one service, and the account that the service runs as."""

    path: Path
    account: Account

    def write(self, name: str, text: str) -> Path:
        """Write a file that the account can read."""
        path = self.path / name
        path.write_text(text, "utf-8")
        _give(path, self.account)
        return path

    def folder(self, name: str) -> Path:
        """Make a folder that only the account can use."""
        path = self.path / name
        path.mkdir(mode=0o700)
        _give(path, self.account)
        return path


@contextmanager
def home(service: str) -> Generator[Home]:
    """Make a temporary folder for a service, and remove it at the end."""
    account = _unprivileged_account() if os.geteuid() == 0 else Account()
    parent = tempfile.gettempdir()
    if account.user is not None and not _can_reach(Path(parent), account):
        parent = "/var/tmp"
    path = Path(tempfile.mkdtemp(prefix=f"sqlnative-{service}-", dir=parent))
    path.chmod(0o755)
    _give(path, account)
    yield Home(path, account)
    shutil.rmtree(path)


def program(name: str, package: str) -> str:
    """Find a program, even if the distribution keeps it out of a user's PATH."""
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise ServiceError(f"{name} is not installed: apt-get install {package}")
    return found


@contextmanager
def running(
    home: Home, command: Sequence[str | Path], ready: Callable[[], bool], **environment: str
) -> Generator["subprocess.Popen[bytes]"]:
    """Run a server until the block ends, and begin the block when the server is ready.

    The server never outlives this process. Its output goes to a log file, and the error quotes the
    last of it if the server does not start.
    """
    name, log = Path(command[0]).name, home.path / f"{Path(command[0]).name}.log"
    surroundings = _surroundings(home.account)
    surroundings["env"] |= environment
    with log.open("ab") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            preexec_fn=_end_with_parent(),
            **surroundings,
        )
    try:
        give_up = time.monotonic() + START_TIMEOUT
        while not ready():
            if process.poll() is not None or time.monotonic() > give_up:
                said_last = log.read_text(errors="replace")[-3000:]
                raise ServiceError(f"{name} did not start:\n{said_last}")
            time.sleep(0.02)  # not every program reports when it is ready
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Terminate a server, and kill it if it does not end in time."""
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
