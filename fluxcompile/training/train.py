"""``train_router``: from a model and examples to a trained router (arXiv 2604.07394)."""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import set_seed

from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError
from fluxcompile.layer_router import FULL
from fluxcompile.model_layers import text_config, unwrap
from fluxcompile.router import FluxRouter
from fluxcompile.training import backbone, checkpoint
from fluxcompile.training.arguments import RouterTrainingArguments
from fluxcompile.training.batching import collate
from fluxcompile.training.calibration import is_calibrated
from fluxcompile.training.compiled_arguments import CompiledTrainingArguments
from fluxcompile.training.examples import Example
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.multipliers import Multipliers
from fluxcompile.training.patterns import check_served
from fluxcompile.training.processes import barrier
from fluxcompile.training.record import write_card
from fluxcompile.training.sharding import sharded
from fluxcompile.training.start import check_start
from fluxcompile.training.tasks import Task, resolve_tasks
from fluxcompile.training.trainee import Trainee
from fluxcompile.training.trainer import RouterTrainer


def train_router(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    tasks: Mapping[str, float | str] | None = None,
    config: FluxConfig | None = None,
    router: FluxRouter | None = None,
    output_dir: str | Path | None = None,
    model_card_kwargs: Mapping[str, Any] | None = None,
    **training_arguments: Any,
) -> FluxRouter:
    """Train layer routers for ``model``, whose own weights stay as they are.

    One process or many: under ``torchrun`` or ``accelerate launch`` every process calls this with
    the same arguments, and the router is the one that a single process would have trained. With
    ``shard_backbone`` the processes of a machine split the backbone, which otherwise each holds.

    Args:
        model: a causal language model. It is moved to the device that trains, and otherwise left
            as it was found: gradients, train or eval mode, what is attached.
        data: what :func:`fluxcompile.training.prepare` takes.
        tokenizer: for data that is text.
        tasks: what :func:`fluxcompile.training.resolve_tasks` takes: target sparsities by task.
        config: settings of the routed attention, for a new router.
        router: go on training this one, in place; it has its own config.
        output_dir: checkpoints and the finished router go there. None keeps nothing on disk.
        model_card_kwargs: more values for the template of the router's card, ``trained_on`` say:
            see :mod:`fluxcompile.model_card`.
        training_arguments: see :class:`fluxcompile.training.RouterTrainingArguments`, whose
            defaults are the paper's.

    Returns:
        The router, on the CPU and in eval mode, not attached.

    Raises:
        ConfigError: an unknown or impossible argument, or sparse attention without a gradient.
        DataError: data that cannot be trained on.
        RouterError: ``router`` belongs to another model, or ``model`` has no attention layers.
        RewriteError: an attention that the compiler cannot route, and why.
        TrainingError: the model cannot be trained as it is; a checkpoint is of another run; a
            loss is NaN (step, task and examples are named); or the backbone changed.
    """
    model = unwrap(model)
    backbone.check_trainable(model)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = RouterTrainingArguments.of_run(training_arguments, output_dir, scratch)
        router = _router(model, config, router, arguments)
        check_served(router.config)
        known = resolve_tasks(tasks)
        examples = prepare_examples(model, router.config, data, tokenizer, known, arguments)
        used = {example.task for example in examples}
        present = {name: task for name, task in known.items() if name in used}
        check_start(arguments.start, present, len(router.layer_names))
        settings = arguments.to_dict()
        with contextlib.ExitStack() as stack:
            stack.enter_context(backbone.frozen(model))
            ids = examples[0].input_ids[None].to(next(model.parameters()).device)
            language_model = LanguageModel.of(model).checked(model, ids)
            if arguments.shard_backbone:
                stack.enter_context(sharded(model, language_model.body, arguments.device))
            stack.enter_context(backbone.attached(model, router))  # to the weights that will run
            trainer = _trainer(model, language_model, router, examples, present, arguments)
            resume = checkpoint.resolve(arguments.resume_from_checkpoint, arguments.output_dir)
            stack.enter_context(backbone.compiler_settings(arguments.activation_memory_budget))
            with backbone.unchanged(model, same_everywhere=not arguments.shard_backbone):
                if resume is None:
                    if router.config.standardize and not is_calibrated(router):
                        trainer.calibrate(arguments.calibration_rows)
                    if arguments.start is not None:
                        settings["start"] = trainer.start()
                trainer.train(resume_from_checkpoint=resume)
        router.cpu().eval().requires_grad_(True)
        if output_dir is not None and trainer.args.should_save:
            write_card(
                *(router, Path(output_dir), present, settings, trainer.state, len(examples)),
                model_card_kwargs,
            )
        barrier()  # whoever returns finds the router in place
    return router


def _router(
    model: nn.Module,
    config: FluxConfig | None,
    router: FluxRouter | None,
    arguments: RouterTrainingArguments,
) -> FluxRouter:
    if router is None:
        if arguments.start is not None and not (config or FluxConfig()).standardize:
            raise ConfigError.mismatch("start", "a config with standardize=True", f"{config}")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            set_seed(arguments.seed)  # the same new router in every process
            router = FluxRouter.from_model(model, config)
            for layer in router.layers:
                layer.head[-1].bias[FULL] = arguments.full_bias
            return router
    if config is not None and config != router.config:
        raise ConfigError.mismatch("config", "None, or that of router", f"{config}")
    if arguments.start is not None:
        raise ConfigError.mismatch("start", "None where router is given", f"{arguments.start!r}")
    router.check_model(model)
    return router


def prepare_examples(
    model: nn.Module,
    config: FluxConfig,
    data: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    tasks: Mapping[str, Task],
    arguments: CompiledTrainingArguments,
) -> list[Example]:
    """Examples of a length that ``arguments`` allow and ``model`` can take.

    Raises:
        DataError: data that cannot be trained on.
    """
    shortest = arguments.min_length
    if shortest is None:
        shortest = config.sink + config.local + 1
    return backbone.examples_for(model, data, tokenizer, tasks, shortest, arguments.max_length)


def collator_for(
    model: nn.Module, tasks: Mapping[str, Task]
) -> Callable[[Sequence[Example]], dict[str, torch.Tensor]]:
    """Examples of ``tasks`` to a batch, padded as ``model`` pads."""
    pad = getattr(text_config(model), "pad_token_id", None)
    return partial(collate, pad_token_id=pad if isinstance(pad, int) else 0, tasks=tasks)


def _trainer(
    model: nn.Module,
    language_model: LanguageModel,
    router: FluxRouter,
    examples: list[Example],
    tasks: Mapping[str, Task],
    arguments: RouterTrainingArguments,
) -> RouterTrainer:
    trainee = Trainee(
        model,
        router.train().requires_grad_(True),
        Multipliers([task.target for task in tasks.values()], arguments.multiplier_init),
        language_model=language_model,
        run=backbone.running(
            *(model, language_model.body, router),
            regional=arguments.regional,
            lowering=arguments.lowering,
            inductor=arguments.inductor,
        ),
        logits_chunk=arguments.logits_chunk,
    )
    return RouterTrainer(trainee, arguments, examples, list(tasks), collator_for(model, tasks))
