"""``fluxcompile demo``: a real model answers a long prompt, eager and compiled, side by side."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import fluxcompile
from fluxcompile import smollm2
from fluxcompile.errors import FluxError, OptionError
from fluxcompile.generation import Generation, greedy
from fluxcompile.long_prompt import LongPrompt, long_prompt

# The first token compiles the prefill graph, the second the decode graph, the third shows that
# the decode graph is reused.
WARM_UP_TOKENS = 3


@dataclass(frozen=True)
class DemoSettings:
    """What the command's options come down to.

    ``routes`` is what ``options={"routes": ...}`` takes; ``route_note`` says where it comes from.
    """

    tokens: int
    max_new_tokens: int
    routes: str | list[int]
    route_note: str
    router: Path | None
    lowering: str
    device: str
    dtype: torch.dtype

    @classmethod
    def create(
        cls,
        *,
        tokens: int,
        max_new_tokens: int,
        routes: str,
        router: Path | None,
        lowering: str,
        device: str | None,
        dtype: str | None,
    ) -> Self:
        """Fill in defaults and check what can be checked before the model is loaded.

        Raises:
            OptionError: routes that are not known, or a device that is not there.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise OptionError.mismatch("--device", "a device PyTorch can see", device)
        if device == "cpu" and lowering == "inductor" and not _has_cpp_compiler():
            raise FluxError(
                "Inductor needs a C++ compiler on a CPU and none is on PATH: install g++ (or "
                "clang++), or pass --lowering aot_eager"
            )
        if dtype is None:
            dtype = "float32" if device == "cpu" else "bfloat16"
        chosen, note = _choose_routes(routes, router)
        return cls(
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            routes=chosen,
            route_note=note,
            router=router,
            lowering=lowering,
            device=device,
            dtype=getattr(torch, dtype),
        )


def run_demo(settings: DemoSettings, console: Console | None = None) -> bool:
    """Load, answer eagerly, compile, answer again, check. Prints everything as it goes.

    Returns whether routes pinned to full gave the tokens of eager. In half precision a different
    but equally good rounding may change a token, so there only the report counts: True.
    """
    console = console or Console()
    started = time.perf_counter()
    model, prompt, tokenizer = _load(settings, console)
    config = fluxcompile.FluxConfig(sink=smollm2.STATIC_SINK, local=smollm2.STATIC_LOCAL)
    console.print(f"[bold]routes[/] {settings.route_note}")

    answers: dict[str, Answer] = {}

    def answer(name: str) -> Answer:
        answers[name] = Answer.of(name, model, prompt, settings.max_new_tokens, console)
        return answers[name]

    answer("eager")
    options = {"routes": settings.routes, "lowering": settings.lowering}
    if settings.routes == "router":
        if settings.router is None:
            fluxcompile.attach(model, fluxcompile.FluxRouter.from_model(model, config))
        else:
            fluxcompile.attach(model, settings.router)
    else:
        options["config"] = config
    compile_flux(model, options)
    answer("flux")
    console.print(layer_table(fluxcompile.routes(model)))

    # Equality does not depend on what lowers the graph, so the cheapest lowering checks it.
    compile_flux(model, {"routes": "full", "lowering": "eager"})
    answer("flux, all full")

    console.print(times_table(answers.values(), tokenizer, prompt))
    agreed = _print_agreement(answers, settings, console)
    console.print(f"[dim]the whole demo: {time.perf_counter() - started:.0f} s[/]")
    return agreed or settings.dtype != torch.float32


@dataclass(frozen=True)
class Answer:
    """One way of running the model: its generation, and the seconds compiling came on top."""

    name: str
    generation: Generation
    compile_seconds: float | None

    @classmethod
    def of(
        cls,
        name: str,
        model: PreTrainedModel,
        prompt: LongPrompt,
        max_new_tokens: int,
        console: Console,
    ) -> Self:
        """Generate once; where the model is compiled, after a short run that compiles it."""
        compile_seconds = None
        if model._compiled_call_impl is not None:
            with ticking(console, f"{name}: compiling prefill", WARM_UP_TOKENS) as tick:
                first = _generate(model, prompt, WARM_UP_TOKENS, tick, f"{name}: compiling decode")
            compile_seconds = first.total
        with ticking(console, f"{name}: reading the prompt", max_new_tokens) as tick:
            generation = _generate(model, prompt, max_new_tokens, tick, f"{name}: answering")
        if compile_seconds is not None:
            steps = WARM_UP_TOKENS - 1
            compile_seconds -= generation.prefill + steps * generation.decode_per_token
        return cls(name, generation, compile_seconds)


def compile_flux(model: PreTrainedModel, options: dict) -> None:
    """Forget what was compiled before and compile anew on the next call.

    ``dynamic=True``: lengths are symbols from the start, so one prefill and one decode graph
    serve every length; otherwise the second decode step would compile again.
    """
    torch._dynamo.reset()
    model.compile(backend="flux", dynamic=True, options=options)


def layer_table(routes: fluxcompile.Routes) -> Table:
    """One line an attention layer of the last prompt's first row."""
    table = Table(title=f"{len(routes.layer_names)} layers, Ω = {routes.omega:.2f} of them sparse")
    table.add_column("layer")
    table.add_column("route")
    for name, full in zip(routes.layer_names, routes.fa[0].tolist(), strict=True):
        table.add_row(name, "[bold]full[/]" if full else "[cyan]sparse[/]")
    return table


def times_table(answers, tokenizer, prompt: LongPrompt) -> Table:
    """Times and answers, a line a way of running."""
    table = Table(title=f"a prompt of {prompt.length} tokens, the fact at token {prompt.fact_at}")
    for header, justify in (
        ("", "left"),
        ("compile s", "right"),
        ("prefill s", "right"),
        ("decode ms/token", "right"),
        ("new tokens", "right"),
        ("found", "center"),
        ("answer", "left"),
    ):
        table.add_column(header, justify=justify)
    for answer in answers:
        run = answer.generation
        text = tokenizer.decode(run.tokens, skip_special_tokens=True).strip()
        table.add_row(
            answer.name,
            "—" if answer.compile_seconds is None else f"{answer.compile_seconds:.1f}",
            f"{run.prefill:.2f}",
            f"{1000 * run.decode_per_token:.0f}",
            str(len(run.tokens)),
            "[green]✓[/]" if prompt.answered_by(text) else "[red]✗[/]",
            text,
        )
    return table


@contextmanager
def ticking(console: Console, label: str, total: int) -> Iterator:
    """A progress bar whose clock goes on while one long call runs; yields an update function."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)

        def update(done: int, description: str) -> None:
            progress.update(task, completed=done, description=description)

        yield update


def _load(settings: DemoSettings, console: Console):
    transformers_logging.disable_progress_bar()
    with ticking(console, "loading SmolLM2-135M-Instruct", 1):
        model, tokenizer = smollm2.load(settings.device, settings.dtype)
        prompt = long_prompt(tokenizer, settings.tokens).to(settings.device)
    dtype = str(settings.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if settings.device == "cpu" else ""
    console.print(
        f"[bold]model[/]  SmolLM2-135M-Instruct, {dtype} on {settings.device}{threads}, "
        f"lowered by {settings.lowering}"
    )
    console.print(
        f"[bold]prompt[/] {prompt.length} tokens of Python's help texts, one fact hidden at token "
        f"{prompt.fact_at}"
    )
    return model, prompt, tokenizer


def _generate(model, prompt: LongPrompt, max_new_tokens: int, tick, description: str) -> Generation:
    return greedy(
        model,
        prompt.input_ids,
        prompt.attention_mask,
        max_new_tokens,
        on_token=lambda done: tick(done, description),
    )


def _print_agreement(answers: dict[str, Answer], settings: DemoSettings, console: Console) -> bool:
    expected = answers["eager"].generation.tokens
    got = answers["flux, all full"].generation.tokens
    if got == expected:
        console.print("routes pinned to full: [green]the same text as eager[/]")
        return True
    pairs = enumerate(zip(expected, got, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(got)))
    console.print(f"routes pinned to full: [red]differs from eager[/] at new token {first}")
    return False


def _choose_routes(routes: str, router: Path | None) -> tuple[str | list[int], str]:
    if router is not None:
        if routes not in ("static", "router"):
            raise OptionError.mismatch("--routes", '"router" beside --router', f"{routes!r}")
        return "router", f"decided by the trained router in {router}"
    if routes == "static":
        pattern = smollm2.static_routes()
        dense = ", ".join(str(i) for i, full in enumerate(pattern) if full)
        return pattern, (
            f"a fixed pattern, as no trained router is given: layers {dense} full, the others "
            f"{smollm2.STATIC_SINK} sink + {smollm2.STATIC_LOCAL} local tokens"
        )
    if routes == "router":
        return routes, "decided by an untrained router (full attention everywhere)"
    if routes in ("full", "sparse"):
        return routes, f"every layer {routes}"
    try:
        pattern = [{"0": 0, "1": 1}[entry.strip()] for entry in routes.split(",")]
    except KeyError:
        known = '"static", "router", "full", "sparse" or 0/1 a layer, comma-separated'
        raise OptionError.mismatch("--routes", known, f"{routes!r}") from None
    return pattern, f"as given, {pattern.count(1)} of {len(pattern)} layers full"


def _has_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
