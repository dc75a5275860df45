"""The ``fluxcompile`` command."""

import contextlib
from collections.abc import Iterator
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


Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; the GPU if there is one by default.")
]
Precision = Annotated[
    DType | None, typer.Option(help="float32 on a CPU and bfloat16 on a GPU by default.")
]
Compiler = Annotated[Lowering, typer.Option(help="What compiles the graphs.")]
Model = Annotated[str, typer.Option(help='"smollm2", a directory, or a model on the Hub.')]
Data = Annotated[
    str, typer.Option(help='"builtin", or a JSONL file: "task" and "text", "messages" or tokens.')
]
Mixture = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE of any other argument of builtin_mixture; repeatable."),
]


@contextlib.contextmanager
def _errors_told() -> Iterator[None]:
    """An error that fluxcompile raises on purpose is one line and exit code 2, not a traceback."""
    from fluxcompile.errors import FluxError

    try:
        yield
    except FluxError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(2) from error


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
    max_new_tokens: Annotated[
        int, typer.Option(min=3, max=128, help="Tokens of an answer, at most.")
    ] = 24,
    routes: Annotated[
        str | None,
        typer.Option(
            help='"router", "static", "full", "sparse", or 0/1 a layer: "1,0,0,…". By default '
            "the packaged router decides."
        ),
    ] = None,
    router: Annotated[
        Path | None, typer.Option(help="A trained router's folder; implies --routes router.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts that a router decides for.")] = 0,
    lowering: Compiler = Lowering.INDUCTOR,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Answer long prompts with SmolLM2-135M, eager and compiled, and show the routes taken.

    A router decides for two: a question about a long document, and code to go on with.
    """
    # Imported here: `--help` should not wait for torch.
    from fluxcompile.demo import DemoSettings, run_demo

    with _errors_told():
        settings = DemoSettings.create(
            tokens=tokens,
            max_new_tokens=max_new_tokens,
            routes=routes,
            router=router,
            seed=seed,
            lowering=lowering.value,
            device=device,
            dtype=dtype.value if dtype else None,
        )
        agreed = run_demo(settings)
    raise typer.Exit(0 if agreed else 1)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help='"smollm2", a directory, or a model on the Hub.')],
    output: Annotated[Path, typer.Option(help="Folder of the router and its checkpoints.")],
    data: Data = "builtin",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a built-in example.")] = 4096,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Built-in examples; by default two steps' worth.")
    ] = None,
    sink: Annotated[int, typer.Option(min=1, help="First tokens that SA attends to.")] = 128,
    local: Annotated[int, typer.Option(min=1, help="Latest tokens that SA attends to.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 300,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Examples a step, over all processes.")
    ] = 48,
    micro_batch: Annotated[int, typer.Option(min=1, help="Examples a process runs at once.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of the routers.")] = 5e-4,
    multiplier_lr: Annotated[float, typer.Option(help="Learning rate of λ1 and λ2.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of data, noise and a new router.")] = 42,
    task: Annotated[
        list[str] | None, typer.Option(help="NAME=TARGET sparsity of a task; repeatable.")
    ] = None,
    lowering: Compiler = Lowering.INDUCTOR,
    dtype: Precision = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")
    ] = False,
    config: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of any other field of FluxConfig; repeatable."),
    ] = None,
    mixture: Mixture = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of any other training argument; repeatable."),
    ] = None,
) -> None:
    """Train layer routers for a frozen model. Under torchrun: on every GPU.

    Other training arguments are those of fluxcompile.training.RouterTrainingArguments.
    """
    from fluxcompile.training import command

    with _errors_told():
        command.train(
            model,
            data=data,
            output=output,
            length=length,
            examples=examples,
            sink=sink,
            local=local,
            dtype=dtype.value if dtype else None,
            cpu=cpu,
            tasks=task or (),
            config=config or (),
            mixture=mixture or (),
            settings=set_ or (),
            max_steps=steps,
            batch_size=batch_size,
            per_device_train_batch_size=micro_batch,
            learning_rate=lr,
            multiplier_learning_rate=multiplier_lr,
            seed=seed,
            lowering=lowering.value,
            resume_from_checkpoint=resume or None,
        )
    typer.echo(f"router: {output}")


@app.command("eval")
def evaluate(
    router: Annotated[
        Path, typer.Option(help="A trained router's folder, or a packaged router's name.")
    ],
    model: Model = "smollm2",
    lengths: Annotated[
        list[int] | None,
        typer.Option("--length", "--lengths", min=1, help="Tokens; repeatable. 2048 and 4096."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="needle, needles, key_value, two_hop, code, prose, in_context; all."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Prompts a task and length.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Prompts a call.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the prompts and the intervals.")] = 0,
    lowering: Compiler = Lowering.INDUCTOR,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Hold a router against full attention on held-out prompts, through the compiled model."""

    given = {"lengths": lengths, "tasks": task}
    with _errors_told():
        from fluxcompile.evaluation.command import EvalSettings, run_eval

        settings = EvalSettings(
            model,
            router,
            examples=examples,
            batch=batch,
            seed=seed,
            lowering=lowering.value,
            device=device,
            dtype=dtype.value if dtype else None,
            **{name: value for name, value in given.items() if value},
        )
        run_eval(settings)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A published Flux Attention checkpoint, or a router's folder.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the router.")],
    dtype: Annotated[
        DType, typer.Option(help="What its weights are stored in; it computes in float32.")
    ] = DType.FLOAT32,
    bias: Annotated[
        float,
        typer.Option(help="Added to every layer's logit of full attention: more of it, or less."),
    ] = 0.0,
) -> None:
    """Save the routers inside a published checkpoint, or a router with another dtype or bias."""
    from fluxcompile.training import command

    with _errors_told():
        router = command.convert(source, output, dtype.value, bias)
    typer.echo(f"router of {len(router.layer_names)} layers: {output}")


@app.command()
def retarget(
    source: Annotated[
        Path, typer.Argument(help="A trained router's folder, or a packaged router's name.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the router.")],
    task: Annotated[
        list[str], typer.Option(help="NAME=SHARE of layers to be sparse on a task; repeatable.")
    ],
    model: Model = "smollm2",
    data: Data = "builtin",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a built-in example.")] = 4096,
    examples: Annotated[int, typer.Option(min=1, help="Built-in examples.")] = 96,
    seed: Annotated[int, typer.Option(help="Of built-in examples.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Examples a call.")] = 4,
    mixture: Mixture = None,
    lowering: Compiler = Lowering.INDUCTOR,
    regional: Annotated[
        bool, typer.Option("--regional", help="Compile layers one by one, equal ones once.")
    ] = False,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Move a trained router to other shares of sparse attention, without training it again."""
    from fluxcompile.training import command

    with _errors_told():
        reached = command.retarget(
            source,
            output,
            model=model,
            tasks=task,
            data=data,
            length=length,
            examples=examples,
            seed=seed,
            batch=batch,
            mixture=mixture or (),
            lowering=lowering.value,
            regional=regional,
            device=device,
            dtype=dtype.value if dtype else None,
            report=typer.echo,
        )
    for name, share in reached.items():
        typer.echo(f"{name}: {share:.3f} of the layers sparse")
    typer.echo(f"router: {output}")


@app.command()
def explain(
    model: Annotated[
        str, typer.Argument(help='"smollm2", a directory, or a model on the Hub.')
    ] = "smollm2",
    html: Annotated[
        Path | None,
        typer.Option(help="Write one page: layers, routes, time and KV memory of each layer."),
    ] = None,
    router: Annotated[
        str | None, typer.Option(help="A trained router: a folder, packaged name or hub id.")
    ] = None,
    routes: Annotated[
        str | None,
        typer.Option(help='"full", "sparse", "static" (smollm2\'s), or 0/1 a layer: "1,0,0,…".'),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text of a prompt; repeatable, one row each.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Length of the built-in prompt, without --prompt.")
    ] = 1024,
    sink: Annotated[int | None, typer.Option(min=1, help="Of fixed routes.")] = None,
    local: Annotated[int | None, typer.Option(min=1, help="Of fixed routes.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs that the page's times are of.")] = 3,
    device: Device = None,
    dtype: Precision = None,
) -> None:
    """Run a prompt and show what became of each attention layer, and why."""
    with _errors_told():
        from fluxcompile.explaining.command import ExplainSettings, run_explain

        settings = ExplainSettings(
            model,
            router=router,
            routes=routes,
            sink=sink,
            local=local,
            prompts=prompt or (),
            tokens=tokens,
            html=html,
            repeats=repeats,
            device=device,
            dtype=dtype.value if dtype else None,
        )
        run_explain(settings)


@app.command()
def doctor(
    lowering: Annotated[
        Lowering | None,
        typer.Option(help="Of the self-test; inductor by default, eager without a C++ compiler."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check versions, Triton, GPU, caches and the backend, and run one layer as a test.

    Exits with 1 if something does not work.
    """
    from fluxcompile.doctor.command import run_doctor

    works = run_doctor(lowering.value if lowering else None, as_json)
    raise typer.Exit(0 if works else 1)
