"""transformers' Trainer with what both kinds of training share: order, checkpoints, logs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from fluxcompile.training import checkpoint
from fluxcompile.training.batching import TaskBalancedSampler
from fluxcompile.training.compiled_arguments import CompiledTrainingArguments
from fluxcompile.training.examples import Example
from fluxcompile.training.safeguard import Safeguard
from fluxcompile.training.sampling import ByLengthInStep, RunSampler
from fluxcompile.training.statistics import Statistics


class CompiledTrainer(Trainer):
    """Base of the trainers. A subclass gives the arguments of a forward and the saved state.

    Args:
        trainee: the module to train. Its forward returns ``loss`` and, of each row, ``lm_loss``
            and what else ``columns`` names.
        arguments: every constant.
        examples: to train on.
        tasks: names, in the order of ``task_id``.
        collator: examples to a batch.
        columns: outputs of ``trainee``, ``[B]`` each, whose means the logs give by task.
        safeguard: watches every step.
    """

    def __init__(
        self,
        trainee: nn.Module,
        arguments: CompiledTrainingArguments,
        examples: Sequence[Example],
        tasks: Sequence[str],
        collator: Callable[[Sequence[Example]], dict[str, torch.Tensor]],
        columns: Sequence[str],
        safeguard: Safeguard,
    ) -> None:
        self.trainee = trainee
        self.tasks = tuple(tasks)
        self.safeguard = safeguard
        # The safeguard clips; the Trainer would clip everything by its common norm.
        arguments.max_grad_norm = 0.0
        super().__init__(
            model=trainee,
            args=arguments,
            train_dataset=examples,
            data_collator=collator,
            callbacks=[safeguard],
        )
        self.model_accepts_loss_kwargs = False  # every loss is a mean over rows
        self.statistics = Statistics(self.tasks, columns, self.args.device)

    def forward_arguments(self, index: torch.Tensor) -> dict[str, Any]:
        """What the trainee's forward takes beyond the batch, whose examples are ``index``."""
        return {}

    def logged(self) -> dict[str, float]:
        """What the logs say beyond the statistics."""
        return {}

    def save_state(self, directory: Path) -> None:
        """Write what is trained; called on the processes that save."""
        raise NotImplementedError

    def load_state(self, directory: Path) -> None:
        """Read it back, on every process."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch = dict(inputs)
        index = batch.pop("index")
        outputs = model(**batch, **self.forward_arguments(index))
        self.statistics.add(outputs, batch["task_id"], batch["attention_mask"])
        self.safeguard.remember(outputs["lm_loss"], batch["task_id"], index)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training, not the summary at its end
            logs.update(self.statistics.report() | self.logged())
            logs["grad_norm"] = self.safeguard.grad_norm
        super().log(logs, start_time)

    def run_order(self) -> RunSampler:
        """Examples step after step, the tasks in turn: the same on every process."""
        tasks = [example.task for example in self.train_dataset]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        length = self.args.max_steps * self.args.batch_size
        return RunSampler(TaskBalancedSampler(tasks, seed), length)

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLengthInStep:
        lengths = [len(example) for example in self.train_dataset]
        return ByLengthInStep(self.run_order(), self.args.batch_size, lengths)

    # Checkpoints: `_save_checkpoint` writes one of the stock layout, with our state as its model.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, on the processes that save."""
        if self.args.should_save:
            self.save_state(Path(output_dir or self.args.output_dir))

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
            limit = self.args.save_total_limit
            rotate_checkpoints(output_dir=output_dir, save_total_limit=limit, use_mtime=True)

    _staging: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.load_state(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, directory: str | None) -> None:
        # The stock one of transformers 5.17 cannot do it on a CPU with several processes.
        if directory is not None:
            for what, file in (
                (self.optimizer, OPTIMIZER_NAME),
                (self.lr_scheduler, SCHEDULER_NAME),
            ):
                what.load_state_dict(checkpoint.read_state(Path(directory, file)))
