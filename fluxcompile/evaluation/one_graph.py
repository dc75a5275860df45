"""Any router and any fixed pattern from a single compile: the training graph, routed hard.

The graph of training mode takes its router's weights, and noise on the logits, as inputs. At a
temperature next to zero a share is 0 or 1, and noise that outweighs every logit pins each row's
routes. So one compile of a deep model serves every pattern, several in one batch if need be; it
computes both attentions of every layer, which is the price. It also takes the prompts' lengths:
what follows a prompt attends as tokens that are decoded do.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import nn

from fluxcompile.config import FluxConfig
from fluxcompile.errors import RouterError
from fluxcompile.evaluation.compiling import no_silent_eager
from fluxcompile.evaluation.padding import padded
from fluxcompile.evaluation.prompts import Prompt
from fluxcompile.evaluation.scoring import Places, Scores, score
from fluxcompile.model_layers import unwrap
from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import soft_routes
from fluxcompile.training.backbone import check_trainable
from fluxcompile.training.patterns import PatternGraph, check_served, pinning_noise

_HARD = 1e-12  # temperature at which only equal logits make a share other than 0 and 1


class OneGraph(PatternGraph):
    """One compile of a model in training mode, whose router may be any of the same shape."""

    @classmethod
    @contextlib.contextmanager
    def of(cls, model: nn.Module, config: FluxConfig, **how: Any) -> Iterator[Self]:
        """For ``model`` and the sparse attention of ``config``; frozen meanwhile.

        Args:
            model, config, how: as :meth:`PatternGraph.of` takes them.

        Raises:
            ConfigError: no training graph serves ``config``.
            TrainingError: ``model`` is compiled already.
        """
        check_served(config)
        model = unwrap(model)
        check_trainable(model)
        torch._dynamo.reset()
        with no_silent_eager(), super().of(model, config, **how) as graph:
            yield graph

    def pattern(self, routes: Sequence[int]) -> Callable[[Sequence[Prompt]], Scores]:
        """Scores batches under fixed routes, one 0/1 a layer, 1 for full attention.

        Raises:
            RouterError: not one entry a layer.
        """
        full = self._full(routes)
        return lambda prompts: self._pinned(prompts, full)

    @torch.no_grad()
    def target_states(self, prompts: Sequence[Prompt], routes: Sequence[int]) -> torch.Tensor:
        """What ``language_model.to_logits`` takes, before each target, under fixed routes.

        Returns:
            ``[N, D]``, in the order of :class:`Places`.

        Raises:
            RouterError: not one entry a layer.
        """
        states = self._pinned_states(prompts, self._full(routes))
        return states[self._before(prompts, Places.of(prompts, self.device))]

    def _full(self, routes: Sequence[int]) -> torch.Tensor:
        """bool ``[1, L]``."""
        if len(routes) != len(self.router.layer_names):
            raise RouterError.mismatch(
                "routes", f"{len(self.router.layer_names)} entries", len(routes)
            )
        return torch.tensor([routes], dtype=torch.bool, device=self.device)

    def routed(self, router: FluxRouter) -> Callable[[Sequence[Prompt]], Scores]:
        """Scores batches under the hard routes of ``router``, decided by the prompts alone.

        Raises:
            RouterError: its config or its tensors are not those the graph was compiled for.
        """
        expected = {name: tensor.shape for name, tensor in self.router.state_dict().items()}
        found = {name: tensor.shape for name, tensor in router.state_dict().items()}
        if router.config != self.router.config or found != expected:
            raise RouterError.mismatch(
                "router", f"one of {self.router.config}, shaped alike", router.config
            )

        def run(prompts: Sequence[Prompt]) -> Scores:
            self.router.load_state_dict(router.state_dict())
            return self._decided(prompts)

        return run

    @torch.no_grad()
    def _pinned(self, prompts: Sequence[Prompt], full: torch.Tensor) -> Scores:
        states = self._pinned_states(prompts, full)
        return self._score(states, prompts, full.expand(len(prompts), -1))

    def _pinned_states(self, prompts: Sequence[Prompt], full: torch.Tensor) -> torch.Tensor:
        noise = pinning_noise(full.expand(len(prompts), -1))
        with soft_routes(self.router, noise=noise, prompt_length=self._lengths(prompts)):
            return self._whole(prompts)

    @torch.no_grad()
    def _decided(self, prompts: Sequence[Prompt]) -> Scores:
        lengths = self._lengths(prompts)
        with soft_routes(self.router, temperature=_HARD, prompt_length=lengths) as soft:
            states = self._whole(prompts)
        return self._score(states, prompts, soft.shares() > 0.5)

    def _whole(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        rows = [prompt.prompt + prompt.target for prompt in prompts]
        return self._states(*padded(rows, self.device))

    def _states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states (or logits) ``[B, S, D]`` of rows that are padded on the right."""
        for tensor in (ids, mask):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        output = self.run(ids, attention_mask=mask, use_cache=False)
        return self.language_model.states(output)

    def _score(self, states: torch.Tensor, prompts: Sequence[Prompt], full: torch.Tensor) -> Scores:
        places = Places.of(prompts, self.device)
        head = self.language_model.to_logits
        return score(states[self._before(prompts, places)], places, head, full)

    def _before(
        self, prompts: Sequence[Prompt], places: Places
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and position of what predicts each target."""
        return places.rows, self._lengths(prompts)[places.rows] + places.order - 1

    def _lengths(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Of the prompts without their targets, int64 ``[B]``."""
        return torch.tensor([len(prompt.prompt) for prompt in prompts], device=self.device)
