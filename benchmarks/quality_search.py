"""Orders of layers, from the first to be made sparse to the last, found on training prompts."""

import argparse
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fluxcompile.evaluation import OneGraph, Prompt, builtin_prompts
from fluxcompile.evaluation.scoring import Places
from fluxcompile.training.baselines import greedy_order, matrix_entropies
from fluxcompile.training.chunked_loss import LOGITS_CHUNK, token_losses
from fluxcompile.training.objective import row_means, shortfall

BY = ("divergence", "loss", "likelihood")

Routes = tuple[int, ...]


class Search:
    """On ``--search-examples`` prompts a task of ``--search-length`` tokens, the training split's.

    Greedy search makes sparse, again and again, the layer that costs least: by ``divergence``, the
    Kullback-Leibler divergence from full attention's predictions of the targets, by ``loss``,
    their cross entropy, or by ``likelihood``, their :func:`shortfall`. What full attention itself
    gets wrong is noise in the loss and not in the others. Each is the mean over the prompts of what
    their means say.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self._tokenizer = tokenizer

    def greedy(self, graph: OneGraph, depth: int) -> list[int]:
        """The first ``depth`` layers of greedy search; fewer of them are what fewer would give."""
        layers = len(graph.router.layer_names)
        teachers = None
        if self.args.search_by == "divergence":
            teachers = [graph.target_states(batch, (1,) * layers) for batch in self._batches]
        return greedy_order(lambda routes: self._cost(graph, routes, teachers), layers, depth)

    def entropy(self) -> list[int]:
        """Least matrix entropy of the layer's input first (arXiv 2604.07394, App. C)."""
        prompts = [torch.tensor(prompt.prompt + prompt.target) for prompt in self._prompts]
        with torch.no_grad():
            found = matrix_entropies(self.model, prompts)
        return sorted(range(len(found)), key=found.__getitem__)

    @cached_property
    def _prompts(self) -> list[Prompt]:
        cells = builtin_prompts(
            self._tokenizer,
            tasks=self.args.tasks,
            lengths=[self.args.search_length],
            examples=self.args.search_examples,
            seed=self.args.seed,
            style=self.args.style,
            split="train",
        )
        return [prompt for prompts in cells.values() for prompt in prompts]

    @cached_property
    def _batches(self) -> list[list[Prompt]]:
        """Of one size: the last prompt fills the last of them."""
        prompts, batch = self._prompts, self.args.batch
        padded = prompts + prompts[-1:] * (-len(prompts) % batch)
        return [padded[i : i + batch] for i in range(0, len(padded), batch)]

    @torch.no_grad()
    def _cost(self, graph: OneGraph, routes: Routes, teachers: list[torch.Tensor] | None) -> float:
        head = graph.language_model.to_logits
        rows = []
        for i_batch, prompts in enumerate(self._batches):
            states = graph.target_states(prompts, routes)
            places = Places.of(prompts, graph.device)
            teacher = None if teachers is None else teachers[i_batch]
            losses = token_losses(states, places.tokens, head, LOGITS_CHUNK, teacher)
            values = losses.cross_entropy if teacher is None else losses.divergence
            of_rows = row_means(values.double(), places.rows, len(prompts))
            rows.append(shortfall(of_rows) if self.args.search_by == "likelihood" else of_rows)
        return float(torch.cat(rows)[: len(self._prompts)].mean())
