"""Processes on slots: each ends, is stopped or never begins, and says so."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.scripts import FOLDER, forget_scripts

SAY = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS'], "
SAY += "sorted(os.sched_getaffinity(0)))"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def slots(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import slots

    yield slots
    forget_scripts()


def job(slots, folder: Path, name: str, code: str, *arguments: str):
    return slots.Job(name, [sys.executable, "-S", "-c", code, *arguments], folder / f"{name}.log")


def has_ended(pid: int) -> bool:
    """Within a second: killed or waiting to be collected by whoever took it over."""
    for _ in range(20):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_process_sees_its_slot_and_failures_stop_nothing(slots, tmp_path):
    core = min(os.sched_getaffinity(0))
    slot = slots.Slot("GPU-7", 3, frozenset({core}))
    jobs = [job(slots, tmp_path, "fails", "raise SystemExit(5)"), job(slots, tmp_path, "says", SAY)]
    began = []
    with slots.Processes(
        jobs, [slot], begins=lambda job, slot: began.append((job.name, slot.gpu))
    ) as processes:
        ended = list(processes)
    assert [(one.job.name, one.outcome, one.status) for one in ended] == [
        ("fails", "failed", 5), ("says", "done", 0),
    ]  # fmt: skip
    assert began == [("fails", "GPU-7"), ("says", "GPU-7")]
    assert (tmp_path / "says.log").read_text() == f"GPU-7 3 [{core}]\n"
    assert core in os.sched_getaffinity(0), "this process keeps its own"
    assert len(os.sched_getaffinity(0)) == len(slots.cores())


def test_processes_run_side_by_side_and_end_with_what_they_started(slots, tmp_path):
    jobs = [job(slots, tmp_path, name, PARENT, seconds)
            for name, seconds in (("quick", "0"), ("slow", "60"), ("late", "0"))]  # fmt: skip
    deadline = time.monotonic() + 1.5
    two = [slots.Slot(), slots.Slot(threads=1)]
    with slots.Processes(jobs[:2], two, deadline=deadline) as processes:
        ended = {one.job.name: one for one in processes}
    assert {name: one.outcome for name, one in ended.items()} == {
        "quick": "done", "slow": "stopped",
    }  # fmt: skip
    assert ended["slow"].seconds < 10
    assert all(has_ended(int((tmp_path / f"{name}.log").read_text())) for name in ended)
    with slots.Processes(jobs[2:], two, deadline=deadline) as processes:
        (late,) = processes
    assert (late.outcome, late.seconds, late.status) == ("not begun", 0, None)


def test_leaving_the_block_stops_processes(slots, tmp_path):
    jobs = [job(slots, tmp_path, "slow", PARENT, "60"), job(slots, tmp_path, "quick", PARENT, "0")]
    with slots.Processes(jobs, [slots.Slot()] * 2) as processes:
        next(iter(processes))
        while not (text := (tmp_path / "slow.log").read_text()):
            time.sleep(0.05)
    assert has_ended(int(text))


def test_cores_are_shared_evenly_and_siblings_stay_together(slots, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(slots, "_first_sibling", lambda core: core % 4)
    assert slots.cores() == [0, 4, 1, 5, 2, 6, 3, 7]
    first, _, last = slots.shares(["3", "5", "GPU-7"])
    assert first == slots.Slot("3", 2, frozenset({0, 4}))
    assert last == slots.Slot("GPU-7", 2, frozenset({2, 6}))
    assert slots.shares(list("012345678"))[0] == slots.Slot("0", 1), "too few for one each"
