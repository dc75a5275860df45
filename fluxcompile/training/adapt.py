"""``adapt_backbone``: let the model get used to its routes (arXiv 2604.07394, §5.3)."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fluxcompile.errors import ConfigError, TrainingError
from fluxcompile.model_layers import unwrap
from fluxcompile.router import FluxRouter
from fluxcompile.training import backbone, checkpoint
from fluxcompile.training.adaptation import AdaptationTrainer, Adapted
from fluxcompile.training.compiled_arguments import CompiledTrainingArguments
from fluxcompile.training.language_model import LanguageModel
from fluxcompile.training.patterns import check_served
from fluxcompile.training.processes import barrier
from fluxcompile.training.tasks import resolve_tasks
from fluxcompile.training.train import collator_for, prepare_examples


def adapt_backbone(
    model: nn.Module,
    router: FluxRouter,
    data: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    tasks: Mapping[str, float | str] | None = None,
    peft_config: Any = None,
    output_dir: str | Path | None = None,
    **training_arguments: Any,
) -> nn.Module:
    """Fine-tune ``model`` on the language-model loss with ``router``'s hard routes in place.

    The routes are the ones of inference, decided by argmax and without gradient; the router does
    not change. The loss is the mean over rows of each row's mean over its targets, as in
    :func:`fluxcompile.train_router`.

    Args:
        model: a causal language model, changed in place. Without ``peft_config`` the parameters
            that require grad are trained.
        router: trained for ``model``.
        data: as :func:`fluxcompile.train_router` takes it.
        tokenizer: for data that is text.
        tasks: as :func:`fluxcompile.train_router` takes them; targets do not matter here.
        peft_config: of the ``peft`` library: only an adapter is trained. Needs the ``peft`` extra.
        output_dir: checkpoints go there, and the adapted model, or its adapter, by
            ``save_pretrained``. None keeps nothing on disk.
        training_arguments: see :class:`fluxcompile.training.CompiledTrainingArguments`; learning
            rate, schedule and optimiser are transformers' own.

    Returns:
        ``model``, or the ``PeftModel`` around it, in eval mode on the device that trained.

    Raises:
        ConfigError: an unknown or impossible argument, sparse attention without a gradient, or
            ``peft`` is not installed.
        DataError: data that cannot be trained on.
        RouterError: ``router`` belongs to another model.
        RewriteError: an attention that the compiler cannot train through, and why.
        TrainingError: ``model`` cannot be trained as it is, or a loss is NaN.
    """
    model = unwrap(model)
    backbone.check_trainable(model)
    router.check_model(model)
    check_served(router.config)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = CompiledTrainingArguments.of_run(training_arguments, output_dir, scratch)
        known = resolve_tasks(tasks)
        examples = prepare_examples(model, router.config, data, tokenizer, known, arguments)
        names = [name for name in known if name in {example.task for example in examples}]
        trained = model if peft_config is None else _with_adapter(model, peft_config)
        if not any(parameter.requires_grad for parameter in trained.parameters()):
            raise TrainingError.mismatch("model", "parameters that require grad", "none")
        router = router.eval()
        with backbone.attached(model, router), backbone.frozen(router):
            first = examples[0].input_ids[None].to(next(model.parameters()).device)
            language_model = LanguageModel.of(model).checked(model, first)
            adapted = Adapted(
                trained,
                router,
                language_model=language_model,
                run=backbone.compiled(
                    language_model.body,
                    router,
                    routes="locked",
                    lowering=arguments.lowering,
                    inductor=arguments.inductor,
                ),
                logits_chunk=arguments.logits_chunk,
            )
            collator = collator_for(model, {name: known[name] for name in names})
            trainer = AdaptationTrainer(adapted, arguments, examples, names, collator)
            resume = checkpoint.resolve(arguments.resume_from_checkpoint, arguments.output_dir)
            with backbone.compiler_settings(arguments.activation_memory_budget):
                trainer.train(resume_from_checkpoint=resume)
        if output_dir is not None and trainer.args.should_save:
            trained.save_pretrained(output_dir)
        barrier()  # whoever returns finds the model in place
    return trained.eval()


def _with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ConfigError.mismatch(
            "peft_config", 'None, or peft installed (pip install "fluxcompile[peft]")', "no peft"
        ) from error
    return get_peft_model(model, peft_config)
