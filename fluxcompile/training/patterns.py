"""The loss of a model under any pattern of routes, from a single compile."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError
from fluxcompile.passes.mix_attention import DIFFERENTIABLE
from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import soft_routes
from fluxcompile.training.backbone import attached, frozen, running
from fluxcompile.training.chunked_loss import LOGITS_CHUNK, Targets
from fluxcompile.training.examples import Example
from fluxcompile.training.language_model import LanguageModel

# Noise that no logit outweighs: the softmax is exactly 0 or 1.
_DECISIVE = 1e4


def pinning_noise(full: torch.Tensor) -> torch.Tensor:
    """Noise that makes each row take the routes ``full``, whatever its router says.

    Args:
        full: bool ``[B, L]``, True for full attention.

    Returns:
        fp32 ``[B, L, 2]``, as ``soft_routes`` takes it.
    """
    wanted = full.to(torch.float32)
    return _DECISIVE * torch.stack([1 - wanted, wanted], dim=-1)


def serves(config: FluxConfig) -> bool:
    """Whether the training graph computes what a user gets from what ``config`` routes to.

    It does for all that can be trained: queries of the prompt and those that are decoded after it
    are told apart by the prompts' lengths. Other modes have no gradient and are not in that graph.
    """
    return config.sparse in DIFFERENTIABLE and config.retrieval == "full"


def check_served(config: FluxConfig) -> None:
    """Refuse a ``config`` that no training graph :func:`serves`.

    Raises:
        ConfigError: its sparse or retrieval attention has no gradient.
    """
    if not serves(config):
        expected = f"sparse attention of {list(DIFFERENTIABLE)}, full retrieval attention"
        raise ConfigError.mismatch("config", expected, config)


@dataclass(frozen=True, eq=False)
class PatternGraph:
    """One compile of a model in training mode that serves any pattern of routes.

    The training graph takes noise as an input and adds it to the routers' logits; noise that
    outweighs every logit decides, so each pattern is one more input and nothing compiles twice.

    Attributes:
        router: live: other weights in it are other routes, without a recompile.
        language_model: the model's two halves.
        run: the decoder, compiled.
        device: of all of them.
    """

    router: FluxRouter
    language_model: LanguageModel
    run: Callable[..., Any]
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def of(
        cls,
        model: nn.Module,
        config: FluxConfig,
        *,
        lowering: str = "inductor",
        regional: bool = False,
    ) -> Iterator[Self]:
        """For ``model`` and the sparse attention of ``config``; frozen meanwhile.

        Args:
            model: not compiled.
            config: of the sparse attention.
            lowering: as the backend's option.
            regional: compile decoder layers one by one, equal ones once.
        """
        device = next(model.parameters()).device
        router = FluxRouter.from_model(model, config).to(device)
        with attached(model, router), frozen(model):
            language_model = LanguageModel.of(model).checked(model)
            how = {"regional": regional, "lowering": lowering}
            run = running(model, language_model.body, router, **how)
            yield cls(router, language_model, run, device)


class PatternLoss(PatternGraph):
    """Mean loss of examples under fixed routes."""

    @torch.no_grad()
    def __call__(self, routes: Sequence[int], examples: Sequence[Example]) -> float:
        """Mean over the examples of each one's mean over its targets; ``routes`` is 1 for full."""
        noise = pinning_noise(torch.tensor([routes], dtype=torch.bool, device=self.device))
        total = 0.0
        for example in examples:
            ids, labels = (x[None].to(self.device) for x in (example.input_ids, example.labels))
            prompt = torch.tensor([example.prompt_length], device=self.device)
            with soft_routes(self.router, noise=noise, prompt_length=prompt):
                losses = self.language_model.losses(
                    self.run, ids, torch.ones_like(ids), Targets.of(labels), LOGITS_CHUNK
                )
            total += float(losses.cross_entropy.mean())
        return total / len(examples)
