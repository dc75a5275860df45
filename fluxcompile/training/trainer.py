"""transformers' Trainer, taught the objective: noise, temperature, ascent, checkpoints, logs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from fluxcompile.training import checkpoint
from fluxcompile.training.arguments import RouterTrainingArguments
from fluxcompile.training.batching import TaskBalancedSampler
from fluxcompile.training.examples import Example
from fluxcompile.training.noise import gumbel_noise
from fluxcompile.training.safeguard import Safeguard
from fluxcompile.training.sampling import RunSampler
from fluxcompile.training.statistics import Statistics
from fluxcompile.training.trainee import Trainee


class RouterTrainer(Trainer):
    """Trains a :class:`Trainee`.

    Args:
        trainee: backbone, router and multipliers.
        arguments: every constant.
        examples: to train on.
        tasks: names, in the order of ``task_id``.
        collator: examples to a batch.
    """

    def __init__(
        self,
        trainee: Trainee,
        arguments: RouterTrainingArguments,
        examples: Sequence[Example],
        tasks: Sequence[str],
        collator: Callable[[Sequence[Example]], dict[str, torch.Tensor]],
    ) -> None:
        self.trainee = trainee
        self.tasks = tuple(tasks)
        self.temperatures = arguments.temperatures()
        self.safeguard = Safeguard(trainee, self.tasks, arguments.max_grad_norm)
        # The Trainer would clip routers and multipliers by their common norm.
        arguments.max_grad_norm = 0.0
        super().__init__(
            model=trainee,
            args=arguments,
            train_dataset=examples,
            data_collator=collator,
            callbacks=[self.safeguard],
        )
        self.model_accepts_loss_kwargs = False  # every loss is a mean over rows
        self.statistics = Statistics(self.tasks, self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> RunSampler:
        tasks = [example.task for example in self.train_dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        length = self.args.max_steps * self.args.batch_size
        return RunSampler(TaskBalancedSampler(tasks, seed), length)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW: the routers' matrices decay, their biases do not; the multipliers ascend."""
        if self.optimizer is None:
            routers = list(self.trainee.router.parameters())
            decay = self.args.weight_decay
            matrices = [parameter for parameter in routers if parameter.ndim > 1]
            biases = [parameter for parameter in routers if parameter.ndim <= 1]
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": matrices, "weight_decay": decay},
                    {"params": biases, "weight_decay": 0.0},
                    {
                        "params": list(self.trainee.multipliers.parameters()),
                        "lr": self.args.multiplier_learning_rate,
                        "weight_decay": 0.0,
                        "maximize": True,
                    },
                ],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        index = inputs["index"]
        layers = len(self.trainee.router.layer_names)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            task_id=inputs["task_id"],
            noise=gumbel_noise(self.args.seed, self.state.global_step, index, layers),
            temperature=self.temperatures(self.state.global_step),
        )
        self.statistics.add(outputs, inputs["task_id"], inputs["attention_mask"])
        self.safeguard.remember(outputs["lm_loss"], inputs["task_id"], index)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training, not the summary at its end
            temperature = self.temperatures(max(0, self.state.global_step - 1))
            logs.update(self.statistics.report(self.trainee.multipliers, temperature))
            logs["grad_norm"] = self.safeguard.grad_norm
        super().log(logs, start_time)

    # Checkpoints.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write router and multipliers, on the processes that save."""
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            trainee = self.trainee
            checkpoint.save_state(directory, trainee.router, trainee.multipliers, self.tasks)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        output_dir = self.args.output_dir
        leader = self.args.should_save or self.is_local_process_zero()
        with checkpoint.appearing(output_dir, name, leader=leader) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=output_dir, save_total_limit=self.args.save_total_limit, use_mtime=True
            )

    _staging: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        trainee = self.trainee
        directory = Path(resume_from_checkpoint)
        checkpoint.load_state(directory, trainee.router, trainee.multipliers, self.tasks)
