"""The trainer of routers: noise, temperature, ascent, and what its checkpoints hold."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxcompile.training import checkpoint
from fluxcompile.training.arguments import RouterTrainingArguments
from fluxcompile.training.compiled_trainer import CompiledTrainer
from fluxcompile.training.examples import Example
from fluxcompile.training.noise import gumbel_noise
from fluxcompile.training.route_search import Routes, Sample, one_in
from fluxcompile.training.safeguard import Safeguard
from fluxcompile.training.start import GREEDY, imitate, start_routes
from fluxcompile.training.trainee import Trainee

logger = logging.getLogger(__name__)
_COLUMNS = ("lm_loss", "sparsity", "routed_sparsity")  # and, if it is trained on: the divergence


class RouterTrainer(CompiledTrainer):
    """Trains a :class:`Trainee`. Its logs name each task's loss, Ω, λ1 and λ2, and τ.

    ``sparsity/<task>`` is the soft Ω that the constraint sees, ``routed_sparsity/<task>`` the Ω of
    the routes that inference would take.

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
        self.temperatures = arguments.temperatures()
        safeguard = Safeguard(
            trainee.router.parameters(),
            tasks,
            arguments.max_grad_norm,
            after_step=trainee.multipliers.project,
        )
        columns = (*_COLUMNS, "divergence") if arguments.distillation else _COLUMNS
        super().__init__(trainee, arguments, examples, tasks, collator, columns, safeguard)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW: the routers' matrices decay, their biases do not; the multipliers ascend."""
        if self.optimizer is None:
            routers = list(self.trainee.router.parameters())
            decay = self.args.weight_decay
            multipliers = {
                "params": list(self.trainee.multipliers.parameters()),
                "lr": self.args.multiplier_learning_rate,
                "weight_decay": 0.0,
                "maximize": True,
            }
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": [p for p in routers if p.ndim > 1], "weight_decay": decay},
                    {"params": [p for p in routers if p.ndim <= 1], "weight_decay": 0.0},
                    multipliers,
                ],
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def calibrate(self, rows: int) -> None:
        """Set the mean and the deviation of what the routers read, over ``rows`` examples at most.

        The examples are the first ones of the run, each task equally often; the processes share
        them, and all get the same result.
        """
        order = list(self.run_order())[:rows]
        mine = order[self.args.process_index :: self.args.world_size]
        with self.accelerator.autocast():  # the steps' own: one graph for both
            self.trainee.calibrate(self._batches(mine))

    def start(self) -> dict[str, Routes]:
        """Begin with good fixed routes for each task: see :mod:`fluxcompile.training.start`.

        Every process does all of it: what they would share is little beside the training, and
        routes that differ by a rounding error would be routes of different routers.

        Returns:
            The routes of each task.
        """
        args, trainee = self.args, self.trainee
        by_task: dict[str, list[int]] = {task: [] for task in self.tasks}
        # The run's own examples first, and those that it would not come to.
        for i in dict.fromkeys([*self.run_order(), *range(len(self.train_dataset))]):
            by_task[self.train_dataset[i].task].append(i)
        targets = dict(zip(self.tasks, trainee.multipliers.targets.tolist(), strict=True))
        share = max(1, args.start_rows // len(targets))
        rows = [i for some in by_task.values() for i in some[:share]]
        with self.accelerator.autocast():
            samples = {
                task: self._samples(some[: args.search_rows])
                for task, some in by_task.items()
                if args.start == GREEDY
            }
            routes = start_routes(args.start, targets, len(trainee.router.layer_names), samples)
            rows = self._by_length(rows)
            full = torch.tensor([routes[self.train_dataset[i].task] for i in rows]).bool()
            features = trainee.features(self._batches(rows), full)
        found = imitate(trainee.router, features, full, args.seed)
        logger.info("start routes: %.1f%% of %d examples' taken", 100 * found, len(rows))
        return routes

    def _samples(self, rows: Sequence[int]) -> list[Sample]:
        """What routes cost on ever more of these rows."""
        return self.trainee.fixed(self._batches(self._by_length(rows)), one_in(len(rows)))

    def _by_length(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=lambda i: len(self.train_dataset[i]))

    def _batches(self, rows: Sequence[int]) -> Iterator[dict[str, torch.Tensor]]:
        """Examples by position, as many at once as a step runs."""
        size = self.args.per_device_train_batch_size
        for first in range(0, len(rows), size):
            yield self.data_collator([self.train_dataset[i] for i in rows[first : first + size]])

    def forward_arguments(self, index: torch.Tensor) -> dict[str, Any]:
        """Noise, temperature and hardness of this step, and what is descended."""
        step, layers = self.state.global_step, len(self.trainee.router.layer_names)
        return {
            "noise": gumbel_noise(self.args.seed, step, index, layers),
            "temperature": self.temperatures(step),
            "hardness": self.args.hardness * self.temperatures.progress(step),
            "distillation": self.args.distillation,
            "certainty": self.args.certainty,
        }

    def logged(self) -> dict[str, float]:
        """λ1 and λ2 of each task, and τ of the step that has just been made."""
        multipliers = self.trainee.multipliers
        values = {"temperature": self.temperatures(max(0, self.state.global_step - 1))}
        for i_task, task in enumerate(self.tasks):
            values[f"lambda1/{task}"] = multipliers.linear[i_task].item()
            values[f"lambda2/{task}"] = multipliers.quadratic[i_task].item()
        return values

    def save_state(self, directory: Path) -> None:
        """Router and multipliers."""
        trainee = self.trainee
        checkpoint.save_state(directory, trainee.router, trainee.multipliers, self.tasks)

    def load_state(self, directory: Path) -> None:
        """Router and multipliers, of a run like this one."""
        trainee = self.trainee
        checkpoint.load_state(directory, trainee.router, trainee.multipliers, self.tasks)
