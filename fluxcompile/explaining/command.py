"""``fluxcompile explain``: a model and a prompt in, a table or a page out."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import typer
from rich.console import Console
from torch import nn

import fluxcompile
from fluxcompile import smollm2
from fluxcompile.atomic import write_all
from fluxcompile.config import FluxConfig
from fluxcompile.errors import FluxError, OptionError
from fluxcompile.explaining.prompt import PromptReport, explain_prompt
from fluxcompile.options import ROUTE_WORDS
from fluxcompile.packaged import packaged_routers
from fluxcompile.training.command import SMOLLM2, device_and_dtype, load_model

PACKAGED_ROUTER = "smollm2-135m"


@dataclass(frozen=True)
class ExplainSettings:
    """What ``fluxcompile explain`` takes.

    Attributes:
        model: ``"smollm2"``, or what ``AutoModelForCausalLM.from_pretrained`` takes.
        router: directory, packaged name or hub id.
        routes: ``"full"``, ``"sparse"``, ``"static"`` (smollm2's), or 0/1 a layer with commas.
        sink, local: of fixed routes; None: ``FluxConfig``'s.
        prompts: one row of the batch each; none: built-in text of ``tokens`` tokens.
        html: file of the page.
        repeats: runs that are timed for the page.
        device, dtype: the GPU if there is one, and bfloat16 on it, by default.
    """

    model: str = SMOLLM2
    router: str | None = None
    routes: str | None = None
    sink: int | None = None
    local: int | None = None
    prompts: Sequence[str] = ()
    tokens: int = 1024
    html: Path | None = None
    repeats: int = 3
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.router is not None and self.routes is not None:
            raise OptionError.mismatch("--routes", "none beside --router", repr(self.routes))
        if self.routes == "static" and self.model != SMOLLM2:
            raise OptionError.mismatch("--routes static", f"model {SMOLLM2!r}", repr(self.model))
        if self.html is not None and (
            self.html.is_dir() or not self.html.absolute().parent.is_dir()
        ):
            raise OptionError.mismatch(
                "--html", "a file in a folder there is", repr(str(self.html))
            )


def run_explain(settings: ExplainSettings, console: Console | None = None) -> PromptReport:
    """Run the prompt, print the table, and write the page if there is to be one.

    Raises:
        FluxError: whatever is wrong with model, router or settings.
    """
    console = console or Console(width=None if sys.stdout.isatty() else 160)  # files have room
    options, router, routed_by = routing(settings)
    device, dtype = device_and_dtype(settings.device, settings.dtype)
    model, tokenizer = load_model(settings.model, dtype)
    model = model.to(device).eval().requires_grad_(False)
    if router is not None:
        fluxcompile.attach(model, router)
    inputs = batch(model, tokenizer, settings)
    facts = facts_of(model, settings, inputs, f"{dtype} on {device}", routed_by)
    with _plain_errors():
        report = explain_prompt(
            model,
            options=options,
            repeats=settings.repeats if settings.html else 0,
            facts=facts,
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            **_last_logits(model),
        )
    console.print(report.layers)
    if report.routes is not None:
        console.print(str(report.routes), markup=False)
    if settings.html:
        write_all({settings.html: report.html().encode()})
        typer.echo(f"page: {settings.html}")
    return report


def _last_logits(model: nn.Module) -> dict[str, int]:
    """Nobody looks at the logits: of a long prompt they would be the largest tensor of all."""
    takes = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Our own errors as they are: Dynamo wraps what its backend raises."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, FluxError):
            raise error.inner_exception from error
        raise


def routing(settings: ExplainSettings) -> tuple[dict[str, Any], str | None, str]:
    """Options, the router to attach, and in words who routes."""
    if settings.router is not None:
        return {}, settings.router, f"the router in {settings.router}"
    sizes = {"sink": settings.sink, "local": settings.local}
    given = {name: value for name, value in sizes.items() if value is not None}
    if settings.routes is None and settings.model == SMOLLM2:
        if PACKAGED_ROUTER in packaged_routers() and not given:
            return {}, PACKAGED_ROUTER, f"the packaged router {PACKAGED_ROUTER}"
        return static(given)
    if settings.routes == "static":
        return static(given)
    if settings.routes is None:
        return {}, None, "nobody: no --router and no --routes"
    routes = settings.routes if settings.routes in ROUTE_WORDS else pattern(settings.routes)
    config = FluxConfig.from_dict(given)
    return {"routes": routes, "config": config}, None, in_words(settings.routes, config)


def static(given: dict[str, int]) -> tuple[dict[str, Any], None, str]:
    """SmolLM2's fixed pattern."""
    sizes = {"sink": smollm2.STATIC_SINK, "local": smollm2.STATIC_LOCAL} | given
    config = FluxConfig.from_dict(sizes)
    routes = smollm2.static_routes()
    return {"routes": routes, "config": config}, None, in_words("a fixed pattern", config)


def in_words(routes: str, config: FluxConfig) -> str:
    return f"{routes}; sparse is sink {config.sink} + local {config.local}"


def pattern(text: str) -> list[int]:
    """``"1,0,1"`` as a list."""
    try:
        return [{"0": 0, "1": 1}[entry.strip()] for entry in text.split(",")]
    except KeyError:
        known = '"full", "sparse", "static" or 0/1 a layer, comma-separated'
        raise OptionError.mismatch("--routes", known, repr(text)) from None


def batch(model: nn.Module, tokenizer: Any, settings: ExplainSettings) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` ``[prompts, tokens]``, padded on the left."""
    if tokenizer is None:
        if settings.prompts:
            raise OptionError.mismatch("--prompt", "a model with a tokenizer", "one without")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, settings.tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if settings.prompts:
        rows = [list(tokenizer(text).input_ids) for text in settings.prompts]
    else:
        rows = [built_in(tokenizer, settings.tokens)]
    if not all(rows):
        raise OptionError.mismatch("--prompt", "at least one token each", "an empty prompt")
    most = max(map(len, rows))
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([[padding] * (most - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def built_in(tokenizer: Any, tokens: int) -> list[int]:
    """So many tokens of Python's own help."""
    ids: list[int] = []
    for text in topics.values():
        ids += tokenizer(text).input_ids
        if len(ids) >= tokens:
            break
    return ids[:tokens]


def facts_of(
    model: nn.Module,
    settings: ExplainSettings,
    inputs: dict[str, torch.Tensor],
    where: str,
    routed_by: str,
) -> dict[str, str]:
    """What the page says of the run."""
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    versions = f"fluxcompile {fluxcompile.__version__}, torch {torch.__version__}"
    return {
        "model": f"{settings.model} ({type(model).__name__})",
        "run": where,
        "prompts": ", ".join(f"{length} tokens" for length in lengths),
        "routed by": routed_by,
        "versions": versions,
    }
