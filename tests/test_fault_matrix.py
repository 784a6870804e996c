"""Whatever call of publishing is broken: one commit, one tag, the same files; some cells of the matrix."""

import re
from pathlib import Path

import pytest
from fault_matrix import (
    ACCESS,
    ENDPOINTS,
    FAULTS,
    Outcome,
    cell,
    gate_open,
    killed,
    no_waiting,
    races,
    release,
    target,
)
from hub_fixture import running

from hub.publish import publish

CELLS = [
    *(("commit", fault, 1) for fault in FAULTS),
    ("list refs", "dropped", 2),
    ("create repo", "409", 1),
    ("how to upload", "503 HTML", 2),
    ("LFS upload", "504 landed", 1),
    ("LFS verify", "dropped", 2),
    ("tag", "504 landed", 1),
    ("download", "dropped", 2),
    ("file facts", "429", 1),
    ("list files", "time-out", 1),
    ("tag", "time-out", 1),
    ("gate", "504 landed", 1),
    ("repo facts", "503 HTML", 2),
]


@pytest.mark.parametrize(("endpoint", "fault", "nth"), CELLS)
def test_a_broken_call_leaves_nothing_lost_or_doubled(endpoint: str, fault: str, nth: int) -> None:
    found = cell(endpoint, fault, nth)
    assert found.asked
    assert not found.wrong


@pytest.mark.parametrize("at", [9, 22])
def test_a_killed_publisher_finishes_when_run_again(at: int) -> None:
    assert killed(at) == Outcome(1, "")


def test_two_publishers_at_once_leave_one_release() -> None:
    assert races(1)


def test_every_call_of_publishing_is_in_the_matrix(tmp_path: Path) -> None:
    with running(tmp_path) as hub, no_waiting(), gate_open():
        publish(release(), target(hub), ACCESS)
    known = [(method, re.compile(path)) for method, path in ENDPOINTS.values()]
    asked = {(method, path) for method, path, _ in hub.faults.log}
    assert len(asked) > len(ENDPOINTS)
    for method, path in asked:
        assert any(one == method and pattern.search(path) for one, pattern in known), (method, path)
