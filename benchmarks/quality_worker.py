"""Whoever does the jobs: a model on a device, the prompts, and the compile that is open there."""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fluxcompile.config import FluxConfig
from fluxcompile.errors import FluxError
from fluxcompile.evaluation import AsUser, OneGraph, Results, evaluate
from fluxcompile.evaluation.command import counting
from fluxcompile.evaluation.evaluate import Engine
from fluxcompile.evaluation.prompts import Cells
from fluxcompile.training.command import load_model
from quality_jobs import Job
from quality_search import Search
from quality_tiny import load_tiny

#: by how much the loss of a cell may differ between the two compiles of full attention: rounding
#: of bf16 moves single tokens, and hardly their mean
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 3e-3}

COMPARED = 64  # prompts of each cell that both compiles are compared on


class Disagreement(FluxError):
    """The two compiles do not compute the same: no number of either is reported."""


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model in eval mode, still on the CPU, and its tokenizer."""
    name = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.tiny:
        return load_tiny("cpu", getattr(torch, name))
    model, tokenizer = load_model(args.model, name)
    if tokenizer is None:
        raise FluxError(f"--model {args.model}: expected one with a tokenizer, got none")
    return model.eval(), tokenizer


class Worker:
    """Does jobs one after the other.

    Args:
        model, tokenizer: of :func:`load`; the model is moved to the device.
        cells: the prompts.
        args: of the command line.
        shown: with a progress bar.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, cells: Cells, args: argparse.Namespace,
        *, shown: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.cells, self.args, self.shown = model.to(args.device), cells, args, shown
        self.search = Search(self.model, tokenizer, args)
        self._open = contextlib.ExitStack()
        self._graph: tuple[FluxConfig, OneGraph] | None = None
        self._apart: float | None = None

    def __call__(self, job: Job) -> bytes:
        """An :class:`Outcome`, in the form it has between processes and in files."""
        return job.run(self).to_bytes()

    def close(self) -> None:
        """Give the model back as it was."""
        self._open.close()
        self._graph = self._apart = None

    def graph(self, config: FluxConfig) -> OneGraph:
        """The compile that serves every pattern of ``config``; it stays open for the next job.

        Its first call is the same whatever the first job is: what shapes the compiler sees first
        may decide how it rounds.
        """
        if self._graph is None or self._graph[0] != config:
            self.close()
            how = {"lowering": self.args.lowering, "regional": self.args.regional}
            opened = OneGraph.of(self.model, config, **how)
            graph = self._open.enter_context(opened)
            first = list(next(iter(self.cells.values())))[: self.args.batch]
            full_batch = first + first[-1:] * (self.args.batch - len(first))
            graph.pattern((1,) * len(graph.router.layer_names))(full_batch)
            self._graph = config, graph
        return self._graph[1]

    def as_user(self, **routing: Any) -> contextlib.AbstractContextManager[AsUser]:
        """An inference compile, in place of what is open."""
        self.close()
        return AsUser.of(self.model, lowering=self.args.lowering, **routing)

    def agreement(self, expected: dict) -> float:
        """How far full attention in the open graph is from ``expected``.

        Args:
            expected: full attention's loss of every prompt, by cell, of which the first
                :data:`COMPARED` are looked at.

        Raises:
            Disagreement: further than rounding explains.
        """
        if self._apart is not None:
            return self._apart
        _, graph = self._graph
        full = graph.pattern((1,) * len(graph.router.layer_names))
        some = {cell: prompts[:COMPARED] for cell, prompts in self.cells.items()}
        results = self.evaluate("full, again", full, some)
        bound = AGREEMENT[next(self.model.parameters()).dtype]
        worst = 0.0
        for cell, result in results.items():
            found, wanted = result.loss.mean(), expected[cell][:COMPARED].mean()
            apart = abs(float(found / wanted) - 1)
            worst = max(worst, apart)
            if cell.metric == "loss" and not apart <= bound:
                raise Disagreement.mismatch(
                    f"loss of {cell.task} at {cell.length}, full attention in training mode",
                    f"{wanted:.4f} within {bound:.0e}",
                    f"{found:.4f}",
                )
        self._apart = worst
        return worst

    def evaluate(self, name: str, engine: Engine, cells: Cells | None = None) -> Results:
        """Every prompt, or those of ``cells``, through ``engine``."""
        cells = self.cells if cells is None else cells
        total = sum(map(len, cells.values()))
        with self._counting(name, total) as advance:
            return evaluate(engine, cells, self.args.batch, advance)

    def _counting(
        self, name: str, total: int
    ) -> contextlib.AbstractContextManager[Callable[[int], None] | None]:
        if not self.shown:
            return contextlib.nullcontext()
        return counting(Console(stderr=True), name, total)
