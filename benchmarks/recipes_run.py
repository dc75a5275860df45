"""Training runs as processes: so many at a time, each on one GPU, until a limit."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import slots
from recipes_file import Recipe

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
        outcome: ``"done"``, ``"failed"``, ``"stopped"`` or ``"not begun"``.
        exit_code: None if it was stopped at the limit, or never begun.
        final: the last logs of its training, by name; empty if there are none.
    """

    run: Run
    arguments: list[str]
    seconds: float
    outcome: str
    exit_code: int | None
    final: dict[str, float]


class Runner:
    """``with Runner(...) as runner: for ended in runner: ...``; no process outlives the block.

    Args:
        runs: in the order in which they begin.
        command: what ``fluxcompile train`` is called by.
        output: folder of logs and routers.
        gpus: one entry for each process at a time: the GPU that it sees, or None for what there
            is.
        limit: seconds, after which whatever runs is stopped; None: no limit.
        more: arguments of every run that override its recipe's.
        resume: go on from the last checkpoint where there is one.
    """

    def __init__(
        self, runs: Sequence[Run], *, command: Sequence[str], output: Path,
        gpus: Sequence[str | None], limit: float | None = None, more: Sequence[str] = (),
        resume: bool = False,
    ) -> None:  # fmt: skip
        self.output, self.runs = output, {run.name: run for run in runs}
        self.arguments: dict[str, list[str]] = {}
        jobs = []
        for run in runs:
            begun = resume and any((output / run.name).glob("checkpoint-*"))
            arguments = run.arguments(output, more) + ["--resume"] * begun
            self.arguments[run.name] = arguments
            # Run as `-m fluxcompile` from a checkout, Python must not take folders for packages.
            jobs.append(slots.Job(run.name, [*command, *arguments], output / f"{run.name}.log",
                                  append=begun, environment={"PYTHONSAFEPATH": "1"}))  # fmt: skip
        at_once = min(len(gpus), len(runs)) or 1
        threads = slots.threads_each(at_once)
        self.processes = slots.Processes(
            jobs, [slots.Slot(gpu, threads) for gpu in gpus],
            deadline=None if limit is None else time.monotonic() + limit,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self.processes.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.processes.__exit__(*error)

    def __iter__(self) -> Iterator[Ended]:
        """Begins runs and yields each as it ends; at the limit, the rest."""
        for one in self.processes:
            name = one.job.name
            final = {} if one.outcome == "not begun" else last_logs(self.output / name)
            yield Ended(
                self.runs[name], self.arguments[name], one.seconds, one.outcome, one.status, final
            )


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
