"""Arguments of both kinds of training, on top of transformers' own."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import TrainingArguments

from fluxcompile.errors import ConfigError
from fluxcompile.options import LOWERINGS
from fluxcompile.training.chunked_loss import LOGITS_CHUNK

_BUDGET = "use activation_memory_budget: the compiler decides what to recompute"

# What would train something else than asked, and what to use instead.
_REFUSED = {
    "torch_compile": "the model is compiled already, by the flux backend",
    "gradient_checkpointing": _BUDGET,
    "activation_checkpointing": _BUDGET,
    "gradient_accumulation_steps": "it follows from batch_size",
    "num_train_epochs": "use max_steps",
    "label_smoothing_factor": "the objective has no label smoothing",
    "auto_find_batch_size": "use a smaller per_device_train_batch_size: batch_size stays",
    "fp16": "its loss scaling makes infinite gradients on purpose; use bf16, or a model in bf16",
    "deepspeed": "it would take over optimiser and checkpoints",
    "fsdp": "to split a frozen backbone over processes use shard_backbone",
}


@dataclass
class CompiledTrainingArguments(TrainingArguments):
    """``TrainingArguments`` for a model compiled in training mode.

    Attributes:
        max_steps: optimiser steps.
        batch_size: examples a step, over all processes; ``gradient_accumulation_steps`` follows.
        per_device_train_batch_size: examples a process runs at once; must divide its share.
        min_length: examples with fewer tokens are refused. None: the first length at which sparse
            attention differs from full, ``sink + local + 1``.
        max_length: longer examples are cut, or refused if their task does not allow it; the
            model's own limit if that is lower.
        lowering: what compiles the training graph: ``"inductor"``, ``"aot_eager"``, ``"eager"``.
        inductor: Inductor options, as the backend's option of that name.
        activation_memory_budget: share in (0, 1] of the activations that the compiler may keep
            for the backward pass; it recomputes the rest. None leaves PyTorch's setting (1).
        logits_chunk: target tokens whose logits exist at one time.

    Raises:
        ConfigError: an unknown name, a bad value, or an argument that this training rules out.
    """

    max_steps: int = 300
    per_device_train_batch_size: int = 1
    logging_steps: float = 10
    logging_first_step: bool = True
    save_steps: float = 50
    save_total_limit: int | None = 3
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    ddp_broadcast_buffers: bool | None = False

    batch_size: int = field(default=48, metadata={"help": "Examples a step, over all processes."})
    min_length: int | None = field(
        default=None, metadata={"help": "Shorter examples are refused (sink + local + 1)."}
    )
    max_length: int = field(default=65536, metadata={"help": "Longer examples are cut."})
    lowering: str = field(
        default="inductor", metadata={"help": f"What compiles the graph, one of {LOWERINGS}."}
    )
    inductor: dict[str, Any] | None = field(default=None, metadata={"help": "Inductor options."})
    activation_memory_budget: float | None = field(
        default=None, metadata={"help": "Share of the activations kept for the backward pass."}
    )
    logits_chunk: int = field(
        default=LOGITS_CHUNK, metadata={"help": "Target tokens whose logits exist at one time."}
    )

    #: Fields that are counts, and that are amounts of 0 or more.
    COUNTS: ClassVar[tuple[str, ...]] = (
        "max_steps",
        "batch_size",
        "per_device_train_batch_size",
        "max_length",
        "logits_chunk",
    )
    AMOUNTS: ClassVar[tuple[str, ...]] = ("learning_rate", "weight_decay", "max_grad_norm")

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """Build from keyword arguments; see the class for errors."""
        known = [entry.name for entry in fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f" (closest: {close})" if close else ""
                raise ConfigError.mismatch(
                    "training arguments",
                    f"those of {cls.__name__} or transformers' TrainingArguments{hint}",
                    f"unknown {name!r}",
                )
            if name in _REFUSED and given[name]:
                raise ConfigError.mismatch(name, f"not set ({_REFUSED[name]})", f"{given[name]!r}")
        try:
            return cls(**given)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"training arguments: {error}") from error

    @classmethod
    def of_run(cls, given: Mapping[str, Any], output_dir: str | Path | None, scratch: str) -> Self:
        """As :meth:`parse`, for a run that writes to ``output_dir``.

        Args:
            given: what the user passed.
            output_dir: None: nothing is kept.
            scratch: a directory that lasts as long as the run, for what is not kept.
        """
        if output_dir is None:
            if given.get("resume_from_checkpoint") is True:
                raise ConfigError.mismatch(
                    "resume_from_checkpoint", "a path, or output_dir given as well", True
                )
            given = {"save_strategy": "no", **given}
        return cls.parse({**given, "output_dir": str(output_dir or scratch)})

    def __post_init__(self) -> None:
        self.check_values()
        super().__post_init__()
        share, rest = divmod(self.batch_size, self.world_size * self.per_device_train_batch_size)
        if rest or not share:
            raise ConfigError.mismatch(
                "batch_size",
                f"a multiple of {self.world_size} processes × per_device_train_batch_size "
                f"{self.per_device_train_batch_size}",
                self.batch_size,
            )
        self.gradient_accumulation_steps = share

    def check_values(self) -> None:
        """Raise ConfigError for the first impossible value."""
        for name in self.COUNTS:
            _check_count(name, getattr(self, name))
        if self.min_length is not None:
            _check_count("min_length", self.min_length)
        for name in self.AMOUNTS:
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ConfigError.mismatch(name, "a number >= 0", f"{value!r}")
        if self.lowering not in LOWERINGS:
            raise ConfigError.mismatch("lowering", f"one of {LOWERINGS}", f"{self.lowering!r}")
        budget = self.activation_memory_budget
        if budget is not None and not (_is_number(budget) and 0 < budget <= 1):
            raise ConfigError.mismatch(
                "activation_memory_budget", "a number in (0, 1]", f"{budget!r}"
            )


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError.mismatch(name, "an int >= 1", f"{value!r}")


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
