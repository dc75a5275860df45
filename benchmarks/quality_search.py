"""Layers to make sparse, found on training prompts: in what order, and which of a given number."""

import argparse
import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from fluxcompile.evaluation import Cell, OneGraph, Prompt, builtin_prompts
from fluxcompile.evaluation.scoring import Places
from fluxcompile.training.baselines import matrix_entropies
from fluxcompile.training.chunked_loss import LOGITS_CHUNK, token_losses
from fluxcompile.training.objective import row_means, shortfall
from fluxcompile.training.route_search import (
    Routes,
    Sample,
    after_greedy,
    greedy_order,
    mean_of,
    one_in,
    samples_of,
)

BY = ("divergence", "loss", "likelihood")


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
    over the prompts of what their means say; where there are many, greedy search has a part of
    them, and exchanges of layers after it all, as where a router starts from a search.
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
        return greedy_order(mean_of(self._samples(graph, kind)[0]), layers, depth, lazy=True)

    def exchanged(self, graph: OneGraph, routes: Routes, kind: str | None = None) -> list[int]:
        """The layers that are sparse once those of ``routes``, found greedily, have been exchanged.

        Args:
            graph: of the sparse attention.
            routes: of :meth:`greedy`, for the same kind.
            kind: search on ``"retrieval"`` or ``"holistic"`` prompts alone.
        """
        found = after_greedy(self._samples(graph, kind), routes)
        return [layer for layer, full in enumerate(found) if not full]

    def entropy(self) -> list[int]:
        """Least matrix entropy of the layer's input first (arXiv 2604.07394, App. C)."""
        prompts = [torch.tensor(prompt.prompt + prompt.target) for prompt in self._prompts]
        with torch.no_grad():
            found = matrix_entropies(self.model, prompts)
        return sorted(range(len(found)), key=found.__getitem__)

    @property
    def _prompts(self) -> list[Prompt]:
        return [prompt for prompts in self._cells.values() for prompt in prompts]

    @functools.cached_property
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

    def _samples(self, graph: OneGraph, kind: str | None) -> list[Sample]:
        """What routes cost on ever more of the prompts of a kind."""
        batches = self._batches(kind)
        head = graph.language_model.to_logits
        full = (1,) * len(graph.router.layer_names)

        @functools.cache
        def teacher(i_batch: int) -> torch.Tensor | None:
            if self.args.search_by != "divergence":
                return None
            return graph.target_states(batches[i_batch].prompts, full)

        @torch.no_grad()
        def cost(routes: Routes, i_batch: int) -> torch.Tensor:
            prompts, wanted = batches[i_batch]
            states = graph.target_states(prompts, routes)
            places = Places.of(prompts, graph.device)
            losses = token_losses(states, places.tokens, head, LOGITS_CHUNK, teacher(i_batch))
            values = losses.cross_entropy if teacher(i_batch) is None else losses.divergence
            of_rows = row_means(values.double(), places.rows, len(prompts))
            judged = shortfall(of_rows) if self.args.search_by == "likelihood" else of_rows
            return judged[:wanted]

        examples = sum(batch.wanted for batch in batches)
        return samples_of(cost, len(batches), one_in(examples))
