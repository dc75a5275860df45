"""What both trainees are: a model under its routers, and the losses of a batch's rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from fluxcompile.router import FluxRouter
from fluxcompile.soft_routes import soft_routes
from fluxcompile.training.chunked_loss import Targets
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.objective import row_means


class Rows(NamedTuple):
    """Of each row of a batch.

    Attributes:
        lm_loss: ``[B]``, mean cross entropy over the row's targets.
        divergence: ``[B]``, mean divergence from full attention's predictions of them, weighted
            as asked for; zeros unless it is.
        shares: fp32 ``[B, R]``, share of full attention of the layers that can be sparse at all.
        routed: bool ``[L]``, which layers these are.
    """

    lm_loss: torch.Tensor
    divergence: torch.Tensor
    shares: torch.Tensor
    routed: torch.Tensor


class RoutedModule(nn.Module):
    """A model compiled in training mode, with its router.

    Args:
        router: decides.
        language_model: how to get losses out of the model.
        run: ``language_model.body`` compiled in training mode with ``router``.
        logits_chunk: target tokens whose logits exist at one time.
    """

    def __init__(
        self,
        router: FluxRouter,
        *,
        language_model: LanguageModel,
        run: Callable[..., Any],
        logits_chunk: int,
    ) -> None:
        super().__init__()
        self.router = router
        self.logits_chunk = logits_chunk
        # Behind a tuple, so that the compiled decoder is not registered as one more submodule.
        self._language_model = (language_model, run)

    def rows(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        distil: bool = False,
        certainty: float = 0.0,
        **routing: Any,
    ) -> Rows:
        """Run a batch, shapes as :meth:`Trainee.forward` takes them.

        Args:
            distil: compare with full attention too, which is one more forward pass.
            certainty: how far the divergence at a token is multiplied by the probability that full
                attention gives to it.
            routing: settings of :func:`fluxcompile.soft_routes`.
        """
        language_model, run = self._language_model
        targets = Targets.of(labels)
        teacher = None
        if distil:
            with torch.no_grad():  # the decoder itself, not compiled: full attention
                teacher = language_model.target_states(
                    language_model.body, input_ids, attention_mask, targets
                )
        with soft_routes(self.router, **routing) as routes:
            losses = language_model.losses(
                run, input_ids, attention_mask, targets, self.logits_chunk, teacher
            )
            shares, routed = routes.shares(), routes.routed
        means = [
            row_means(values, targets.rows, len(input_ids))
            for values in (losses.cross_entropy, losses.weighted(certainty))
        ]
        return Rows(*means, shares[:, routed], routed)
