"""Progress reports of a test run, which prevent long silences."""

import os
import sys
import threading
import time
from collections.abc import Generator

import pytest

SILENCE = 5.0  # seconds


class Progress:
    """A pytest plugin whose thread prints a line after a few seconds without output.

    It runs in the process that prints, which with xdist is the controller.
    """

    def __init__(self) -> None:
        self.phase = "starting"
        self.running: dict[str, float] = {}
        self.last = self.begun = time.monotonic()
        self.over = threading.Event()
        # While a test runs, pytest captures what is written to sys.stdout.
        self.terminal = os.fdopen(os.dup(sys.__stdout__.fileno()), "w", buffering=1)  # type: ignore[union-attr] # it is not None here
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def says(self, phase: str) -> None:
        """Print the phase that begins now, which is printed again while it lasts."""
        self.phase = phase
        self._print(f"{phase} ...")

    def _print(self, line: str) -> None:
        self.last = time.monotonic()
        print(line, file=self.terminal)

    def _watch(self) -> None:
        while not self.over.wait(1):
            now = time.monotonic()
            if now - self.last >= SILENCE:
                longest = min(self.running.copy().items(), key=lambda item: item[1], default=None)
                at_it = f"{longest[0]} for {now - longest[1]:.0f} s" if longest else self.phase
                self._print(f"\n[{now - self.begun:.0f} s] still at it: {at_it}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logstart(self, nodeid: str) -> Generator[None]:
        self.running[nodeid] = time.monotonic()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> Generator[None]:
        self.running.pop(nodeid, None)
        self.phase = "stopping"  # printed when no test is running
        self.last = time.monotonic()
        return (yield)

    @pytest.hookimpl(tryfirst=True)  # after xdist's hook, it would not be called
    def pytest_collection(self) -> None:
        self.says("Collecting the tests")

    def pytest_unconfigure(self) -> None:
        self.over.set()
        self.thread.join()
        self.terminal.close()
