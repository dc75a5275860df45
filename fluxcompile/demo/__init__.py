"""``fluxcompile demo``: a real model answers long prompts, eager and compiled, side by side."""

import time

import torch
from rich.console import Console

from fluxcompile.demo.fixed import run_fixed
from fluxcompile.demo.routed import run_routed
from fluxcompile.demo.session import Session
from fluxcompile.demo.settings import DemoSettings

__all__ = ["DemoSettings", "run_demo"]


# With symbolic lengths Dynamo makes every float attribute (a norm's epsilon) symbolic too, finds
# that it cannot be, and traces each graph a second time. They never change here.
@torch._dynamo.config.patch(specialize_float=True)
def run_demo(settings: DemoSettings, console: Console | None = None) -> bool:
    """Load, answer eagerly, compile, answer again, check. Prints everything as it goes.

    Where a router decides, two prompts of one length; under fixed routes one.

    Returns whether routes pinned to full gave the tokens of eager. In half precision a different
    but equally good rounding may change a token, so there only the report counts: True.
    """
    console = console or Console()
    started = time.perf_counter()
    session = Session.start(settings, console)
    agreed = run_routed(session) if settings.routes == "router" else run_fixed(session)
    console.print(f"[dim]the whole demo: {time.perf_counter() - started:.0f} s[/]")
    return agreed
