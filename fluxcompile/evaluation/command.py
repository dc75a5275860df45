"""``fluxcompile eval``: a model and its router in, a table against full attention out."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fluxcompile.errors import FluxError, OptionError, RouterError
from fluxcompile.evaluation.as_user import AsUser
from fluxcompile.evaluation.compare import judged, omega, relative
from fluxcompile.evaluation.evaluate import Results, evaluate
from fluxcompile.evaluation.intervals import Estimate
from fluxcompile.evaluation.prompts import METRICS, builtin_prompts, check_lengths
from fluxcompile.packaged import PACKAGED, packaged_directory
from fluxcompile.router import FluxRouter
from fluxcompile.training.command import device_and_dtype, load_model
from fluxcompile.training.data import FORMS


@dataclass(frozen=True)
class EvalSettings:
    """What ``fluxcompile eval`` takes.

    Attributes:
        model: ``"smollm2"``, or what ``AutoModelForCausalLM.from_pretrained`` takes.
        router: directory of the router, or the name of a packaged one.
        lengths: tokens of prompt and answer together.
        tasks: forms of the built-in mixture.
        examples: prompts a task and length.
        batch: prompts a call.
        seed: of the prompts and of the intervals' resamples.
        lowering: as the backend's option.
        device, dtype: the GPU if there is one, and bfloat16 on it, by default.
    """

    model: str
    router: Path
    lengths: Sequence[int] = (2048, 4096)
    tasks: Sequence[str] = tuple(METRICS)
    examples: int = 100
    batch: int = 8
    seed: int = 0
    lowering: str = "inductor"
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        known = [*METRICS, *FORMS]
        if unknown := [task for task in self.tasks if task not in known]:
            raise OptionError.mismatch("--task", f"some of {known}", unknown)
        if not self.router.is_dir() and packaged_directory(self.router) is None:
            known = f"a router's folder or one of {list(PACKAGED)}"
            raise RouterError.mismatch("--router", known, repr(str(self.router)))


def run_eval(settings: EvalSettings, console: Console | None = None) -> dict[str, Results]:
    """Score full attention and the router, each as a user runs it, and print one table.

    Returns:
        The results of ``"full"`` and ``"router"``.

    Raises:
        FluxError: whatever is wrong with model, router or settings.
    """
    console = console or Console()
    router = FluxRouter.from_pretrained(settings.router)
    device, dtype = device_and_dtype(settings.device, settings.dtype)
    model, tokenizer = load_model(settings.model, dtype)
    if tokenizer is None:
        raise FluxError(f"model {settings.model!r}: expected one with a tokenizer, got none")
    model, router = model.to(device).eval(), router.to(device)
    router.check_model(model)
    check_lengths(model, settings.lengths)
    cells = builtin_prompts(
        tokenizer,
        tasks=settings.tasks,
        lengths=settings.lengths,
        examples=settings.examples,
        seed=settings.seed,
    )
    total = sum(map(len, cells.values()))
    ways: dict[str, dict[str, Any]] = {
        "full": {"routes": "full", "config": router.config},
        "router": {"router": router},
    }
    results = {}
    started = time.perf_counter()
    for name, routing in ways.items():
        with (
            counting(console, name, total) as advance,
            AsUser.of(model, lowering=settings.lowering, **routing) as engine,
        ):
            results[name] = evaluate(engine, cells, settings.batch, advance)
    console.print(comparison(results["router"], results["full"], settings.seed))
    console.print(
        f"Ω {omega(results['router']):.2f}; {settings.examples} held-out prompts each, seed "
        f"{settings.seed}, sparse layers {router.config.sparse}, {dtype} on {device}, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return results


def comparison(routed: Results, full: Results, seed: int = 0) -> Table:
    """A task and length a line, with 95% intervals."""
    table = Table(title="accuracy, or loss of code and prose, under hard routes")
    for header in ("task", "tokens", "full", "routed", "routed / full", "Ω"):
        table.add_column(header, justify="left" if header == "task" else "right")
    good = judged(full)
    for cell, result in routed.items():
        over = _text(relative(routed, full, [cell], seed=seed)) if cell in good else "—"
        scores = [_text(one.estimate(seed)) for one in (full[cell], result)]
        share = f"{float(result.omega.mean()):.2f}"
        table.add_row(cell.task, str(cell.length), *scores, over, share)
    return table


@contextlib.contextmanager
def counting(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of ``total`` prompts, or a line a tenth where there is no terminal.

    Yields:
        What advances it, by a number of prompts.
    """
    if not console.is_terminal:
        yield _lines(console, name, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    task = bar.add_task(name, total=total)
    with bar:
        yield lambda n: bar.advance(task, n)


def _lines(console: Console, name: str, total: int) -> Callable[[int], None]:
    """What counts prompts, and prints a line whenever another tenth of ``total`` is done."""
    started, done = time.perf_counter(), 0

    def advance(n: int) -> None:
        nonlocal done
        tenths = 10 * done // total
        done += n
        if 10 * done // total > tenths:
            took = time.perf_counter() - started
            console.print(f"{name}: {done} of {total} prompts, {took:.0f} s", highlight=False)

    return advance


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"
