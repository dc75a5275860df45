"""What the trainer sees when a backbone is adapted to its routes, and that trainer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import nn

from fluxcompile.atomic import write_all
from fluxcompile.errors import TrainingError
from fluxcompile.router import FluxRouter
from fluxcompile.training.compiled_arguments import CompiledTrainingArguments
from fluxcompile.training.compiled_trainer import CompiledTrainer
from fluxcompile.training.examples import Example
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.routed_module import RoutedModule
from fluxcompile.training.safeguard import Safeguard

TRAINED_FILE = "trained.safetensors"


class Adapted(RoutedModule):
    """One batch in, its language-model loss under locked routes out.

    Args:
        model: with the parameters to train, and no others, requiring grad.
        router: decides the routes; frozen, attached.
        language_model: how to get losses out of ``model``.
        run: ``language_model.body`` compiled in training mode with locked routes.
        logits_chunk: target tokens whose logits exist at one time.
    """

    def __init__(
        self,
        model: nn.Module,
        router: FluxRouter,
        *,
        language_model: LanguageModel,
        run: Callable[..., Any],
        logits_chunk: int,
    ) -> None:
        super().__init__(router, language_model=language_model, run=run, logits_chunk=logits_chunk)
        self.model = model

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.router.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        task_id: torch.Tensor,
        prompt_length: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Loss of one batch, shapes as :meth:`Trainee.forward` takes them.

        Returns:
            ``loss``, the scalar to descend; without gradient, fp32 ``[B]`` each: ``lm_loss`` and
            ``routed_sparsity``, the share of layers that ran sparse.
        """
        lm_loss, _, shares, _ = self.rows(
            input_ids, attention_mask, labels, prompt_length=prompt_length
        )
        return {
            "loss": lm_loss.mean(),
            "lm_loss": lm_loss.detach(),
            "routed_sparsity": 1 - shares.detach().float().mean(dim=1),
        }


class AdaptationTrainer(CompiledTrainer):
    """Trains an :class:`Adapted`; checkpoints hold the trained parameters alone.

    Args:
        adapted: the model with its router.
        arguments: every constant; optimiser and schedule are transformers' own.
        examples: to train on.
        tasks: names, in the order of ``task_id``.
        collator: examples to a batch.
    """

    def __init__(
        self,
        adapted: Adapted,
        arguments: CompiledTrainingArguments,
        examples: Sequence[Example],
        tasks: Sequence[str],
        collator: Callable[[Sequence[Example]], dict[str, torch.Tensor]],
    ) -> None:
        parameters = adapted.trained().values()
        safeguard = Safeguard(parameters, tasks, arguments.max_grad_norm)
        columns = ("lm_loss", "routed_sparsity")
        super().__init__(adapted, arguments, examples, tasks, collator, columns, safeguard)

    def save_state(self, directory: Path) -> None:
        """The trained parameters."""
        state = {name: p.detach().cpu().contiguous() for name, p in self.trainee.trained().items()}
        directory.mkdir(parents=True, exist_ok=True)
        write_all({directory / TRAINED_FILE: safetensors.torch.save(state)})

    @torch.no_grad()
    def load_state(self, directory: Path) -> None:
        """The trained parameters, of a run that trains the same ones.

        Raises:
            TrainingError: the file is missing, damaged, or of another model or adapter.
        """
        file = directory / TRAINED_FILE
        try:
            state = safetensors.torch.load_file(file)
        except Exception as error:  # the parser raises many kinds
            raise TrainingError.mismatch(str(file), "trained parameters", error) from error
        trained = self.trainee.trained()
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if shapes != found:
            differing = sorted(dict(shapes.items() ^ found.items()))
            raise TrainingError.mismatch(
                str(file), f"the {len(shapes)} parameters trained here", f"others: {differing[:3]}"
            )
        for name, parameter in trained.items():
            parameter.copy_(state[name])
