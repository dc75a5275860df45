"""``fluxcompile train``, ``retarget``, ``convert``: paths and words in, a router's folder out."""

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxcompile import router_io
from fluxcompile.atomic import write_all
from fluxcompile.config import FluxConfig
from fluxcompile.errors import ConfigError, DataError, OptionError, TrainingError
from fluxcompile.packaged import packaged_directory
from fluxcompile.router import FluxRouter

SMOLLM2 = "smollm2"
BUILT_IN = "builtin"
_BIASED = """
After training, {bias:+g} was added to every layer's logit of full attention.
"""
_RETARGETED = """
After training, the layers that stay full were searched for each task, and a threshold chosen for
each layer, on {rows}, towards these shares of sparse attention:

| task | wanted | reached there |
|---|---|---|
{lines}
"""
_MIXTURE = {"length", "seed", "tasks", "question", "style", "loss", "lead"}


def train(
    model: str,
    *,
    data: str,
    output: Path,
    length: int,
    examples: int | None,
    sink: int,
    local: int,
    dtype: str | None,
    cpu: bool,
    tasks: Sequence[str],
    config: Sequence[str] = (),
    mixture: Sequence[str] = (),
    settings: Sequence[str] = (),
    **arguments: Any,
) -> FluxRouter:
    """Load model and data, and train.

    Args:
        model: ``"smollm2"``, or what ``AutoModelForCausalLM.from_pretrained`` takes.
        data: ``"builtin"``, or a file with one JSON object a line.
        output: directory of the router and its checkpoints.
        length: tokens of a built-in example.
        examples: number of built-in examples; None: two steps' worth, 64 at least.
        sink, local: of the sparse attention.
        dtype: of the model; None: bfloat16 on a GPU, float32 on a CPU.
        cpu: train on the CPU even if there is a GPU.
        tasks: ``"name=target"`` each.
        config: ``"name=value"`` each, for any other field of ``FluxConfig``; values here and below
            are JSON, or plain words.
        mixture: ``"name=value"`` each, for any other argument of ``builtin_mixture``, or several
            lengths in place of the one.
        settings: ``"name=value"`` each, for any other training argument.
        arguments: training arguments; those that are None are left out.

    Raises:
        FluxError: whatever is wrong with any of them.
    """
    from fluxcompile.training.train import train_router

    known = {name: value for name, value in arguments.items() if value is not None}
    known |= _pairs("--set", settings)
    targets = _pairs("--task", tasks)
    fields = {"sink": sink, "local": local} | _pairs("--config", config)
    count = examples or max(64, 2 * known.get("batch_size", 48))
    given = _pairs("--mixture", mixture)
    recipe = {"seed": known.get("seed", 0), "examples": count, "length": length} | given
    flux_config = FluxConfig.from_dict(fields)
    _check_data(data, given)
    cpu = cpu or not torch.cuda.is_available()
    card = {}
    if model == SMOLLM2:
        from fluxcompile import smollm2

        card["trained_against"] = smollm2.WEIGHTS
    loaded, tokenizer = load_model(model, dtype or ("float32" if cpu else "bfloat16"))
    rows, card["trained_on"] = _rows(data, recipe, model, tokenizer)
    return train_router(
        loaded,
        rows,
        tokenizer=tokenizer,
        tasks=targets or None,
        config=flux_config,
        output_dir=output,
        model_card_kwargs=card,
        **{"use_cpu": cpu} | known,
    )


def retarget(
    source: Path,
    output: Path,
    *,
    model: str,
    tasks: Sequence[str],
    data: str,
    length: int,
    examples: int,
    seed: int,
    batch: int,
    mixture: Sequence[str],
    lowering: str,
    regional: bool,
    device: str | None,
    dtype: str | None,
    report: Callable[[str], None],
) -> dict[str, float]:
    """Save the router of ``source``, moved to other shares of sparse attention.

    Args:
        source: a saved router, or a packaged one's name.
        output: directory of the new router; its card is that of ``source``, and says what changed.
        model, data, length, mixture, tasks: as :func:`train` takes them.
        examples, seed: of a built-in mixture.
        batch: examples at once.
        lowering, regional, report: see :func:`fluxcompile.training.retarget_router`.
        device: None: a GPU if there is one.
        dtype: of the model; None: bfloat16 on a GPU, float32 on a CPU.

    Returns:
        The share of sparse attention that it reaches, by task.

    Raises:
        FluxError: whatever is wrong with any of them.
    """
    from fluxcompile.training.retarget import retarget_router

    targets = _pairs("--task", tasks)
    if not targets:
        raise ConfigError.mismatch("--task", "NAME=SHARE at least once", "none")
    given = _pairs("--mixture", mixture)
    _check_data(data, given)
    recipe = {"seed": seed, "examples": examples, "length": length} | given
    router = FluxRouter.from_pretrained(source)
    device, dtype = device_and_dtype(device, dtype)
    loaded, tokenizer = load_model(model, dtype)
    rows, words = _rows(data, recipe, model, tokenizer)
    moved, reached = retarget_router(
        loaded.to(device),
        router,
        rows,
        tasks=targets,
        tokenizer=tokenizer,
        batch_size=batch,
        lowering=lowering,
        regional=regional,
        report=report,
    )
    lines = "\n".join(
        f"| {name} | {targets[name]} | {share:.3f} |" for name, share in reached.items()
    )
    _save(moved, source, output, said=_RETARGETED.format(rows=words, lines=lines))
    return reached


def convert(source: Path, output: Path, dtype: str = "float32", bias: float = 0.0) -> FluxRouter:
    """Save the routers of a published Flux Attention checkpoint, or a saved router, in ``dtype``.

    A saved router keeps its model card, and its checkpoints of training are left behind. The card
    says a ``bias``.

    Args:
        source: directory of either.
        output: directory of the router.
        dtype: of the stored weights, see :meth:`FluxRouter.save_pretrained`.
        bias: towards full attention, see :meth:`FluxRouter.biased`.

    Raises:
        RouterError: ``source`` is neither, or its routers are incomplete; or an impossible bias.
    """
    saved = router_io.is_saved_router(source)
    load = FluxRouter.from_pretrained if saved else FluxRouter.from_fluxattention
    router = load(source).biased(bias)
    _save(router, source, output, dtype, _BIASED.format(bias=bias) if bias else "")
    return router


def _save(
    router: FluxRouter, source: Path, output: Path, dtype: str = "float32", said: str = ""
) -> None:
    """Save what the router of ``source`` became; its card, or a new one, goes on with ``said``."""
    folder = source if source.is_dir() else packaged_directory(source)
    kept = None
    if folder is not None and router_io.is_saved_router(folder):
        file = folder / router_io.CARD_FILE
        kept = file.read_bytes() if file.is_file() else None
    router.save_pretrained(output, dtype=getattr(torch, dtype))  # with a card if there is none
    card = output / router_io.CARD_FILE
    text = card.read_bytes() if kept is None else kept
    if kept is not None or not text.endswith(said.encode()):
        write_all({card: text + said.encode()})


def _check_data(data: str, mixture: Mapping[str, Any]) -> None:
    """Refuse what cannot be had, before a model is loaded for it."""
    if unknown := sorted(set(mixture) - _MIXTURE):
        raise ConfigError.mismatch("--mixture", f"any of {sorted(_MIXTURE)}", unknown)
    if data != BUILT_IN and not Path(data).is_file():
        raise DataError.mismatch("--data", f"{BUILT_IN!r} or a JSONL file", repr(data))


def _rows(
    data: str, recipe: Mapping[str, Any], model: str, tokenizer: Any
) -> tuple[Iterable[Mapping[str, Any]], str]:
    """The examples, and what they are, in Markdown."""
    if data != BUILT_IN:
        return read_jsonl(Path(data)), f"rows of `{Path(data).name}`"
    from fluxcompile.training.data import builtin_mixture

    if tokenizer is None:
        raise TrainingError.mismatch(f"model {model!r}", "one with a tokenizer", "none")
    words = ", ".join(f"{name}={value!r}" for name, value in recipe.items())
    said = f"`builtin_mixture({words})` of Python {platform.python_version()}"
    return builtin_mixture(tokenizer, **recipe), said


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """One JSON object a line; blank lines are skipped.

    Raises:
        DataError: a line is something else; the message has its number.
    """
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError.mismatch(
                    f"{file}:{number}", "a JSON object", f"bad JSON ({error})"
                ) from error
            if not isinstance(row, Mapping):
                raise DataError.mismatch(f"{file}:{number}", "a JSON object", type(row).__name__)
            rows.append(row)
    return rows


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, str]:
    """A GPU where there is one, and bfloat16 on it, float32 elsewhere, unless something is asked.

    Raises:
        OptionError: a GPU is asked for and there is none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError.mismatch("--device", "a machine with a GPU", f"{device} on one without")
    return device, dtype or ("bfloat16" if device.startswith("cuda") else "float32")


def load_model(name: str, dtype: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer (None if there is none) of ``"smollm2"``, a directory or a Hub id."""
    if name == SMOLLM2:
        from fluxcompile import smollm2

        return smollm2.load(dtype=getattr(torch, dtype))
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise TrainingError.mismatch(
            f"model {name!r}", f"{SMOLLM2!r}, a directory, or a model on the Hub", error
        ) from error
    return model, _tokenizer(name)


def _tokenizer(name: str) -> Any:
    """The model's tokenizer; None if it has none, which data of token ids does not need."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def _pairs(option: str, given: Sequence[str]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError.mismatch(option, "NAME=VALUE", repr(text))
        try:
            pairs[name] = json.loads(value)
        except ValueError:
            pairs[name] = value
    return pairs
