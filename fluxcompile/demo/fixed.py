"""One prompt under fixed routes: every layer's route, both answers, and the times."""

from rich.markup import escape
from rich.table import Table

import fluxcompile
from fluxcompile import smollm2
from fluxcompile.demo.session import Session
from fluxcompile.generation import Generation
from fluxcompile.long_prompt import long_prompt

# The first token compiles the prefill graph, the second the decode graph, the third shows that
# the decode graph is reused.
WARM_UP_TOKENS = 3


def run_fixed(session: Session) -> bool:
    """Answer eagerly, compile, answer again, check. See :func:`fluxcompile.demo.run_demo`."""
    settings, console = session.settings, session.console
    prompt = long_prompt(session.tokenizer, settings.tokens)
    console.print(
        f"[bold]prompt[/] {prompt.length} tokens of Python's help text, one fact hidden at token "
        f"{prompt.fact_at}"
    )
    console.print(f"[bold]routes[/] {settings.route_note}")
    config = fluxcompile.FluxConfig(sink=smollm2.STATIC_SINK, local=smollm2.STATIC_LOCAL)

    eager = session.answer(prompt, "eager: reading and answering")
    session.compile({"routes": settings.routes, "lowering": settings.lowering, "config": config})
    warm_up = session.answer(prompt, "flux: compiling prefill, then decode", WARM_UP_TOKENS)
    flux = session.answer(prompt, "flux: reading and answering")
    compile_seconds = warm_up.total - flux.seconds_for(WARM_UP_TOKENS)
    routes = fluxcompile.routes(session.model)

    # Equality does not depend on what lowers the graph, so the cheapest lowering checks it.
    session.compile({"routes": "full", "lowering": "eager"})
    pinned = session.answer(prompt, "routes pinned to full: compiling, reading and answering")

    if routes is not None:
        console.print(layer_table(routes, config, prompt.length))
    for name, generation in (("eager", eager), ("flux", flux)):
        text = session.text(generation)
        found = "[green]found[/]" if prompt.answered_by(text) else "[red]not found[/]"
        console.print(f"[bold]{name:<6}[/] {found}: {escape(text)}")
    console.print(times_table(eager, flux, compile_seconds))
    return session.report_pinned([(eager, pinned)])


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
