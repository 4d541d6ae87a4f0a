"""The processes of a measurement, which end with it."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypedDict


class Used(TypedDict):
    """What a server has used so far: CPU seconds, and its peak memory in bytes."""

    cpu: float
    memory: int


@dataclass(frozen=True)
class Process:
    """A module of this package that listens on a port in its own process."""

    popen: "subprocess.Popen[str]"
    port: int

    def used(self) -> Used:
        """Return what the server has used so far."""
        assert self.popen.stdin is not None
        print(file=self.popen.stdin, flush=True)
        answer: Used = json.loads(self._line())
        return answer

    def _line(self) -> str:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, f"{self.popen.args!r} has ended"
        return line


@contextlib.contextmanager
def running(module: str, *arguments: Any) -> Generator[Process]:
    """Run `python -m tests.peers.MODULE` until the block ends."""
    command = [sys.executable, "-m", f"tests.peers.{module}", *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdout is not None
        try:
            first = popen.stdout.readline()
            assert first, f"{command} did not start"
            yield Process(popen, int(first))
        finally:
            assert popen.stdin is not None
            popen.stdin.close()
            try:
                popen.wait(15)
            except subprocess.TimeoutExpired:
                popen.kill()
