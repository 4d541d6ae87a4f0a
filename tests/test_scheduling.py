"""How conftest.py assigns the tests to the workers of xdist."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from conftest import pytest_xdist_make_scheduler


class Worker:
    """A worker of xdist that notes which tests it is sent."""

    shutting_down = False

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.sent: list[int] = []

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def test_a_test_that_ends_its_worker_is_not_run_again() -> None:
    """Tests that end two workers at once are reported, and the new workers run all others."""
    config: Any = SimpleNamespace(option=SimpleNamespace(), getvalue=lambda _name: ["popen"] * 2)
    scheduler: Any = pytest_xdist_make_scheduler(config, None)
    tests = [f"test_{file}.py::test_{number}" for file in "abc" for number in range(3)]
    first, second, third, fourth = (Worker(name) for name in "1234")
    for each in first, second:
        scheduler.add_node(each)
        scheduler.add_node_collection(each, tests)
    scheduler.schedule()
    assert (first.sent, second.sent) == ([0, 1, 2], [3, 4, 5])
    for index in range(3):
        scheduler.mark_test_complete(first, index)
    assert first.sent == [0, 1, 2, 6, 7, 8]
    assert [scheduler.remove_node(each) for each in (first, second)] == [tests[6], tests[3]]
    assert not any(all(unit.values()) for unit in scheduler.workqueue.values())
    for each in third, fourth:
        scheduler.add_node(each)
    for each in fourth, third:
        scheduler.add_node_collection(each, tests)
        scheduler.schedule()
    assert sorted(third.sent + fourth.sent) == [4, 5, 7, 8]
    for each in third, fourth:
        for index in each.sent:
            scheduler.mark_test_complete(each, index)
    assert third.shutting_down
    assert fourth.shutting_down
    assert scheduler.tests_finished
    assert not any(scheduler.remove_node(each) for each in (third, fourth))
