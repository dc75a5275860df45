"""``fluxcompile demo``: a real model answers a long prompt, eager and compiled, side by side."""

import io
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

import fluxcompile
from fluxcompile import smollm2
from fluxcompile.errors import FluxError, OptionError
from fluxcompile.generation import Generation, greedy
from fluxcompile.long_prompt import long_prompt

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


# With symbolic lengths Dynamo makes every float attribute (a norm's epsilon) symbolic too, finds
# that it cannot be, and traces each graph a second time. They never change here.
@torch._dynamo.config.patch(specialize_float=True)
def run_demo(settings: DemoSettings, console: Console | None = None) -> bool:
    """Load, answer eagerly, compile, answer again, check. Prints everything as it goes.

    Returns whether routes pinned to full gave the tokens of eager. In half precision a different
    but equally good rounding may change a token, so there only the report counts: True.
    """
    console = console or Console()
    started = time.perf_counter()
    model, tokenizer, prompt = _load(settings, console)
    config = fluxcompile.FluxConfig(sink=smollm2.STATIC_SINK, local=smollm2.STATIC_LOCAL)

    def answer(label: str, max_new_tokens: int = settings.max_new_tokens) -> Generation:
        cache = DynamicCache(config=model.config)
        with ticking(console, label, max_new_tokens) as tick:

            def on_token(done: int) -> None:
                tick(done)
                if done == 1:
                    say_that_it_grows(cache)

            return greedy(
                *(model, prompt.input_ids, prompt.attention_mask, max_new_tokens),
                on_token=on_token,
                past_key_values=cache,
            )

    eager = answer("eager: reading and answering")
    options = {"routes": settings.routes, "lowering": settings.lowering}
    if settings.routes == "router":
        router = settings.router or fluxcompile.FluxRouter.from_model(model, config)
        config = fluxcompile.attach(model, router).router.config
    else:
        options["config"] = config
    compile_flux(model, options)
    warm_up = answer("flux: compiling prefill, then decode", WARM_UP_TOKENS)
    flux = answer("flux: reading and answering")
    compile_seconds = warm_up.total - flux.seconds_for(WARM_UP_TOKENS)
    routes = fluxcompile.routes(model)

    # Equality does not depend on what lowers the graph, so the cheapest lowering checks it.
    compile_flux(model, {"routes": "full", "lowering": "eager"})
    pinned = answer("routes pinned to full: compiling, reading and answering")

    if routes is not None:
        console.print(layer_table(routes, config, prompt.length))
    for name, generation in (("eager", eager), ("flux", flux)):
        text = tokenizer.decode(generation.tokens, skip_special_tokens=True).strip()
        found = "[green]found[/]" if prompt.answered_by(text) else "[red]not found[/]"
        console.print(f"[bold]{name:<6}[/] {found}: {text}")
    console.print(times_table(eager, flux, compile_seconds))
    agreed = _print_agreement(eager, pinned, console)
    console.print(f"[dim]the whole demo: {time.perf_counter() - started:.0f} s[/]")
    return agreed or settings.dtype != torch.float32


def compile_flux(model: PreTrainedModel, options: dict) -> None:
    """Forget what was compiled before and compile anew on the next call."""
    torch._dynamo.reset()
    model.compile(backend="flux", options=options)


def say_that_it_grows(cache: DynamicCache) -> None:
    """The next graph takes the cache's length as a symbol: one decode graph serves every step.

    Dynamo would find out by itself, at the price of compiling the second decode step again.
    """
    for layer in cache.layers:
        for buffer in (layer.keys, layer.values):
            torch._dynamo.maybe_mark_dynamic(buffer, 2)


def layer_table(routes: fluxcompile.Routes, config: fluxcompile.FluxConfig, length: int) -> Table:
    """One line an attention layer: the route of the first row of the batch of the last prompt."""
    table = Table(title=f"{len(routes.layer_names)} layers, Ω = {routes.omega:.2f} of them sparse")
    table.add_column("layer")
    table.add_column("route")
    table.add_column("keys the last token reads", justify="right")
    sparse_keys = min(length, config.sink + config.local)
    for name, full in zip(routes.layer_names, routes.fa[0].tolist(), strict=True):
        route = "[bold]full[/]" if full else "[cyan]sparse[/]"
        table.add_row(name, route, str(length if full else sparse_keys))
    return table


def times_table(eager: Generation, flux: Generation, compile_seconds: float) -> Table:
    """Eager beside flux; compiling stands apart, as it happens once."""
    table = Table(title="greedy generation, batch 1")
    for header in ("", "compile s", "prefill s", "decode ms/token", "new tokens"):
        table.add_column(header, justify="right" if header else "left")
    for name, run, compiling in (("eager", eager, None), ("flux", flux, compile_seconds)):
        table.add_row(
            name,
            "—" if compiling is None else f"{compiling:.1f}",
            f"{run.prefill:.2f}",
            f"{1000 * run.decode_per_token:.0f}",
            str(len(run.tokens)),
        )
    return table


@contextmanager
def ticking(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar whose clock goes on while one long call runs; yields its setter."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)


def _load(settings: DemoSettings, console: Console):
    # The loaders' own bars go to stderr, and would run through this one.
    with ticking(console, "loading SmolLM2-135M-Instruct", 1), redirect_stderr(io.StringIO()):
        model, tokenizer = smollm2.load(settings.device, settings.dtype)
        prompt = long_prompt(tokenizer, settings.tokens).to(settings.device)
    dtype = str(settings.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if settings.device == "cpu" else ""
    console.print(
        f"[bold]model[/]  SmolLM2-135M-Instruct, {dtype} on {settings.device}{threads}, "
        f"lowered by {settings.lowering}"
    )
    console.print(
        f"[bold]prompt[/] {prompt.length} tokens of Python's help text, one fact hidden at token "
        f"{prompt.fact_at}"
    )
    console.print(f"[bold]routes[/] {settings.route_note}")
    return model, tokenizer, prompt


def _print_agreement(eager: Generation, pinned: Generation, console: Console) -> bool:
    if pinned.tokens == eager.tokens:
        console.print("routes pinned to full: [green]the same text as eager[/]")
        return True
    pairs = enumerate(zip(eager.tokens, pinned.tokens, strict=False))
    shorter = min(len(eager.tokens), len(pinned.tokens))
    first = next((i for i, (a, b) in pairs if a != b), shorter)
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
