"""The ``fluxcompile`` command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Route every attention layer of a frozen LLM to full or sparse attention, compiled.",
)


class Lowering(StrEnum):
    INDUCTOR = "inductor"
    AOT_EAGER = "aot_eager"
    EAGER = "eager"


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"fluxcompile {installed_version('fluxcompile')}")
        raise typer.Exit


@app.command()
def demo(
    tokens: Annotated[
        int, typer.Option(min=256, max=8000, help="Length of the prompt, in tokens.")
    ] = 3200,
    max_new_tokens: Annotated[int, typer.Option(min=3, max=128)] = 24,
    routes: Annotated[
        str,
        typer.Option(help='"static", "router", "full", "sparse", or 0/1 a layer: "1,0,0,…".'),
    ] = "static",
    router: Annotated[
        Path | None, typer.Option(help="A trained router's folder; implies --routes router.")
    ] = None,
    lowering: Annotated[Lowering, typer.Option()] = Lowering.INDUCTOR,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; the GPU if there is one by default.")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="float32 on a CPU and bfloat16 on a GPU by default.")
    ] = None,
) -> None:
    """Answer a long prompt with SmolLM2-135M, eager and compiled, and show the routes taken."""
    # Imported here: `--help` should not wait for torch.
    from fluxcompile.demo import DemoSettings, run_demo
    from fluxcompile.errors import FluxError

    try:
        settings = DemoSettings.create(
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            routes=routes,
            router=router,
            lowering=lowering.value,
            device=device,
            dtype=dtype.value if dtype else None,
        )
        agreed = run_demo(settings)
    except FluxError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(2) from error
    raise typer.Exit(0 if agreed else 1)
