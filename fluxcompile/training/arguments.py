"""Every constant of router training, with the paper's value as its default."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fluxcompile.errors import ConfigError
from fluxcompile.layer_router import UNTRAINED_LOGITS
from fluxcompile.training.compiled_arguments import CompiledTrainingArguments
from fluxcompile.training.schedule import TemperatureSchedule
from fluxcompile.training.start import GREEDY


@dataclass
class RouterTrainingArguments(CompiledTrainingArguments):
    """Arguments of :func:`fluxcompile.train_router`: transformers' own, and these.

    Defaults are those of Flux Attention (arXiv 2604.07394). Whatever else ``TrainingArguments``
    takes (``report_to``, ``save_steps``, ``resume_from_checkpoint``, …) passes through; see
    :class:`CompiledTrainingArguments` for batches, lengths and the compiler.

    Attributes:
        learning_rate: of the routers.
        multiplier_learning_rate: of λ1 and λ2.
        weight_decay: of the routers' matrices; biases and multipliers have none.
        adam_beta1: AdamW's first moment.
        adam_beta2: AdamW's second moment.
        lr_scheduler_type: of both learning rates.
        warmup_steps: below 1 a share of ``max_steps``, else steps.
        max_grad_norm: the routers' gradient is scaled down to this norm; 0 turns it off. The
            multipliers' is never clipped.
        temperature_start: τ of the first step.
        temperature_end: τ once annealed.
        temperature_anneal: share of the steps over which τ goes linearly from one to the other.
        hardness: how far the mixture is drawn to hard routes (see
            :class:`fluxcompile.SoftRoutes`) once annealed, from 0 over the same steps as τ.
        distillation: share of the Kullback-Leibler divergence from the same model with full
            attention, at the same tokens, in what the routers minimise; the rest is the
            language-model loss, which is all of it in the paper. What full attention gets wrong
            says nothing of routes, and is noise in the one but not in the other; it costs one more
            forward pass.
        certainty: how far the divergence at a token is multiplied by the probability that full
            attention gives to it. With 1 an answer that full attention does not know counts for
            nothing, and one that it is sure of in full.
        multiplier_init: first value of every λ1 and λ2.
        full_bias: of a router that is created for the run, the logit of full attention before it
            has learnt anything; the other logit is 0.
        start: where a new router starts from. None: from full attention, as in the paper.
            ``"greedy"``: from the fixed routes of each task's target sparsity that a greedy search
            finds, and exchanges after it; or such routes by task, one 0 or 1 (full attention) a
            layer. The routers learn to take them from what they read, which they must standardise.
            See :mod:`fluxcompile.training.start`.
        search_rows: examples of each task that the search judges routes by; to begin with, a part
            of them.
        start_rows: examples that the routers learn their first routes from.
        calibration_rows: examples over which the features of a router that standardises them are
            measured, before the first step. A router that has been measured before is left as it
            is.
        regional: compile decoder layers one by one, equal ones once: as many graphs for a deep
            model as for a shallow one. Not for sliding windows, nor with ``shard_backbone``.
        shard_backbone: split the backbone's matrices over the processes of each machine instead
            of copying it to each: see :mod:`fluxcompile.training.sharding`.

    Raises:
        ConfigError: an unknown name, a bad value, or an argument that router training rules out.
    """

    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.2
    max_grad_norm: float = 1.0

    multiplier_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the multipliers λ1 and λ2."}
    )
    temperature_start: float = field(default=1.5, metadata={"help": "τ of the first step."})
    temperature_end: float = field(default=1.0, metadata={"help": "τ once annealed."})
    temperature_anneal: float = field(
        default=0.6, metadata={"help": "Share of the steps over which τ is annealed."}
    )
    hardness: float = field(
        default=0.0, metadata={"help": "Hard routes' share of the mixture once annealed."}
    )
    distillation: float = field(
        default=0.0, metadata={"help": "Share of the divergence from full attention in the loss."}
    )
    certainty: float = field(
        default=0.0, metadata={"help": "Weight of the divergence by full attention's certainty."}
    )
    multiplier_init: float = field(
        default=0.0, metadata={"help": "First value of the multipliers λ1 and λ2."}
    )
    full_bias: float = field(
        default=UNTRAINED_LOGITS[1], metadata={"help": "A new router's logit of full attention."}
    )
    start: Any = field(
        default=None, metadata={"help": 'Routes that a router starts from: "greedy", or by task.'}
    )
    search_rows: int = field(
        default=16, metadata={"help": "Examples of each task that routes are searched on."}
    )
    start_rows: int = field(
        default=256, metadata={"help": "Examples that the first routes are learnt from."}
    )
    calibration_rows: int = field(
        default=64, metadata={"help": "Examples that features are standardised over."}
    )
    regional: bool = field(
        default=False, metadata={"help": "Compile decoder layers one by one, equal ones once."}
    )
    shard_backbone: bool = field(
        default=False, metadata={"help": "Split the backbone over the processes of a machine."}
    )

    COUNTS: ClassVar[tuple[str, ...]] = (
        *CompiledTrainingArguments.COUNTS,
        "calibration_rows",
        "search_rows",
        "start_rows",
    )
    AMOUNTS: ClassVar[tuple[str, ...]] = (
        *CompiledTrainingArguments.AMOUNTS,
        "multiplier_learning_rate",
        "multiplier_init",
        "hardness",
        "distillation",
        "certainty",
    )

    def check_values(self) -> None:
        """Raise ConfigError for the first impossible value."""
        super().check_values()
        bias = self.full_bias
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not number or not math.isfinite(bias):
            raise ConfigError.mismatch("full_bias", "a finite number", f"{bias!r}")
        for name in ("hardness", "distillation", "certainty"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError.mismatch(name, "a number in [0, 1]", f"{value!r}")
        if self.regional and self.shard_backbone:
            raise ConfigError.mismatch("regional", "False with shard_backbone", True)
        if self.certainty and not self.distillation:
            raise ConfigError.mismatch("certainty", "0 without distillation", self.certainty)
        if self.start not in (None, GREEDY) and not isinstance(self.start, Mapping):
            raise ConfigError.mismatch(
                "start", f"None, {GREEDY!r} or routes by task", f"{self.start!r}"
            )
        self.temperatures()

    def temperatures(self) -> TemperatureSchedule:
        """The schedule of τ."""
        return TemperatureSchedule(
            self.temperature_start, self.temperature_end, self.temperature_anneal, self.max_steps
        )
