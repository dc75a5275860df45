"""Orders of layers, from the first to be made sparse to the last, found on training prompts."""

import argparse
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from fluxcompile.evaluation import Cell, OneGraph, Prompt, builtin_prompts
from fluxcompile.evaluation.scoring import Places
from fluxcompile.training.baselines import matrix_entropies
from fluxcompile.training.chunked_loss import LOGITS_CHUNK, token_losses
from fluxcompile.training.objective import row_means, shortfall
from fluxcompile.training.route_search import greedy_order

BY = ("divergence", "loss", "likelihood")

Routes = tuple[int, ...]


class Batch(NamedTuple):
    """Prompts, of which the first ``wanted`` count; others fill the batch."""

    prompts: list[Prompt]
    wanted: int


class Search:
    """On ``--search-examples`` prompts a task of ``--search-length`` tokens, the training split's.

    Greedy search, a lazy one, makes sparse, again and again, the layer that costs least: by
    ``divergence``, the Kullback-Leibler divergence from full attention's predictions of the
    targets, by ``loss``, their cross entropy, or by ``likelihood``, their :func:`shortfall`. What
    full attention itself gets wrong is noise in the loss and not in the others. Each is the mean
    over the prompts of what their means say.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self._tokenizer = tokenizer

    def greedy(self, graph: OneGraph, depth: int, kind: str | None = None) -> list[int]:
        """The first ``depth`` layers of greedy search; fewer of them are what fewer would give.

        Args:
            graph: of the sparse attention.
            depth: how many layers to order.
            kind: search on ``"retrieval"`` or ``"holistic"`` prompts alone.
        """
        layers = len(graph.router.layer_names)
        batches = self._batches(kind)
        teachers = None
        if self.args.search_by == "divergence":
            teachers = [graph.target_states(batch.prompts, (1,) * layers) for batch in batches]

        def cost(routes: Routes) -> float:
            return self._cost(graph, routes, batches, teachers)

        return greedy_order(cost, layers, depth, lazy=True)

    def entropy(self) -> list[int]:
        """Least matrix entropy of the layer's input first (arXiv 2604.07394, App. C)."""
        prompts = [torch.tensor(prompt.prompt + prompt.target) for prompt in self._prompts]
        with torch.no_grad():
            found = matrix_entropies(self.model, prompts)
        return sorted(range(len(found)), key=found.__getitem__)

    @property
    def _prompts(self) -> list[Prompt]:
        return [prompt for prompts in self._cells.values() for prompt in prompts]

    @cached_property
    def _cells(self) -> dict[Cell, list[Prompt]]:
        return builtin_prompts(
            self._tokenizer,
            tasks=self.args.tasks,
            lengths=[self.args.search_length],
            examples=self.args.search_examples,
            seed=self.args.seed,
            style=self.args.style,
            split="train",
        )

    def _batches(self, kind: str | None) -> list[Batch]:
        """Of one size: the last prompt fills the last of them."""
        prompts = [
            p for cell, some in self._cells.items() if kind in (None, cell.kind) for p in some
        ]
        batch = self.args.batch
        padded = prompts + prompts[-1:] * (-len(prompts) % batch)
        return [
            Batch(padded[i : i + batch], min(batch, len(prompts) - i))
            for i in range(0, len(padded), batch)
        ]

    @torch.no_grad()
    def _cost(
        self,
        graph: OneGraph,
        routes: Routes,
        batches: Sequence[Batch],
        teachers: Sequence[torch.Tensor] | None,
    ) -> float:
        head = graph.language_model.to_logits
        rows = []
        for i_batch, (prompts, wanted) in enumerate(batches):
            states = graph.target_states(prompts, routes)
            places = Places.of(prompts, graph.device)
            teacher = None if teachers is None else teachers[i_batch]
            losses = token_losses(states, places.tokens, head, LOGITS_CHUNK, teacher)
            values = losses.cross_entropy if teacher is None else losses.divergence
            of_rows = row_means(values.double(), places.rows, len(prompts))
            judged = shortfall(of_rows) if self.args.search_by == "likelihood" else of_rows
            rows.append(judged[:wanted])
        return float(torch.cat(rows).mean())
