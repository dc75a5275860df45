"""What the trainer sees as its model: frozen backbone, routers and multipliers in one module."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from fluxcompile.router import FluxRouter
from fluxcompile.training.calibration import calibrate, read_features
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.multipliers import Multipliers
from fluxcompile.training.objective import routed_sparsity, sparsity_term
from fluxcompile.training.route_cost import route_samples
from fluxcompile.training.route_search import Sample
from fluxcompile.training.routed_module import RoutedModule


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


class Trainee(RoutedModule):
    """One batch in, the objective out.

    The backbone stays in eval mode: dropout would be noise that is not the router's.

    Args:
        backbone: the model, its parameters frozen, ``router`` attached to it.
        router: trained.
        multipliers: trained, by ascent.
        language_model: how to get losses out of ``backbone``.
        run: ``language_model.body`` compiled in training mode.
        logits_chunk: target tokens whose logits exist at one time.
    """

    def __init__(
        self,
        backbone: nn.Module,
        router: FluxRouter,
        multipliers: Multipliers,
        *,
        language_model: LanguageModel,
        run: Callable[..., Any],
        logits_chunk: int,
    ) -> None:
        super().__init__(router, language_model=language_model, run=run, logits_chunk=logits_chunk)
        self.backbone = backbone
        self.multipliers = multipliers
        # DistributedDataParallel would send a backbone that every process has already.
        self._ddp_params_and_buffers_to_ignore = [
            f"backbone.{name}" for name, _ in _tensors(backbone)
        ]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()
        return self

    def calibrate(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """:func:`fluxcompile.training.calibration.calibrate` through the graph that trains."""
        _, run = self._language_model
        calibrate(self.backbone, self.router, batches, run=run)

    def features(
        self, batches: Iterable[Mapping[str, torch.Tensor]], full: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """What each routed layer reads of ``N`` rows under fixed routes, on the CPU.

        Args:
            batches: as :meth:`calibrate` takes them, ``N`` rows in all.
            full: bool ``[N, L]``, True for full attention.

        Returns:
            fp32 ``[N, F]`` by layer.
        """
        _, run = self._language_model
        found: dict[int, list[torch.Tensor]] = {}
        for batch in batches:
            of_batch, full = full.tensor_split([len(batch["input_ids"])])
            for layer, features in read_features(self.router, batch, run, of_batch).items():
                found.setdefault(layer, []).append(features.cpu())
        return {layer: torch.cat(features) for layer, features in found.items()}

    def fixed(
        self, batches: Iterable[Mapping[str, torch.Tensor]], parts: Sequence[int]
    ) -> list[Sample]:
        """:func:`route_samples` on ``batches``, through the graph that trains."""
        return route_samples(self.router, *self._language_model, batches, self.logits_chunk, parts)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        task_id: torch.Tensor,
        noise: torch.Tensor,
        temperature: float,
        prompt_length: torch.Tensor | None = None,
        hardness: float = 0.0,
        distillation: float = 0.0,
        certainty: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Objective of one batch.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: ``[B, S]``, 1 for valid tokens.
            labels: int64 ``[B, S]``, each target at its own place, -100 elsewhere.
            task_id: int64 ``[B]``.
            noise: fp32 ``[B, L, 2]``, added to the routers' logits.
            temperature: τ.
            prompt_length: int64 ``[B]``, how many of a row's first tokens are its prompt, which the
                routers read and behind which tokens count as decoded; None for all.
            hardness: how far the mixture is drawn to hard routes.
            distillation: share of the divergence from full attention in what is descended; the
                rest is the language-model loss.
            certainty: how far the divergence at a token is multiplied by the probability that full
                attention gives to it.

        Returns:
            ``loss``, the scalar to descend; without gradient, fp32 ``[B]`` each: ``lm_loss``,
            ``divergence`` (zeros without distillation),
            ``sparsity`` (soft, what the constraint sees), ``routed_sparsity`` (argmax, what
            inference does). Both are means over the layers that can be sparse at all.
        """
        lm_loss, divergence, shares, routed = self.rows(
            input_ids,
            attention_mask,
            labels,
            distil=distillation > 0,
            certainty=certainty,
            temperature=temperature,
            noise=noise,
            prompt_length=prompt_length,
            hardness=hardness,
        )
        term = sparsity_term(shares, *self.multipliers.of(task_id))
        fit = lm_loss + distillation * (divergence - lm_loss)
        return {
            "loss": (fit + term.penalty).mean(),
            "lm_loss": lm_loss.detach(),
            "divergence": divergence.detach(),
            "sparsity": term.sparsity.detach(),
            "routed_sparsity": routed_sparsity(shares, noise[:, routed], temperature),
        }
