"""Two prompts under one router: what each is routed to, and that the answers hold."""

from dataclasses import dataclass

from rich.markup import escape

import fluxcompile
from fluxcompile import FluxRouter, smollm2
from fluxcompile.demo.prompts import RoutedPrompt, routed_prompts
from fluxcompile.demo.session import Session, first_difference
from fluxcompile.generation import Generation

_GROUP = 5  # layers that the strip of routes writes together


@dataclass(frozen=True)
class Routed:
    """What became of one prompt.

    Attributes:
        prompt: it.
        routes: the router's, of one row.
        eager: the model's answer as it is.
        flux: its answer, compiled and routed.
        pinned: its answer, compiled with every route full.
    """

    prompt: RoutedPrompt
    routes: fluxcompile.Routes
    eager: Generation
    flux: Generation
    pinned: Generation


def run_routed(session: Session) -> bool:
    """Answer, print both prompts and compare. See :func:`fluxcompile.demo.run_demo`."""
    console = session.console
    console.print(f"[bold]routes[/] {session.settings.route_note}")
    outcomes = answer_both(session)
    for outcome in outcomes:
        report(session, outcome)
    console.print(difference(*outcomes), highlight=False)
    return session.report_pinned([(outcome.eager, outcome.pinned) for outcome in outcomes])


def answer_both(session: Session) -> list[Routed]:
    """Answer the two prompts eagerly, compiled under the router, and with routes pinned to full."""
    settings, model = session.settings, session.model
    prompts = routed_prompts(session.tokenizer, settings.tokens, settings.seed)
    eager = [session.answer(prompt, f"eager: {prompt.name}") for prompt in prompts]
    fluxcompile.attach(model, _router(session))
    session.compile({"routes": "router", "lowering": settings.lowering})
    flux, routes = [], []
    for prompt in prompts:
        flux.append(session.answer(prompt, f"flux: compiling at first; {prompt.name}"))
        routes.append(fluxcompile.routes(model))
    # Equality does not depend on what lowers the graph, so the cheapest lowering checks it.
    session.compile({"routes": "full", "lowering": "eager"})
    pinned = [session.answer(prompt, f"routes pinned to full: {prompt.name}") for prompt in prompts]
    return [Routed(*outcome) for outcome in zip(prompts, routes, eager, flux, pinned, strict=True)]


def report(session: Session, outcome: Routed) -> None:
    """Print a prompt, its routes and both answers."""
    console, prompt = session.console, outcome.prompt
    console.print(
        f"\n[bold]{prompt.name}[/], {prompt.length} tokens: {prompt.what}", highlight=False
    )
    letters = strip(outcome.routes.fa[0].tolist())
    console.print(f"  Ω {outcome.routes.omega:.2f}  {letters}", highlight=False)
    for name, generation in (("eager", outcome.eager), ("flux", outcome.flux)):
        text = session.text(generation)
        said = " ".join(f"{prompt.lead} {text}".split())
        mark = ""
        if prompt.answer:
            mark = "[green]right:[/] " if prompt.answer in text else "[red]wrong:[/] "
        console.print(f"  {name:<6} {mark}{escape(said)}", highlight=False)
    place = first_difference(outcome.eager, outcome.flux)
    same = "the same as eager's" if place is None else f"other than eager's from new token {place}"
    console.print(f"  tokens {same}", highlight=False)


def strip(full: list[bool]) -> str:
    """One letter a layer, in groups: F for full attention, s for sparse."""
    letters = "".join("F" if layer else "s" for layer in full)
    return " ".join(letters[i : i + _GROUP] for i in range(0, len(letters), _GROUP))


def difference(one: Routed, other: Routed) -> str:
    """One line that says how differently the two prompts were routed."""
    ours, theirs = one.routes, other.routes
    changed = int((ours.fa[0] != theirs.fa[0]).sum())
    return (
        f"\n[bold]Ω {ours.omega:.2f} for the {one.prompt.name}, {theirs.omega:.2f} for the "
        f"{other.prompt.name}[/]: {abs(ours.omega - theirs.omega):.2f} apart, {changed} of "
        f"{len(ours.layer_names)} layers routed differently"
    )


def _router(session: Session) -> FluxRouter:
    if session.settings.router is not None:
        return FluxRouter.from_pretrained(session.settings.router)
    config = fluxcompile.FluxConfig(sink=smollm2.STATIC_SINK, local=smollm2.STATIC_LOCAL)
    return FluxRouter.from_model(session.model, config)
