"""Training runs as processes: so many at a time, each on one GPU, until a limit."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from recipes_file import Recipe

POLL = 0.2  # seconds between looks at what has ended
PATIENCE = 15.0  # seconds from asking a process to end to ending it
STATE = "trainer_state.json"


@dataclass(frozen=True)
class Run:
    """One recipe with one seed."""

    recipe: Recipe
    seed: int

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-{self.seed}"

    def arguments(self, output: Path, more: Sequence[str] = ()) -> list[str]:
        """Of ``fluxcompile train``; ``more`` come after the recipe's and override them."""
        seed = ["--seed", str(self.seed), "--output", str(output / self.name)]
        return [*self.recipe.arguments, *more, *seed]


@dataclass(frozen=True)
class Ended:
    """What became of a run.

    Attributes:
        run: which.
        arguments: of ``fluxcompile train``.
        seconds: it took.
        exit_code: None if it was stopped at the limit, or never begun.
        final: the last logs of its training, by name; empty if there are none.
    """

    run: Run
    arguments: list[str]
    seconds: float
    exit_code: int | None
    final: dict[str, float]

    @property
    def outcome(self) -> str:
        """``"done"``, ``"failed"``, ``"stopped"`` or ``"not begun"``."""
        if self.exit_code is None:
            return "stopped" if self.seconds else "not begun"
        return "failed" if self.exit_code else "done"


class Running:
    """A run's process, with the processes that it may start itself."""

    def __init__(
        self, run: Run, command: list[str], arguments: list[str], *, output: Path,
        slot: str | None, threads: int, append: bool,
    ) -> None:  # fmt: skip
        self.run, self.arguments, self.output, self.slot = run, arguments, output, slot
        self.started = time.perf_counter()
        # Run as `-m fluxcompile` from a checkout, Python must not take its folders for packages.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
        if slot is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot
        with (output / f"{run.name}.log").open("a" if append else "w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip

    def ended(self, stopped: bool = False) -> Ended:
        """For a process that has ended, by itself or ``stopped``."""
        code = None if stopped else self.process.returncode
        seconds = time.perf_counter() - self.started
        final = last_logs(self.output / self.run.name)
        return Ended(self.run, self.arguments, seconds, code, final)

    def signal(self, number: int) -> None:
        """To the process and all that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


class Runner:
    """``with Runner(...) as runner: for ended in runner: ...``; no process outlives the block.

    Args:
        runs: in the order in which they begin.
        command: what ``fluxcompile train`` is called by.
        output: folder of logs and routers.
        slots: one entry for each process at a time: the GPU that it sees, or None for what there
            is.
        limit: seconds, after which whatever runs is stopped; None: no limit.
        more: arguments of every run that override its recipe's.
        resume: go on from the last checkpoint where there is one.
    """

    def __init__(
        self, runs: Sequence[Run], *, command: Sequence[str], output: Path,
        slots: Sequence[str | None], limit: float | None = None, more: Sequence[str] = (),
        resume: bool = False,
    ) -> None:  # fmt: skip
        self.waiting, self.command, self.output = list(runs), list(command), output
        self.slots, self.limit, self.more = list(slots), limit, list(more)
        self.resume = resume
        self.running: list[Running] = []
        at_once = min(len(self.slots), len(self.waiting)) or 1
        self.threads = max(1, len(os.sched_getaffinity(0)) // at_once)

    def __enter__(self) -> Self:
        self.started = time.perf_counter()
        self.output.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def __iter__(self) -> Iterator[Ended]:
        """Begins runs and yields each as it ends; at the limit, the rest."""
        while self.waiting or self.running:
            while self.waiting and self.slots:
                self._begin(self.waiting.pop(0), self.slots.pop(0))
            for running in [one for one in self.running if one.process.poll() is not None]:
                self.running.remove(running)
                self.slots.append(running.slot)
                yield running.ended()
            if self.limit is not None and time.perf_counter() - self.started > self.limit:
                yield from self._rest()
                return
            time.sleep(POLL)

    def _begin(self, run: Run, slot: str | None) -> None:
        arguments = run.arguments(self.output, self.more)
        begun = self.resume and any((self.output / run.name).glob("checkpoint-*"))
        if begun:
            arguments.append("--resume")
        self.running.append(
            Running(run, self.command, arguments, output=self.output, slot=slot,
                    threads=self.threads, append=begun)
        )  # fmt: skip

    def _rest(self) -> Iterator[Ended]:
        for running in self._stop():
            yield running.ended(stopped=True)
        for run in self.waiting:
            yield Ended(run, run.arguments(self.output, self.more), 0.0, None, {})

    def _stop(self) -> list[Running]:
        stopped, self.running = self.running, []
        for running in stopped:
            running.signal(signal.SIGTERM)
        until = time.perf_counter() + PATIENCE
        for running in stopped:
            try:
                running.process.wait(max(0.0, until - time.perf_counter()))
            except subprocess.TimeoutExpired:
                running.signal(signal.SIGKILL)
                running.process.wait()
        return stopped


def last_logs(folder: Path) -> dict[str, Any]:
    """The last logs of the training that wrote its checkpoints to ``folder``, with their step."""
    files = sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda file: file.stat().st_mtime)
    if not files:
        return {}
    try:
        history = json.loads(files[-1].read_text())["log_history"]
        # The summary at the end has no temperature.
        return [entry for entry in history if "temperature" in entry][-1]
    except (ValueError, KeyError, IndexError):
        return {}
