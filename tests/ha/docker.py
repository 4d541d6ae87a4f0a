"""A test run on PostgreSQL in a container, without a registry: `make test-docker`.

The run starts its own engine, with an image made from the installed PostgreSQL. Therefore it covers
the suite's use of testcontainers, but not the image on Docker Hub.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.postgres_choice import _answers
from tests.postgres_server import find_binaries

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 60.0
USER = 999
BRIDGE = Path("/sys/class/net/docker0")
IMAGE = "sqlnative-postgres:local"
TESTS = ("tests/test_transactions.py", "tests/test_startup_wait.py")
# What testcontainers expects of the official image: three variables, TCP, psql and a shell.
ENTRY = """#!/bin/sh
set -e
if [ ! -s /data/PG_VERSION ]; then
  echo "$POSTGRES_PASSWORD" >/tmp/password
  initdb --pgdata=/data --username="$POSTGRES_USER" --pwfile=/tmp/password --encoding=UTF8 \\
    --locale=C --auth-host=scram-sha-256 --auth-local=trust >/dev/null
  echo "host all all all scram-sha-256" >>/data/pg_hba.conf
  echo "listen_addresses = '*'" >>/data/postgresql.conf
  echo "unix_socket_directories = '/tmp'" >>/data/postgresql.conf
fi
exec "$@" -D /data
"""
PASSWD = f"root:x:0:0::/:/bin/sh\npostgres:x:{USER}:{USER}::/data:/bin/sh\n"


class EngineError(RuntimeError):
    """The error that says why there is no engine."""


def main(arguments: Sequence[str]) -> int:
    """Run the tests, and return pytest's exit code."""
    with (
        tempfile.TemporaryDirectory(prefix="sqlnative-docker-") as folder,
        engine(Path(folder)) as address,
    ):
        docker(address, *imported(pack(Path(folder))))
        environment = {"DOCKER_HOST": address, "TEST_POSTGRES_IMAGE": IMAGE}
        # Ryuk would need another image. The engine and its containers end with this run anyway.
        environment["TESTCONTAINERS_RYUK_DISABLED"] = "true"
        command = [sys.executable, "-m", "pytest", "--postgres=docker", *(arguments or TESTS)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False)
        return done.returncode


@contextmanager
def engine(folder: Path) -> Generator[str]:
    """Start dockerd with its own files, and without rules in the machine's firewall."""
    program = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise EngineError("dockerd is not installed: apt-get install docker.io iptables")
    address, log = f"unix://{folder}/docker.sock", folder / "dockerd.log"
    command = [
        *(program, f"--host={address}", f"--data-root={folder / 'data'}"),
        *(f"--exec-root={folder / 'exec'}", f"--pidfile={folder / 'pid'}"),
        *("--iptables=false", "--ip-masq=false", "--group=root"),
    ]
    had_bridge = BRIDGE.exists()
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        give_up = time.monotonic() + START_TIMEOUT
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > give_up:
                last = log.read_text(errors="replace")[-2000:]
                raise EngineError(f"No Docker engine can run here:\n{last}")
            time.sleep(0.05)  # the engine does not report when it is ready
        yield address
    finally:
        process.terminate()
        process.wait(60)
        if BRIDGE.exists() and not had_bridge:
            subprocess.run(["ip", "link", "delete", BRIDGE.name], check=True)


def pack(folder: Path) -> Path:
    """Pack the installed PostgreSQL and the libraries that it needs into an archive."""
    binaries = find_binaries("system")
    shell = shutil.which("sh")
    assert shell is not None
    installation = binaries.parent
    share = subprocess.run(
        [binaries / "pg_config", "--sharedir"], capture_output=True, text=True, check=True
    )
    programs = [*binaries.iterdir(), *installation.glob("lib/*.so"), Path(shell)]
    archive = folder / "image.tar"
    with tarfile.open(archive, "w") as tar:
        for name, mode, owner in ("data", 0o700, USER), ("tmp", 0o1777, 0), ("etc", 0o755, 0):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
            tar.addfile(entry)
        for where in installation, Path(share.stdout.strip()), Path("/usr/share/zoneinfo"):
            tar.add(where.resolve(), str(where).lstrip("/"))
        for each in libraries(programs):
            tar.add(each.resolve(), str(each).lstrip("/"))
        tar.add(Path(shell).resolve(), "bin/sh")
        for name, text, mode in ("entry", ENTRY, 0o755), ("etc/passwd", PASSWD, 0o644):
            (folder / "file").write_text(text, "utf-8")
            entry = tar.gettarinfo(folder / "file", name)
            entry.mode = mode
            with (folder / "file").open("rb") as content:
                tar.addfile(entry, content)
    return archive


def libraries(programs: Sequence[Path]) -> set[Path]:
    """List the libraries that programs are linked with, including the loader."""
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    words = said.stdout.replace("=>", " ").split()
    return {Path(word) for word in words if word.startswith("/") and not word.endswith(":")}


def imported(archive: Path) -> list[str]:
    """Return the arguments for `docker import`."""
    binaries = find_binaries("system")
    changes = [
        'ENTRYPOINT ["/entry"]',
        'CMD ["postgres"]',
        f"USER {USER}",
        "EXPOSE 5432",
        f"ENV PATH=/bin:{binaries}",
    ]
    return ["import", *(f"--change={each}" for each in changes), str(archive), IMAGE]


def docker(address: str, *words: str) -> None:
    """Run the Docker client on this engine."""
    subprocess.run(["docker", "--host", address, *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except EngineError as error:
        sys.exit(str(error))
