"""Processes side by side: as many at a time as there are slots, until a deadline.

For `run.py`, `kernels.py` and `recipes.py`; `quality.py` shares out cores alike. Imports no torch.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

POLL = 0.1  # seconds between looks at what has ended
PATIENCE = 15.0  # seconds from asking a process to end to ending it


@dataclass(frozen=True)
class Slot:
    """What one process at a time may use; what is None is not limited.

    Attributes:
        gpu: the only one that it sees, by a name that CUDA_VISIBLE_DEVICES takes.
        threads: what OMP_NUM_THREADS says.
        cores: CPU cores that it and all that it starts are held to.
    """

    gpu: str | None = None
    threads: int | None = None
    cores: frozenset[int] | None = None

    def environment(self) -> dict[str, str]:
        """Variables of a process here."""
        given = {"CUDA_VISIBLE_DEVICES": self.gpu, "OMP_NUM_THREADS": self.threads}
        return {name: str(value) for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Job:
    """A process to be run.

    Attributes:
        name: to tell jobs apart.
        command: as `subprocess.Popen` takes it.
        log: where what it prints goes; None: to where this process prints.
        append: to what the log says already.
        environment: variables that differ from this process's; None: not set.
    """

    name: str
    command: Sequence[str]
    log: Path | None = None
    append: bool = False
    environment: Mapping[str, str | None] = field(default_factory=dict)


def script_job(
    name: str, script: Path, arguments: Sequence[str], log: Path | None, append: bool = False
) -> Job:
    """``python script arguments`` as a job."""
    command = [sys.executable, str(script), *arguments]
    # A script finds its neighbours beside itself, unless this is set.
    return Job(name, command, log, append, {"PYTHONSAFEPATH": None})


@dataclass(frozen=True)
class Ended:
    """What became of a job.

    Attributes:
        job: which.
        seconds: it took; 0 if it never began.
        status: its exit code, negative for the signal that ended it; None if it was stopped at the
            deadline, or never begun.
    """

    job: Job
    seconds: float
    status: int | None

    @property
    def outcome(self) -> str:
        """``"done"``, ``"failed"``, ``"stopped"`` or ``"not begun"``."""
        if self.status is None:
            return "stopped" if self.seconds else "not begun"
        return "failed" if self.status else "done"


class Processes:
    """``with Processes(...) as processes: for ended in processes: ...``

    No process outlives the block, and nothing that a process started outlives it. One that fails
    does not stop the others.

    Args:
        jobs: in the order in which they begin.
        slots: one for each process at a time.
        deadline: of ``time.monotonic()``; whatever runs then is stopped. None: none.
        begins: called with each job that has begun, and its slot.
    """

    def __init__(
        self, jobs: Sequence[Job], slots: Sequence[Slot], *, deadline: float | None = None,
        begins: Callable[[Job, Slot], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        self._waiting, self._slots = list(jobs), list(slots)
        self._deadline, self._begins = deadline, begins
        self._running: list[_Running] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def __iter__(self) -> Iterator[Ended]:
        """Begins jobs and yields each as it ends; at the deadline, the rest."""
        while self._waiting or self._running:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                yield from self._rest()
                return
            while self._waiting and self._slots:
                self._begin(self._waiting.pop(0), self._slots.pop(0))
            for running in [one for one in self._running if one.process.poll() is not None]:
                self._running.remove(running)
                self._slots.append(running.slot)
                running.signal(signal.SIGKILL)  # what it started and left behind
                yield running.ended(running.process.returncode)
            time.sleep(POLL)

    def _begin(self, job: Job, slot: Slot) -> None:
        self._running.append(_Running(job, slot))
        self._begins(job, slot)

    def _rest(self) -> Iterator[Ended]:
        waiting, self._waiting = self._waiting, []
        yield from [running.ended(None) for running in self._stop()]
        yield from [Ended(job, 0.0, None) for job in waiting]

    def _stop(self) -> "list[_Running]":
        stopped, self._running = self._running, []
        for running in stopped:
            running.signal(signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        for running in stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.0, until - time.monotonic()))
            running.signal(signal.SIGKILL)  # what it started may not have listened
            running.process.wait()
        return stopped


class _Running:
    """A job's process, the leader of a group of its own."""

    def __init__(self, job: Job, slot: Slot) -> None:
        self.job, self.slot, self.started = job, slot, time.monotonic()
        given = {**os.environ, **slot.environment(), **job.environment}
        environment = {name: value for name, value in given.items() if value is not None}
        with contextlib.ExitStack() as stack:
            stack.enter_context(_held_to(slot.cores))
            log = None
            if job.log is not None:
                job.log.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(job.log.open("a" if job.append else "w"))
            self.process = subprocess.Popen(
                list(job.command), stdin=subprocess.DEVNULL, stdout=log,
                stderr=None if log is None else subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def ended(self, status: int | None) -> Ended:
        return Ended(self.job, time.monotonic() - self.started, status)

    def signal(self, number: int) -> None:
        """To the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
            os.killpg(self.process.pid, number)


def cores() -> list[int]:
    """The CPU cores that this process may use; hyperthreads of one core stand side by side."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0), key=lambda core: (_first_sibling(core), core))


def threads_each(processes: int) -> int:
    """Of the cores, for each of so many processes side by side."""
    return max(1, len(cores()) // max(1, processes))


def leave_on_sigterm() -> None:
    """Let SIGTERM unwind this process, so that what it has started is stopped too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def shares(gpus: Sequence[str]) -> list[Slot]:
    """One slot for each of ``gpus``, with its share of the cores.

    Where the platform cannot hold a process to some cores, it only has fewer threads.
    """
    all_of_them = cores()
    threads = threads_each(len(gpus))
    if not hasattr(os, "sched_setaffinity") or len(all_of_them) < len(gpus):
        return [Slot(gpu, threads) for gpu in gpus]
    return [
        Slot(gpu, threads, frozenset(all_of_them[i * threads : (i + 1) * threads]))
        for i, gpu in enumerate(gpus)
    ]


def _first_sibling(core: int) -> int:
    """The first of the hyperthreads that share a core with this one, as far as Linux says."""
    file = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found = re.match(r"\d+", file.read_text()) if file.exists() else None
    return int(found[0]) if found else core


@contextlib.contextmanager
def _held_to(cores: frozenset[int] | None) -> Iterator[None]:
    """A process that is started inside begins on ``cores``: it inherits them from this thread."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
