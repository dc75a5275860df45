"""How a router was trained, in its model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from fluxcompile.atomic import write_all
from fluxcompile.router import FluxRouter
from fluxcompile.router_io import CARD_FILE
from fluxcompile.training.tasks import Task

_ARGUMENTS = (
    "max_steps",
    "batch_size",
    "learning_rate",
    "multiplier_learning_rate",
    "multiplier_init",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "temperature_start",
    "temperature_end",
    "temperature_anneal",
    "hardness",
    "distillation",
    "certainty",
    "max_length",
    "full_bias",
    "calibration_rows",
    "start",
    "search_rows",
    "start_rows",
    "seed",
)
_REPORTED = ("lm_loss", "sparsity", "routed_sparsity", "lambda1", "lambda2")


def write_card(
    router: FluxRouter,
    directory: Path,
    tasks: Mapping[str, Task],
    arguments: Mapping[str, Any],
    state: transformers.TrainerState,
    examples: int,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Save ``router`` with a card that says how it was trained, in place of an earlier one.

    Args:
        router: trained.
        directory: of the saved router.
        tasks: it was trained on.
        arguments: every training argument by name.
        state: of the finished trainer.
        examples: number of training examples.
        more: values for the card's template.
    """
    router.save_pretrained(directory)
    training = {
        "examples": examples,
        "steps": state.global_step,
        "arguments": {name: arguments[name] for name in _ARGUMENTS if name in arguments},
        "columns": _REPORTED,
        "tasks": [_row(task, _last(state)) for task in tasks.values()],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    card = router.generate_model_card(**{"training": training} | dict(more or {}))
    write_all({directory / CARD_FILE: str(card).encode()})


def _last(state: transformers.TrainerState) -> Mapping[str, float]:
    """The last log entry of training itself, empty if there is none."""
    entries = [entry for entry in state.log_history if "temperature" in entry]
    return entries[-1] if entries else {}


def _row(task: Task, logs: Mapping[str, float]) -> dict[str, Any]:
    values = [logs.get(f"{column}/{task.name}") for column in _REPORTED]
    written = ["" if value is None else f"{value:.4g}" for value in values]
    return {"name": task.name, "target": task.target, "values": written}
